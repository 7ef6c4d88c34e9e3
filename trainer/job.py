"""What a config asks for, checked before any model is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.base import Responds, World
from envs.clocks import time_limit
from envs.custom import CustomEnvConfig, CustomWorld
from envs.errors import UserError
from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld
from envs.remote.config import RemoteConfig
from envs.remote.world import RemoteWorld
from envs.threads import thread_metrics
from envs.types import Task
from envs.users import Users
from graders.build import build_grader
from graders.config import PenaltiesConfig
from graders.judge import CachedJudge, Judge, build_judge
from graders.types import Grader, taken_metrics
from trainer.chat import Chat, TemplateRefused
from trainer.config import RunConfig, WorldConfig
from trainer.curriculum import load_preflight
from trainer.difficulty import Visit
from trainer.engine_arguments import check_engine
from trainer.engine_judge import EngineJudge
from trainer.expert import Demonstration
from trainer.grammar import Grammar, check_schema
from trainer.model_cache import resolve_config, resolve_model
from trainer.model_users import ModelUsers, build_users
from trainer.offer import tools_offered
from trainer.response_format import ResponseFormat, schema_text
from trainer.runs import RunFolder
from trainer.tasks import load_demonstrations, load_tasks
from trainer.warmstart import check_demonstrations


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the config asks for, checked; no model is loaded yet."""

    config: RunConfig
    world: World
    grader: Grader
    watch_grader: Grader | None
    judge: Judge
    users: Users | None
    """Who plays the user of every rollout; None where nobody does, or the environment itself."""
    asks_engine: Mapping[str, EngineJudge]
    """By config key, where the run's own engine is the judge or the user: bound to the engine when it has started."""
    preflight: Mapping[str, Sequence[Visit]]
    """What a preflight has shown of the tasks; empty without one."""
    demonstrations: Sequence[Demonstration]
    """What the warm start imitates; without any it is the world's expert."""
    train_tasks: Sequence[Task]
    eval_tasks: Sequence[Task]
    model_path: Path
    chat: Chat
    grammar: Grammar | None
    """Of the answers, where `rollout.response_format` gives them a form."""

    def metrics(self) -> dict[str, float]:
        """What world, graders and judge counted since the last call."""
        taken: dict[str, float] = {}
        for part in self._parts():
            taken |= taken_metrics(part)
        return taken | thread_metrics()

    async def aclose(self) -> None:
        """Release what world, graders and judge hold: connections, servers, sandboxes.

        Each has `rollout.settle_timeout_s`: one that hangs is left, so that the process ends.
        """
        for part in self._parts():
            if close := getattr(part, "aclose", None):
                with contextlib.suppress(TimeoutError):
                    async with time_limit(self.config.rollout.settle_timeout_s):
                        await close()

    def _parts(self) -> list[object]:
        return [
            part for part in (self.world, self.users, self.grader, self.watch_grader, self.judge) if part is not None
        ]


def prepare(config: RunConfig) -> Job:
    """Everything that a user can get wrong is found here. Raises `UserError`; writes nothing but the model cache.

    What takes long to load (vLLM's parsers, the tokenizer) comes last, so that most mistakes are told at once.
    """
    RunFolder.check(config)
    _check_trackers(config)
    _check_engine(config)
    world = build_world(config.world)
    train_tasks, eval_tasks = load_tasks(config, world, "train"), load_tasks(config, world, "eval")
    _check_strata(config, train_tasks)
    tasks = [*train_tasks, *eval_tasks]
    _check_response_format(config, world, tasks)
    users = _users(config, world, tasks)
    demonstrations = load_demonstrations(config)
    preflight = load_preflight(config.curriculum)
    engine_judge = EngineJudge() if config.judge.base_url == "engine" else None
    judge = CachedJudge(engine_judge or build_judge(config.judge), config.judge.cache_size)
    grader = build_grader(config.grader, config.penalties, judge=judge, tasks=tasks)
    watch_grader = None
    if config.watch_grader is not None:
        watch_grader = build_grader(config.watch_grader, PenaltiesConfig(), judge=judge, tasks=tasks)
    _check_family(config)
    model_path = resolve_model(config.model.name)
    chat = Chat(
        model_path,
        tool_parser=config.model.tool_parser,
        reasoning_parser=config.model.reasoning_parser,
        chat_template=config.model.chat_template,
        template_kwargs=config.model.chat_template_kwargs,
    )
    _check_prompts(config, world, chat, tasks)
    check_demonstrations(demonstrations, chat=chat)
    return Job(
        config=config,
        world=world,
        grader=grader,
        watch_grader=watch_grader,
        judge=judge,
        users=users,
        asks_engine={
            **({"judge.base_url": engine_judge} if engine_judge else {}),
            **({"world.user": users.engine} if isinstance(users, ModelUsers) and users.engine else {}),
        },
        preflight=preflight,
        demonstrations=demonstrations,
        train_tasks=train_tasks,
        eval_tasks=eval_tasks,
        model_path=model_path,
        chat=chat,
        grammar=_grammar(config.rollout.response_format, chat=chat, model_path=model_path),
    )


