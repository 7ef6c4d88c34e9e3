"""What a config asks for, checked before any model is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from envs.base import Checks, Closes, Env, Responds, World
from envs.errors import UserError, told_of
from envs.limits.clocks import time_limit
from envs.limits.threads import thread_metrics
from envs.registry import build_world
from envs.remote.config import RemoteConfig
from envs.tools import Tool
from envs.types import Task
from envs.user_code import looked_at
from envs.users import Users
from graders.build import build_grader
from graders.judges.base import Judge
from graders.judges.cache import CachedJudge
from graders.judges.openai_judge import build_judge
from graders.penalties import PenaltiesConfig
from graders.types import Grader, taken_metrics
from trainer.config import CustomEngineConfig, CustomLossConfig, EngineConfig, RunConfig, asks_the_base
from trainer.config.response_format import ResponseFormat, schema_text
from trainer.engines.base_judge import EngineJudge
from trainer.engines.engine import ChecksModel, ChecksRun, Engine, KeepsBase, Sleeps, keeps_versions, make_engine
from trainer.learning.advantages.registry import check_advantage
from trainer.learning.warmstart import check_demonstrations, check_expert
from trainer.models.cache import resolve_config, resolve_model, resolve_texts
from trainer.models.machines import has_gpu, memory_metrics
from trainer.reachable import check_servers
from trainer.rollouts.model_users import ModelUsers, build_users
from trainer.runs.folder import RunFolder
from trainer.runs.resuming import other_modules, start_adapter
from trainer.tasks.curriculum import load_preflight
from trainer.tasks.difficulty import Visit
from trainer.tasks.load import load_demonstrations, load_tasks
from trainer.tasks.offer import tools_offered
from trainer.templates.chat import Chat, TemplateRefused
from trainer.templates.grammar import Grammar, check_schema, in_words
from trainer.types import Demonstration

if TYPE_CHECKING:
    from trainer.models.family import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the config asks for, checked; no model is loaded yet."""

    config: RunConfig
    world: World
    grader: Grader
    watch_grader: Grader | None
    judge: Judge
    engine: Engine
    """Not started."""
    users: Users | None
    """Who plays the user of every rollout; None where nobody does, or the environment itself."""
    asks_engine: tuple[EngineJudge, ...]
    """Judge and user, where the run's own engine is one: bound to the engine when it has started."""
    preflight: Mapping[str, Sequence[Visit]]
    """What a preflight has shown of the tasks; empty without one."""
    demonstrations: Sequence[Demonstration]
    """What the warm start imitates; without any it is the world's expert."""
    train_tasks: Sequence[Task]
    eval_tasks: Sequence[Task]
    model_path: Path
    chat: Chat
    start_adapter: Path | None
    """Whose weights the policy begins with; None: no change of the base."""
    grammar: Grammar | None
    """Of the answers, where `rollout.response_format` gives them a form."""

    @property
    def num_versions(self) -> int:
        """How many policy versions the engine serves at once."""
        ahead = self.config.overlap.max_staleness
        return 1 + ahead if ahead and keeps_versions(self.engine) else 1

    def metrics(self) -> dict[str, float]:
        """What world, graders, judge and engine counted since the last call, and the memory of a GPU."""
        taken: dict[str, float] = {}
        for part in self._parts():
            taken |= taken_metrics(part)
        return taken | thread_metrics() | memory_metrics()

    def resolved(self) -> dict[str, str]:
        """What each `auto` of the config means for this model on this machine, by its key."""
        from trainer.models.family import weights_dtype

        config = self.config
        found: dict[str, str] = {}
        if config.model.dtype == "auto":
            found["model.dtype"] = weights_dtype(config.model, on_cpu=not has_gpu())
        if config.model.chat_template == "auto":
            found["model.chat_template"] = "the fallback" if self.chat.uses_fallback else "the model's own"
        if isinstance(config.engine, EngineConfig) and config.engine.publish == "auto":
            found["engine.publish"] = "merged" if self.engine.publishes_merged else "lora"
        return found

    async def aclose(self) -> None:
        """Release what world, graders, judge and engine hold: connections, servers, sandboxes.

        Each has `rollout.settle_timeout_s`: one that hangs is left, so that the process ends.
        """
        for part in self._parts():
            if isinstance(part, Closes):
                with contextlib.suppress(TimeoutError):
                    async with time_limit(self.config.rollout.settle_timeout_s):
                        await part.aclose()

    def _parts(self) -> list[object]:
        parts = (self.world, self.users, self.grader, self.watch_grader, self.judge, self.engine)
        return [part for part in parts if part is not None]


