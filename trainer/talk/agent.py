"""A run's agent, ready to be talked to: its tasks, its world, and its policy in an engine here or behind a server."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.errors import UserError
from envs.limits.loops import Loop, LoopThread
from envs.reading.variables import NAME
from envs.types import Message, Task
from envs.users import TakesUser
from graders.judges.base import JudgeConfig
from graders.penalties import PenaltiesConfig
from graders.rules.string_check import StringCheckConfig
from trainer.config import EngineConfig, OverlapConfig, RunConfig, load_config
from trainer.engines.engine import Sampler
from trainer.models.machines import check_option
from trainer.prepare import Prepared, prepare, vocabulary_of
from trainer.runs.about import check_run_folder
from trainer.runs.manifest import adapter_of
from trainer.runs.resuming import beginning_with
from trainer.talk.served import ServedPolicy
from trainer.tasks.offer import tools_offered

if TYPE_CHECKING:
    from trainer.session import StartEngine

_NO_END = 1_000_000
"""A conversation ends when the person ends it, or its tokens are used up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `scripts/chat.py` is given."""

    run: Path
    step: int | None = None
    """The checkpoint's adapter instead of the newest one."""
    url: str | None = None
    """Of a server that serves the policy; None: an engine of its own."""
    model: str | None = None
    """What the server calls it."""
    api_key_env: str = "VLLM_API_KEY"
    overrides: Sequence[str] = ()
    """KEY=VALUE of the run's config."""
    temperature: float | None = None
    """None: that of the run's evaluations."""
    seed: int = 0
    grades: bool = False
    """Whether a task's conversation is graded when it ends; else the run's grader is not even built."""
    task: int | None = None
    """The number of the task to begin with, counted from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """What a conversation needs."""

    prepared: Prepared
    sampler: Sampler
    loop: Loop
    policy: str
    """Which, in words."""
    temperature: float
    seed: int
    grades: bool
    first: Task | None
    """What to begin with."""

    @property
    def tasks(self) -> list[Task]:
        """The held-out ones first."""
        return [*self.prepared.eval_tasks, *self.prepared.train_tasks]

    def numbered(self, text: str) -> Task:
        """Raises `UserError` where there is no such task."""
        return _numbered(self.tasks, text)

    def tools_of(self, task: Task) -> list[str]:
        """What the agent is offered in it, as far as that is known before it begins."""
        return list(tools_offered(task, dict(self.prepared.world.make_env().tools), self.prepared.config.rollout))

    def asked(self, question: str, place: Task) -> Task:
        """The person's own question where `place` is: its tools, its data and what the system says of it."""
        told = [message for message in place.messages if message.role == "system"]
        said = Message(role="user", content=question.encode("utf-8", "replace").decode())
        return replace(place, messages=(*told, said))


@contextlib.contextmanager
def open_agent(options: Options, *, start_engine: StartEngine | None = None) -> Iterator[Agent]:
    """Load what there is to load; `start_engine` as in `train`.

    Raises `UserError` for whatever the person can put right, `PublishError` where the engine does not run the adapter.
    """
    _check(options)
    config = _config(options)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agent-rft-chat-")))
        # The run's own folder stays as it is, and another process may hold it.
        config = config.model_copy(update={"output_dir": folder / "run"})
        adapter = None if options.url else adapter_of(options.run, options.step)
        loop = stack.enter_context(LoopThread())
        served = _found(options, loop, stack)
        prepared = prepare(beginning_with(config, adapter), weights=adapter is not None)
        tasks = [*prepared.eval_tasks, *prepared.train_tasks]
        first = None if options.task is None else _numbered(tasks, str(options.task))
        stack.callback(lambda: loop.run(prepared.aclose()))
        sampler: Sampler
        if served is not None:
            sampler, policy = served
            _begin(sampler, prepared, loop)
        else:
            sampler = _loaded(prepared, folder / "chat.log", loop, stack, start_engine)
            policy = f"the adapter {adapter} on {config.model.name}"
        temperature = config.eval.temperature if options.temperature is None else options.temperature
        yield Agent(
            prepared=prepared,
            sampler=sampler,
            loop=loop,
            policy=policy,
            temperature=temperature,
            seed=options.seed,
            grades=options.grades,
            first=first,
        )


