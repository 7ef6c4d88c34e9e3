"""What a config asks for, looked at and told: everything that `prepare` checks, and the user's own graders tried once.

No weights are fetched or loaded, nothing is trained, no run folder is made. What servers are asked for: see
`trainer.reachable`, and MCP servers for their tools.
"""

from __future__ import annotations

import asyncio
import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from envs.base import Closes
from envs.custom.world import CustomEnvConfig
from envs.errors import UserError, WorldError, told_of
from envs.limits.clocks import time_limit
from envs.reading.documents import check_writable
from envs.secrets import hidden_in
from envs.state import read_state
from envs.tools import Tool
from envs.types import Episode, Message, StopReason, Task, Turn
from envs.user_code import looked_at
from graders.build import build_scorer
from graders.config import GraderConfig, MultiConfig, singles
from graders.penalties import check_part_names, check_turn_rewards
from graders.settings import GraderSettings
from graders.types import Grade, check_numbers
from graders.user.custom import CustomConfig
from graders.user.python import PythonConfig
from trainer.config import CustomLossConfig, LossSettings, RunConfig
from trainer.config.advantages import CustomAdvantageConfig, GdpoConfig, advantage_settings
from trainer.config.idle import idle_settings
from trainer.measures.exporter import check_port
from trainer.prepare import Prepared, prepare
from trainer.reachable import servers_of
from trainer.runs.folder import RunFolder
from trainer.runs.resuming import check_resumable
from trainer.tasks.offer import tools_offered

_MOST_NAMES = 12
_MOST_TRIED = 20
"""Tasks of different keys."""
_ANSWER = "I do not know."


def check_run(config: RunConfig) -> list[tuple[str, str]]:
    """(what, found) of each part of the run. Raises `UserError` as training would before it loads anything."""
    folder = _folder(config)
    check_port(config)
    prepared = prepare(config, weights=False)
    with asyncio.Runner() as loop:
        try:
            found = [("run folder", folder), *_found(prepared)]
            return [*found, *(("tried", told) for told in loop.run(_tried(prepared)))]
        finally:
            with looked_at("closing the world and the graders"):
                loop.run(prepared.aclose())


def _found(prepared: Prepared) -> Iterator[tuple[str, str]]:
    config = prepared.config
    yield "tasks", f"{len(prepared.train_tasks)} to train on, {_held_out(prepared)}"
    offered = prepared.world.make_env().tools
    yield "prompts", _prompts(prepared, offered)
    yield "tools", _tools(prepared, offered)
    if prepared.users is not None:
        yield "user", type(prepared.users).__name__
    yield "loss", _loss(config.loss)
    yield "grader", _grader(config.grader)
    if config.watch_grader is not None:
        yield "watch grader", _grader(config.watch_grader)
    for key, url in servers_of(config).items():
        yield "reached", f"{key} {hidden_in(url)}"
    if config.warmstart is not None:
        shown = f"{len(prepared.demonstrations)} conversations" if prepared.demonstrations else "the world's expert"
        yield "warm start", f"{config.warmstart.num_steps} steps of {config.warmstart.episodes_per_step}: {shown}"
    if prepared.start_adapter is not None:
        yield "begins as", str(prepared.start_adapter)
    yield "model", f"{config.model.name}, calls read by {config.model.tool_parser}"
    yield "engine", _engine(prepared)
    if config.prometheus is not None:
        yield "figures", f"http://{config.prometheus.host}:{config.prometheus.port}/metrics"
    for key, meant in prepared.resolved().items():
        yield "auto", f"{key}: {meant}"
    yield from (("no effect", told) for told in idle_settings(config))