def prepare(config: RunConfig, *, weights: bool = True, patience_s: float = 0.0) -> Prepared:
    """Everything that a user can get wrong is found here. Raises `UserError`; writes nothing but the model cache.

    What takes long to load (vLLM's parsers, the tokenizer) comes last, so that most mistakes are told at once. Without
    `weights` those of a hub's model are not fetched: the run can be looked at, not made. `patience_s` is for servers
    that are started beside the run.
    """
    RunFolder.check(config)
    _check_trackers(config)
    _check_loss(config)
    engine = _checked_engine(config)
    # A world may have much to read: an adapter that is not there is told before.
    start_adapter(config)
    world = build_world(config.world)
    env = _checked_env(world)
    train_tasks, eval_tasks = load_tasks(config, world, "train"), load_tasks(config, world, "eval")
    _check_strata(config, train_tasks)
    tasks = [*train_tasks, *eval_tasks]
    _check_rows(config, world, env.tools, tasks)
    _check_response_format(config, env.tools, tasks)
    users = _users(config, env, tasks)
    demonstrations = load_demonstrations(config)
    check_expert(config, world, users, train_tasks, demonstrations)
    preflight = load_preflight(config.curriculum)
    _check_curriculum(config, preflight, train_tasks)
    engine_judge = EngineJudge() if config.judge.base_url == "engine" else None
    judge = CachedJudge(engine_judge or build_judge(config.judge), config.judge.cache_size)
    grader = build_grader(config.grader, config.penalties, judge=judge, tasks=tasks)
    watch_grader = None
    if config.watch_grader is not None:
        with told_of("watch_grader"):
            watch_grader = build_grader(config.watch_grader, PenaltiesConfig(), judge=judge, tasks=tasks)
    check_servers(config, patience_s=patience_s)
    family = _check_family(config, engine, trains=weights)
    adapter = _start_adapter(config, family)
    model_path = resolve_model(config.model.name) if weights else resolve_texts(config.model.name)
    chat = build_chat(config, model_path)
    _check_prompts(config, env.tools, chat, tasks)
    check_demonstrations(demonstrations, chat=chat, max_tokens=config.rollout.max_episode_tokens)
    return Prepared(
        config=config,
        world=world,
        grader=grader,
        watch_grader=watch_grader,
        judge=judge,
        engine=engine,
        users=users,
        asks_engine=tuple(filter(None, (engine_judge, users.engine if isinstance(users, ModelUsers) else None))),
        preflight=preflight,
        demonstrations=demonstrations,
        train_tasks=train_tasks,
        eval_tasks=eval_tasks,
        model_path=model_path,
        chat=chat,
        start_adapter=adapter,
        grammar=_grammar(config.rollout.response_format, chat=chat, model_path=model_path),
    )


def build_chat(config: RunConfig, model_path: Path) -> Chat:
    """Raises `UserError` that names the setting at fault."""
    return Chat(
        model_path,
        tool_parser=config.model.tool_parser,
        reasoning_parser=config.model.reasoning_parser,
        chat_template=config.model.chat_template,
        template_kwargs=config.model.chat_template_kwargs,
    )