def _numbered(tasks: Sequence[Task], text: str) -> Task:
    if text.isdecimal() and 1 <= int(text) <= len(tasks):
        return tasks[int(text) - 1]
    raise UserError(f"task {text or '(none)'}: expected a number from 1 to {len(tasks)}; /tasks lists them")


def _check(options: Options) -> None:
    if options.url is None and options.model is not None:
        raise UserError("--model: only with --url")
    if options.url is not None and options.step is not None:
        raise UserError("--step: only without --url, whose server has the weights that it has")
    if re.fullmatch(NAME, options.api_key_env) is None:
        raise UserError(f"--api-key-env {options.api_key_env}: expected the name of an environment variable")
    check_option("--temperature", options.temperature, least=0.0)


def _config(options: Options) -> RunConfig:
    """The run's, with a person in the user's place and nothing of the training."""
    check_run_folder(options.run, "config.yaml")
    config = load_config(options.run / "config.yaml", list(options.overrides))
    rollout = {"max_turns": _NO_END, "max_tool_calls": _NO_END, "max_user_turns": _NO_END, "world_retries": 0}
    changed: dict[str, Any] = {
        "rollout": config.rollout.model_copy(update={**rollout, "stratify_by": None}),
        # What is drawn without a seed of its own shall not be the same each time.
        "seed": options.seed,
        "overlap": OverlapConfig(),
        "trackers": [],
        "curriculum": None,
        "watch_grader": None,
    }
    if isinstance(config.world, TakesUser):
        changed["world"] = config.world.model_copy(update={"user": None})
    if not options.grades:
        neutral = StringCheckConfig(type="string_check", input="", reference="", operation="eq")
        changed |= {"grader": neutral, "penalties": PenaltiesConfig(), "judge": JudgeConfig()}
    if options.url:
        # It is not started; what it would refuse on this machine is no matter.
        changed["engine"] = EngineConfig()
    return config.model_copy(update=changed)


def _loaded(
    prepared: Prepared,
    log: Path,
    loop: Loop,
    stack: contextlib.ExitStack,
    start_engine: StartEngine | None,
) -> Sampler:
    """The run's engine under the adapter, and the proof that it runs it. What libraries print goes to `log`."""
    from trainer import processes
    from trainer.runs.folder import RunFolder
    from trainer.runs.progress import Progress
    from trainer.session import open_session

    accelerator = processes.start()
    if accelerator.num_processes > 1:
        raise UserError("one talks to one process: start it with python")
    RunFolder.create(prepared.config)
    run = RunFolder.open(prepared.config, rank=0)
    # The engine's processes are out of Ctrl-C's reach, which ends a turn here and would end them; see scripts/chat.py
    # for those that are not forked.
    os.register_at_fork(after_in_child=os.setpgrp)
    with Progress(log, 0) as progress:
        # It stays open when the display has ended.
        session = stack.enter_context(
            open_session(prepared, run, accelerator, progress, loop, start_engine, first_step=0)
        )
    return session.engine


def _found(options: Options, loop: Loop, stack: contextlib.ExitStack) -> tuple[ServedPolicy, str] | None:
    """Asked before anything takes long; None where an engine here is meant."""
    if options.url is None:
        return None
    served = ServedPolicy(options.url, model=options.model, api_key_env=options.api_key_env)
    stack.callback(lambda: loop.run(served.aclose()))
    return served, f"{loop.run(served.find())} at {options.url}"


def _begin(served: ServedPolicy, prepared: Prepared, loop: Loop) -> None:
    first = (*prepared.eval_tasks, *prepared.train_tasks)[0]
    prompt_ids, stops = prepared.chat.open(first.messages), sorted(prepared.chat.stop_token_ids)
    loop.run(served.start(prompt_ids, stop_token_ids=stops, vocabulary=vocabulary_of(prepared.model_path)))