async def _tried(prepared: Prepared) -> list[str]:
    """What the user's own loss and graders make of something small. Raises `UserError` for what would end a run.

    Loss and advantages have been tried by `prepare`. A grader is given one answer, as a model may give it: without a
    tool call, to the first training task and to one of each kind of row: those that have other keys than it. In a world
    of the user's own the environment is open meanwhile, so that a grader may look into it.

    *Not covered*: graders that ask a server, of which `trainer.reachable` knows whether it is there.
    """
    config = prepared.config
    told = [f"loss on a few tokens: {config.loss.target}"] if isinstance(config.loss, CustomLossConfig) else []
    if isinstance(advantage := advantage_settings(config.loss.advantage), CustomAdvantageConfig):
        told.append(f"advantages of a few rewards: {advantage.target}")
    for key, grader in (("grader", config.grader), ("watch_grader", config.watch_grader)):
        for inner, single in singles(grader).items() if grader else ():
            if isinstance(single, CustomConfig | PythonConfig):
                tasks = _unlike(prepared)
                for task in tasks:
                    to = f" to task {task.task_id!r}" if len(tasks) > 1 else ""
                    given = await _graded(prepared, single, task, where=f"{key}{inner}")
                    told.append(f"{key}{inner} on {_ANSWER!r}{to}: {given}")
    return told


def _unlike(prepared: Prepared) -> list[Task]:
    """The first task of each set of keys whose values are not null, held-out ones too: what a grader reads of rows, one
    of those may lack."""
    first: dict[frozenset[str], Task] = {}
    for task in (*prepared.train_tasks, *prepared.eval_tasks):
        first.setdefault(frozenset(key for key, value in task.item.items() if value is not None), task)
    return list(first.values())[:_MOST_TRIED]


async def _graded(prepared: Prepared, config: GraderSettings, task: Task, *, where: str) -> str:
    """What it says of `_ANSWER`."""
    env = prepared.world.make_env()
    answer = Message(role="assistant", content=_ANSWER)
    episode = Episode(
        rollout_id="check",
        task_id=task.task_id,
        messages=(*task.messages, answer),
        turns=(Turn(message=answer, num_tokens=1),),
        stop_reason=StopReason.ANSWERED,
        completion_ids=tuple(range(prepared.chat.num_tokens(_ANSWER))),
    )
    of = f"{task.where}: " if task.where else ""
    whose, where = where, f"{of}{where}: tried on the answer {_ANSWER!r} to task {task.task_id!r}"
    grader = build_scorer(config)
    is_own, is_open = isinstance(prepared.config.world, CustomEnvConfig), False
    try:
        async with time_limit(prepared.config.rollout.settle_timeout_s):
            if is_own:
                with looked_at(f"world: open() of task {task.task_id!r}"):
                    await _awaited("world", "open", env.open(task, episode.rollout_id))
                    is_open = True
                with looked_at(f"world: final_state() of task {task.task_id!r}"):
                    state = await read_state(env, timeout_s=prepared.config.rollout.tool_timeout_s)
                    episode = replace(episode, state=state)
            with looked_at(where), told_of(where):
                grade = await grader.grade(task, episode)
                if config is prepared.config.grader:
                    check_part_names(grade.parts, prepared.config.penalties, whose="parts")
                    _weigh(grade, prepared.config)
                check_numbers(grade, task)
                check_turn_rewards(grade, episode)
    except TimeoutError:
        return f"no grade within rollout.settle_timeout_s ({prepared.config.rollout.settle_timeout_s:g} s)"
    except WorldError as e:
        return f"no grade: {e}"
    finally:
        limit_s = prepared.config.rollout.settle_timeout_s
        if isinstance(grader, Closes):
            await _closed(whose, "aclose", grader.aclose, limit_s)
        if is_open:
            await _closed("world", "close", lambda: env.close(None), limit_s)
    faults = f" ({', '.join(grade.errors)}: {grade.explanation})" if grade.errors else ""
    return f"{grade.reward:g}{faults}"


def _weigh(grade: Grade, config: RunConfig) -> None:
    """Raise `UserError` where the estimator can't weigh the parts of such a reward."""
    advantage = advantage_settings(config.loss.advantage)
    if isinstance(advantage, GdpoConfig) and (told := advantage.fault([*grade.parts, *config.parts_beside_the_grade])):
        raise UserError(told)