def build_world(config: WorldConfig) -> World:
    """Raises `UserError` for a world that can't be had, such as an MCP server that does not answer."""
    match config:
        case FinanceConfig():
            return FinanceWorld(config)
        case RemoteConfig():
            return RemoteWorld(config)
        case CustomEnvConfig():
            return CustomWorld(config)


def _check_response_format(config: RunConfig, world: World, tasks: Sequence[Task]) -> None:
    schema = schema_text(config.rollout.response_format)
    if schema is None:
        return
    in_world = world.make_env().tools
    for task in tasks:
        tools_offered(task, in_world, config.rollout)
    check_schema(schema)


def _grammar(response_format: ResponseFormat | None, *, chat: Chat, model_path: Path) -> Grammar | None:
    schema = schema_text(response_format)
    if response_format is None or schema is None:
        return None
    from transformers import AutoConfig

    chat.check_response_format(response_format.model_dump(mode="json", by_alias=True), schema)
    return chat.grammar(
        schema, vocab_size=AutoConfig.from_pretrained(model_path, trust_remote_code=False).get_text_config().vocab_size
    )


def _users(config: RunConfig, world: World, tasks: Sequence[Task]) -> Users | None:
    users = build_users(config.world)
    if users is None:
        return None
    if isinstance(world.make_env(), Responds):
        raise UserError("world.user: the environment has a user of its own (respond); leave one of the two out")
    if check := getattr(users, "check", None):
        for task in tasks:
            check(task)
    return users


def _check_trackers(config: RunConfig) -> None:
    # accelerate leaves out a tracker whose package is missing without a word.
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: the package {name} is not installed; install it, or leave {name} out")


def _check_prompts(config: RunConfig, world: World, chat: Chat, tasks: Sequence[Task]) -> None:
    """Every task's prompt goes through the chat template, and leaves room for a turn."""
    offered, limit = world.make_env().tools, config.rollout.max_episode_tokens
    for task in tasks:
        schemas = [tool.schema() for tool in tools_offered(task, offered, config.rollout).values()]
        try:
            text = chat.prompt_text(task.messages, schemas)
        except TemplateRefused as e:
            raise UserError(f"task {task.task_id!r}: {e}") from e
        # A token is a byte at least, so most prompts need not be encoded.
        if len(text.encode("utf-8", "replace")) >= limit and (num_tokens := chat.num_tokens(text)) >= limit:
            raise UserError(
                f"rollout.max_episode_tokens: the prompt of task {task.task_id!r} alone has {num_tokens:,} tokens, so "
                f"{limit:,} leave no room for a turn; raise it, or leave the task out"
            )


def _check_strata(config: RunConfig, tasks: Sequence[Task]) -> None:
    key = config.rollout.stratify_by
    if key is None:
        return
    for task in tasks:
        if key not in task.item:
            raise UserError(
                f"rollout.stratify_by: the training task {task.task_id!r} has no key {key!r}; it has "
                f"{', '.join(task.item) or 'none'}"
            )
    if len({str(task.item[key]) for task in tasks}) == 1:
        raise UserError(f"rollout.stratify_by: every training task has the same {key!r}; leave the setting out")


def _check_engine(config: RunConfig) -> None:
    if config.engine.quantization is None and config.engine.sleep == "none":
        return
    import torch

    check_engine(config.engine, on_cpu=not torch.cuda.is_available())


def _check_family(config: RunConfig) -> None:
    # Before the weights are downloaded; a wrong name is told before torch is imported.
    folder = resolve_config(config.model.name)
    import torch

    from trainer.family import check_attention, check_served, read_family, weights_dtype

    family = read_family(folder, config.model.lora)
    on_cpu = not torch.cuda.is_available()
    check_attention(folder, config.model, on_cpu=on_cpu)
    check_served(family, config.engine, dtype=weights_dtype(config.model, on_cpu=on_cpu), on_cpu=on_cpu)
    longest = config.rollout.max_episode_tokens
    if family.max_length is not None and longest > family.max_length:
        raise UserError(
            f"rollout.max_episode_tokens: {longest} tokens are more than the model has positions for "
            f"({family.max_length}, max_position_embeddings in its config.json)"
        )