def _check_response_format(config: RunConfig, offered: Mapping[str, Tool], tasks: Sequence[Task]) -> None:
    schema = schema_text(config.rollout.response_format)
    if schema is None:
        return
    for task in tasks:
        with told_of(task.where):
            tools_offered(task, offered, config.rollout)
    check_schema(schema)


def vocabulary_of(model_path: Path) -> int:
    """Of the model's logits; its tokenizer may have fewer."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model_path, trust_remote_code=False).get_text_config().vocab_size)


def _grammar(response_format: ResponseFormat | None, *, chat: Chat, model_path: Path) -> Grammar | None:
    schema = schema_text(response_format)
    if response_format is None or schema is None:
        return None
    chat.check_response_format(response_format.model_dump(mode="json", by_alias=True), schema)
    try:
        return chat.grammar(schema, vocab_size=vocabulary_of(model_path))
    except RuntimeError as e:
        raise UserError(f"rollout.response_format: xgrammar does not take this schema: {in_words(e)}") from e


def _users(config: RunConfig, env: Env, tasks: Sequence[Task]) -> Users | None:
    users = build_users(config.world)
    if users is None:
        return None
    if isinstance(env, Responds):
        raise UserError("world.user: the environment has a user of its own (respond); leave one of the two out")
    if isinstance(users, Checks):
        for task in tasks:
            with told_of(task.where):
                users.check(task)
    return users


def _checked_env(world: World) -> Env:
    """One that tells what the world offers, and is never opened. Raises `UserError` for what is none at all."""
    with looked_at("world: make_env()"):
        env = world.make_env()
        lacks = [name for name in ("tools", "open", "close") if not hasattr(env, name)]
        tools = {} if lacks else env.tools
    if lacks:
        raise UserError(f"world: make_env() gives {type(env).__name__}, which has no {lacks[0]}; see envs/base.py: Env")
    if not isinstance(tools, Mapping):
        raise UserError(f"world: {type(env).__name__}.tools: expected tools by name, got {type(tools).__name__}")
    for name, tool in tools.items():
        if not isinstance(tool, Tool):
            raise UserError(
                f"world: {type(env).__name__}.tools[{name!r}]: expected a Tool, as envs.tools.tool makes it of a "
                f"function, got {type(tool).__name__}"
            )
    return env


def _check_rows(config: RunConfig, world: World, offered: Mapping[str, Tool], tasks: Sequence[Task]) -> None:
    """Whether the world can open them, as far as it can tell, and offers what it was given to offer."""
    if isinstance(world, Checks):
        for task in tasks:
            with told_of(task.where), looked_at("world: check()"):
                world.check(task)
    if config.rollout.answer == "tool_calls" and not any(task.tools or offered for task in tasks):
        raise UserError("rollout.answer: tool_calls, but neither rows nor world offer a tool that could be called")
    served = [tool.name for tool in config.world.tools] if isinstance(config.world, RemoteConfig) else []
    if served and not any(name in (task.tools or ()) for task in tasks for name in served):
        raise UserError(
            f"world.tools: no row offers {' or '.join(served[:5])}, so no model would ever see them: their schemas "
            "stand in the rows, under tools; add them there, or leave world.tools out"
        )


def _check_curriculum(config: RunConfig, preflight: Mapping[str, Sequence[Visit]], tasks: Sequence[Task]) -> None:
    if preflight and not any(task.task_id in preflight for task in tasks):
        assert config.curriculum is not None
        raise UserError(
            f"curriculum.preflight {config.curriculum.preflight}: knows none of the training tasks (it has "
            f"{next(iter(preflight))!r}, the run has {tasks[0].task_id!r}); expected a preflight of these tasks"
        )


def _check_trackers(config: RunConfig) -> None:
    # accelerate leaves out a tracker whose package is missing without a word.
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: the package {name} is not installed; install it, or leave {name} out")


def _check_prompts(config: RunConfig, offered: Mapping[str, Tool], chat: Chat, tasks: Sequence[Task]) -> None:
    """Every task's prompt goes through the chat template, and leaves room for a turn."""
    limit = config.rollout.max_episode_tokens
    for task in tasks:
        with told_of(task.where):
            schemas = [tool.schema() for tool in tools_offered(task, offered, config.rollout).values()]
            try:
                text = chat.prompt_text(task.messages, schemas)
            except TemplateRefused as e:
                raise UserError(f"task {task.task_id!r}: {e}") from e
            # A token is a byte at least, so most prompts need not be encoded.
            if len(text.encode("utf-8", "replace")) >= limit and (num_tokens := chat.num_tokens(text)) >= limit:
                raise UserError(
                    f"rollout.max_episode_tokens: the prompt of task {task.task_id!r} alone has {num_tokens:,} tokens, "
                    f"so {limit:,} leave no room for a turn; raise it, or leave the task out"
                )