async def _awaited(whose: str, name: str, given: Any) -> None:
    if not inspect.isawaitable(given):
        raise UserError(f"{whose}: {name}: expected `async def {name}`, see envs/base.py")
    await given


async def _closed(whose: str, name: str, close: Callable[[], Any], limit_s: float) -> None:
    with looked_at(f"{whose}: {name}()"):
        try:
            async with time_limit(limit_s) as limit:
                await _awaited(whose, name, close())
        except TimeoutError:
            if not limit.expired():
                raise
            told = f"not done within rollout.settle_timeout_s ({limit_s:g} s)"
            raise UserError(f"{whose}: {name}(): {told}") from None


def _loss(loss: LossSettings) -> str:
    """With the advantages that it weighs tokens by."""
    advantage = advantage_settings(loss.advantage)
    own = f"custom {loss.target}" if isinstance(loss, CustomLossConfig) else loss.type
    of = f"custom {advantage.target}" if isinstance(advantage, CustomAdvantageConfig) else advantage.type
    return f"{own}, advantages by {of}"


def _folder(config: RunConfig) -> str:
    if RunFolder.is_finished(config):
        return f"{config.output_dir} holds this run, which is finished"
    check_writable(config.output_dir, "output_dir", is_folder=True)
    check_resumable(config.output_dir)
    done = RunFolder(config.output_dir, run_id="", rank=0).resume_step
    return f"{config.output_dir}, to be resumed after step {done}" if done else f"{config.output_dir}, new"


def _held_out(prepared: Prepared) -> str:
    num_tasks, wanted = len(prepared.eval_tasks), prepared.config.eval.num_tasks
    told = f"{min(num_tasks, wanted)} of {num_tasks} held-out ones to evaluate on (eval.num_tasks {wanted})"
    # An environment that owns its data has the same empty prompt for all.
    trained = {task.messages for task in prepared.train_tasks if task.messages[-1].content}
    same = sum(task.messages in trained for task in prepared.eval_tasks)
    return f"{told}; {same} of those have the prompt of a training task" if same else told


def _prompts(prepared: Prepared, offered: Mapping[str, Tool]) -> str:
    """How long they are. Some suffice: a run may have many."""
    limits = prepared.config.rollout
    tasks = [*prepared.train_tasks, *prepared.eval_tasks][
        :: max(1, (len(prepared.train_tasks) + len(prepared.eval_tasks)) // 200)
    ]
    lengths = []
    for task in tasks:
        schemas = [tool.schema() for tool in tools_offered(task, offered, limits).values()]
        lengths.append(prepared.chat.num_tokens(prepared.chat.prompt_text(task.messages, schemas)))
    middle, most = statistics.median(lengths), max(lengths)
    return f"{middle:,.0f} tokens in the middle, {most:,} at most, of an episode's {limits.max_episode_tokens:,}"


def _tools(prepared: Prepared, offered: Mapping[str, Tool]) -> str:
    rollout = prepared.config.rollout
    names = list(dict.fromkeys(name for task in prepared.train_tasks for name in tools_offered(task, offered, rollout)))
    unused = _listed([name for name in offered if name not in names])
    return (_listed(names) or "none") + (f"; offered by no row to train on: {unused}" if unused else "")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return f"{shown} and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else shown


def _engine(prepared: Prepared) -> str:
    engine = prepared.engine
    where = "on this machine" if engine.runs_here else "elsewhere"
    return (
        f"{prepared.config.engine.type}, {where}, given {'merged weights' if engine.publishes_merged else 'adapters'}"
    )


def _grader(grader: GraderConfig) -> str:
    if isinstance(grader, MultiConfig):
        inner = ", ".join(f"{name} ({each.type})" for name, each in grader.graders.items())
        return f"multi of {inner}: {grader.calculate_output}"
    return grader.type
