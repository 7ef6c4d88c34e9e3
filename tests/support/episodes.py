"""Episodes of the real worker: an engine that writes what it is told, worlds that write down what happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.errors import ToolError, WorldError
from envs.tools import Tool, tool
from envs.types import Episode, Message, Task
from graders.types import Grade
from tests.support.scripted_engine import Writer
from trainer.config import RolloutConfig
from trainer.learning.samples import sample_of
from trainer.rollouts.worker import RolloutWorker
from trainer.templates.chat import Chat
from trainer.types import Rollout, RolloutRequest

TASK = Task(task_id="t", messages=(Message(role="user", content="How much?"),))

CONFIG = RolloutConfig(max_turns=6, max_tool_calls=4, max_turn_tokens=64, max_episode_tokens=900, world_retries=2)

STOP = "<|im_end|>"


@dataclass
class World:
    """Environments with the tools given; writes down what happens to each."""

    tools: dict[str, Tool]
    opened: list[str] = field(default_factory=list)
    closed: list[tuple[str, Episode | None]] = field(default_factory=list)
    on_open: Callable[[str], Any] = lambda rollout_id: None

    def make_env(self) -> Env:
        return Env(self)

    def tasks(self, split: str) -> Sequence[Task]:
        return [TASK]

    def expert_episode(self, task: Task, seed: int) -> Sequence[Any]:
        return ()


class Env:
    def __init__(self, world: World) -> None:
        self._world = world
        self._rollout_id = ""

    @property
    def tools(self) -> Mapping[str, Tool]:
        return self._world.tools

    async def open(self, task: Task, rollout_id: str) -> None:
        assert not self._rollout_id, "an environment is used once"
        self._rollout_id = rollout_id
        self._world.opened.append(rollout_id)
        waiting = self._world.on_open(rollout_id)
        if waiting is not None:
            await waiting

    async def close(self, episode: Episode | None) -> None:
        self._world.closed.append((self._rollout_id, episode))


class LengthGrader:
    def __init__(self) -> None:
        self.graded: list[Episode] = []
        self.failures = 0

    async def grade(self, task: Task, episode: Episode) -> Grade:
        self.graded.append(episode)
        if self.failures:
            self.failures -= 1
            raise WorldError("the judge is out")
        return Grade(reward=1.0, parts={"length": 1.0})


class LiveIds:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def opened(self, rollout_id: str) -> None:
        self.events.append(("opened", rollout_id))

    def closed(self, rollout_id: str) -> None:
        self.events.append(("closed", rollout_id))


executed: list[str] = []


@tool
def echo(text: str) -> str:
    """Say it again.

    Args:
        text: anything
    """
    executed.append(text)
    return f"heard {text}"


@tool
def refuse(text: str) -> str:
    """Never helps.

    Args:
        text: anything
    """
    raise ToolError("not today")


TOOLS = {t.name: t for t in (echo, refuse)}


@dataclass
class Played:
    rollouts: list[Rollout]
    world: World
    engine: Writer
    grader: LengthGrader

    @property
    def rollout(self) -> Rollout:
        (rollout,) = self.rollouts
        return rollout

    @property
    def episode(self) -> Episode:
        return self.rollout.episode


async def play(
    chat: Chat,
    turns: Callable[[str, int], str] | Sequence[str],
    *,
    world: World | None = None,
    task: Task = TASK,
    num_rollouts: int = 1,
    set_up: Callable[[Writer, LengthGrader], None] = lambda engine, grader: None,
    watch_grader: LengthGrader | None = None,
    live: LiveIds | None = None,
    max_num_seqs: int | None = None,
    **settings: Any,
) -> Played:
    world = world or World(dict(TOOLS))
    engine, grader = Writer(chat, turns), LengthGrader()
    set_up(engine, grader)
    config = CONFIG.model_copy(update=settings)
    worker = RolloutWorker(
        world=world,
        grader=grader,
        watch_grader=watch_grader,
        chat=chat,
        engine=engine,
        config=config,
        live=live,
        max_num_seqs=max_num_seqs,
    )
    requests = [RolloutRequest(task=task, rollout_id=f"r{i}", seed=i) for i in range(num_rollouts)]
    played = Played([], world, engine, grader)
    try:
        played.rollouts = await worker.run(requests, temperature=1.0)
    finally:
        # On every path: each environment that was opened is closed, once.
        assert sorted(world.opened) == sorted(rollout_id for rollout_id, _ in world.closed)
    assert_ledgers_hold_what_was_sampled(played)
    return played


def assert_ledgers_hold_what_was_sampled(played: Played) -> None:
    """Invariant 1: every prompt the engine got is a ledger's prefix, and what it sampled follows there, trainable."""
    ledgers = [ledger for rollout in played.rollouts for ledger in rollout.ledgers]
    samples = [sample_of(ledger, advantage=1.0, rollout_id="r", task_id="t") for ledger in ledgers]
    if any(r.num_attempts > 1 for r in played.rollouts):
        return
    num_sampled = 0
    for (prompt, _), completion in zip(played.engine.requests, played.engine.completions, strict=False):
        start, end = len(prompt), len(prompt) + len(completion.token_ids)
        (sample,) = [s for s in samples if list(s.token_ids[:end]) == [*prompt, *completion.token_ids]][:1]
        assert all(sample.trainable[start:end]) and set(sample.versions[start:end]) == {7}
        if len(played.rollouts) == 1:
            assert list(sample.logprobs[start:end]) == completion.logprobs
        num_sampled += len(completion.token_ids)
    # ... and nothing else is trainable: neither prompt nor tool results nor the template's glue.
    assert sum(s.num_trainable for s in samples) == num_sampled
    assert sum(r.episode.num_tokens for r in played.rollouts) == num_sampled


@tool
def note(text: str) -> str:
    """Write it down.

    Args:
        text: anything
    """
    return f"noted {text}"