def _check_strata(config: RunConfig, tasks: Sequence[Task]) -> None:
    key = config.rollout.stratify_by
    if key is None:
        return
    for task in tasks:
        if key not in task.item:
            with told_of(task.where):
                raise UserError(
                    f"rollout.stratify_by: the training task {task.task_id!r} has no key {key!r}; it has "
                    f"{', '.join(task.item) or 'none'}"
                )
    if len({str(task.item[key]) for task in tasks}) == 1:
        raise UserError(f"rollout.stratify_by: every training task has the same {key!r}; leave the setting out")


def _check_loss(config: RunConfig) -> None:
    check_advantage(config.loss.advantage)
    if isinstance(config.loss, CustomLossConfig):
        from trainer.learning.losses.registry import check_loss

        check_loss(config.loss)


def _checked_engine(config: RunConfig) -> Engine:
    """The engine, not started."""
    engine = make_engine(config.engine)
    for key in asks_the_base(config):
        if not isinstance(engine, KeepsBase):
            raise UserError(
                f"{key}: engine needs the base model beside the adapter, and this engine has no generate_base"
            )
    if isinstance(engine, ChecksRun):
        engine.check_run(config)
    if config.overlap.pin == "episode" and not keeps_versions(engine):
        raise UserError(
            "overlap.pin: episode needs an engine that serves former weights beside the newest, as vLLM does with "
            "engine.publish: lora, and this one does not; leave it out"
        )
    if config.overlap.max_staleness and isinstance(config.engine, CustomEngineConfig) and isinstance(engine, Sleeps):
        raise UserError(
            "overlap.max_staleness: rollouts go on while the trainer trains, and this engine sleeps then; leave it "
            "out, or the engine's sleep and wake_up"
        )
    return engine


def _start_adapter(config: RunConfig, family: Family) -> Path | None:
    """What `model.lora.start_from` names. Raises `UserError` where the run's model can't begin with it."""
    if (adapter := start_adapter(config)) is not None:
        from trainer.learning.adapter import check_adapter

        with told_of("model.lora.start_from"):
            try:
                check_adapter(adapter, resolve_config(config.model.name), config.model)
            except UserError as e:
                raise UserError(other_modules(adapter, family.targets) or str(e)) from e
    return adapter


def _check_family(config: RunConfig, engine: Engine, *, trains: bool) -> Family:
    # Before the weights are downloaded; a wrong name is told before torch is imported.
    folder = resolve_config(config.model.name)
    from trainer.models.family import check_attention, read_family

    family = read_family(folder, config.model.lora)
    check_attention(folder, config.model, on_cpu=not has_gpu())
    if isinstance(engine, ChecksModel):
        engine.check_model(config, folder, trains=trains)
    longest = config.rollout.max_episode_tokens
    if family.max_length is not None and longest > family.max_length:
        raise UserError(
            f"rollout.max_episode_tokens: {longest} tokens are more than the model has positions for "
            f"({family.max_length}, max_position_embeddings in its config.json)"
        )
    return family
