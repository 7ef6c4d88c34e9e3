"""Rollouts asked for ahead: the earlier step first, a straggler cut off, and weights that change between turns."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from envs.errors import PublishError
from envs.limits.loops import LoopThread
from envs.tools import Tool, tool
from envs.types import Episode, Message, StopReason, Task
from graders.types import Grade
from tests.support.episodes import CONFIG, TASK, TOOLS, Env, LengthGrader, World
from tests.support.run_server import lines
from tests.support.scripted_engine import Writer, call
from trainer.config import OverlapConfig, RolloutConfig, RunConfig
from trainer.engines.engine import Completion, Sampling
from trainer.engines.watched import WatchedEngine
from trainer.measures.masked import Masked, masked_by
from trainer.rollouts.collect import fresh_samples, to_samples
from trainer.rollouts.stream import RolloutStream
from trainer.rollouts.worker import RolloutWorker
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.templates.chat import Chat
from trainer.types import Kind, Ledger, Phase, Rollout, RolloutRequest


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate({"output_dir": str(tmp_path / "run"), "grader": {"type": "numeric"}})


@contextlib.contextmanager
def open_stream(config: RunConfig, worker: RolloutWorker, **how: float) -> Iterator[RolloutStream]:
    RunFolder.create(config)
    alone = SimpleNamespace(process_index=0, num_processes=1)
    with LoopThread() as loop:
        run = RunFolder.open(config, rank=0)
        stream = RolloutStream(run, worker, alone, Progress(None, 0, show=False), loop, **how)
        try:
            yield stream
        finally:
            stream.close()


def requests(step: int, *texts: str) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            task=Task(task_id=text, messages=(Message(role="user", content=text),)), rollout_id=f"s{step}-{i}", seed=i
        )
        for i, text in enumerate(texts)
    ]


def make_worker(chat: Chat, engine: object, tools: dict[str, Tool] | None = None, **how: object) -> RolloutWorker:
    return RolloutWorker(
        world=World(tools or {}), grader=LengthGrader(), chat=chat, engine=engine, config=CONFIG, **how
    )


def test_a_step_that_is_asked_for_ahead_waits_for_the_one_before_and_goes_on_while_nobody_waits(chat, config):
    order: list[str] = []

    def script(prompt: str, seed: int) -> str:
        order.append("first" if "first" in prompt else "ahead")
        return "42"

    engine = Writer(chat, script)
    engine.before_turn = lambda number: asyncio.sleep(0.01)
    with open_stream(config, make_worker(chat, engine, max_num_seqs=1)) as stream:
        stream.submit(Kind.TRAIN, 1, requests(1, *["first"] * 4), temperature=1.0)
        stream.submit(Kind.TRAIN, 2, requests(2, *["ahead"] * 2), temperature=1.0)
        first = stream.take(Kind.TRAIN, 1, Phase.ROLLOUTS)
        ahead = stream.take(Kind.TRAIN, 2, Phase.ROLLOUTS)
        waited = stream.take_metrics()
    assert order == ["first"] * 4 + ["ahead"] * 2
    assert [r.episode.rollout_id for r in first] == [f"s1-{i}" for i in range(4)]
    assert [r.episode.rollout_id for r in ahead] == ["s2-0", "s2-1"]
    assert waited["time/waiting_for_rollouts_s"] > waited["time/waiting_for_trainer_s"]
    assert len(lines(config.output_dir / "rollouts" / "step-000002.jsonl")) == 2


def test_a_straggler_is_cut_off_as_far_as_it_has_come_and_masked(chat, config):
    @tool
    async def wait(text: str) -> str:
        """Never answers.

        Args:
            text: any
        """
        await asyncio.sleep(3600)
        return text

    def script(prompt: str, seed: int) -> str:
        return call("wait", text="x") if "slow" in prompt else "42"

    worker = make_worker(chat, Writer(chat, script), {"wait": wait}, max_num_seqs=1)
    with open_stream(config, worker, deadline_s=1) as stream:
        stream.submit(Kind.TRAIN, 1, requests(1, "slow", "quick", "quick"), temperature=1.0)
        slow, *quick = stream.take(Kind.TRAIN, 1, Phase.ROLLOUTS)
    assert [r.episode.stop_reason for r in quick] == [StopReason.ANSWERED] * 2
    assert slow.episode.stop_reason is StopReason.DEADLINE and masked_by(slow) is Masked.DEADLINE
    assert slow.grade is None and len(slow.episode.turns) == 1 and slow.ledgers[0].num_trainable
    written = lines(config.output_dir / "rollouts" / "step-000001.jsonl")
    assert written[-1]["episode"]["stop_reason"] == "deadline" and len(written) == 3
    samples, _ = to_samples([slow, *quick], config.model_copy(update={"rollout": RolloutConfig(group_size=3)}))
    assert {sample.rollout_id for sample in samples} <= {"s1-1", "s1-2"}


def test_a_rollout_that_has_only_to_close_at_the_deadline_keeps_its_grade_and_closes(chat, config):
    class Slow(Env):
        async def close(self, episode: Episode | None) -> None:
            await asyncio.sleep(1.5)
            await super().close(episode)

    class SlowWorld(World):
        def make_env(self) -> Env:
            return Slow(self)

    world = SlowWorld({})
    worker = RolloutWorker(
        world=world, grader=LengthGrader(), chat=chat, engine=Writer(chat, lambda prompt, seed: "42"), config=CONFIG
    )
    with open_stream(config, worker, deadline_s=1) as stream:
        stream.submit(Kind.TRAIN, 1, requests(1, "a"), temperature=1.0)
        (rollout,) = stream.take(Kind.TRAIN, 1, Phase.ROLLOUTS)
    assert rollout.episode.stop_reason is StopReason.ANSWERED and rollout.reward == 1.0 and not rollout.unclosed
    assert world.closed == [("s1-0", rollout.episode)]


def test_an_environment_that_does_not_close_is_told_of_a_rollout_that_is_cut_off_too(chat, config):
    class Clinging(Env):
        async def close(self, episode: Episode | None) -> None:
            raise OSError("the container still runs")

    class Clingy(World):
        def make_env(self) -> Env:
            return Clinging(self)

    engine = Writer(chat, lambda prompt, seed: "42")
    engine.before_turn = lambda number: asyncio.sleep(3600)
    worker = RolloutWorker(world=Clingy({}), grader=LengthGrader(), chat=chat, engine=engine, config=CONFIG)
    with open_stream(config, worker, deadline_s=0.05) as stream:
        stream.submit(Kind.TRAIN, 1, requests(1, "a"), temperature=1.0)
        (rollout,) = stream.take(Kind.TRAIN, 1, Phase.ROLLOUTS)
    assert rollout.episode.stop_reason is StopReason.DEADLINE
    assert rollout.unclosed == ("close: OSError: the container still runs",)


def test_the_engine_waits_for_the_trainer_in_the_step_in_which_it_waits(chat, config):
    with open_stream(config, make_worker(chat, Writer(chat, lambda prompt, seed: "42"))) as stream:
        waited = []
        for step, training_s in ((1, 0.2), (2, 0.0)):
            stream.submit(Kind.TRAIN, step, requests(step, "a"), temperature=1.0)
            stream.take(Kind.TRAIN, step, Phase.ROLLOUTS)
            time.sleep(training_s)
            waited.append(stream.take_metrics()["time/waiting_for_trainer_s"])
    assert waited[0] >= 0.2 > waited[1]


def test_what_an_interrupted_run_has_sampled_is_taken_and_not_counted_as_sampled_now(chat, config):
    asked = requests(1, "a", "b")
    with open_stream(config, make_worker(chat, Writer(chat, lambda prompt, seed: "42"))) as stream:
        stream.submit(Kind.TRAIN, 1, asked[:1], temperature=1.0)
        (first,) = stream.take(Kind.TRAIN, 1, Phase.ROLLOUTS)
        assert stream.take_num_sampled_tokens() == first.episode.num_tokens > 0
    with open_stream(config, make_worker(chat, Writer(chat, lambda prompt, seed: "forty-two"))) as stream:
        stream.submit(Kind.TRAIN, 1, asked, temperature=1.0)
        again, second = stream.take(Kind.TRAIN, 1, Phase.ROLLOUTS)
        assert again == first and stream.take_num_sampled_tokens() == second.episode.num_tokens > 0
        assert stream.take_num_sampled_tokens() == 0


def test_what_nobody_takes_is_ended_and_closed(chat, config):
    engine = Writer(chat, lambda prompt, seed: "42")
    engine.before_turn = lambda number: asyncio.sleep(3600)
    world = World({})
    worker = RolloutWorker(world=world, grader=LengthGrader(), chat=chat, engine=engine, config=CONFIG)
    with open_stream(config, worker) as stream:
        stream.submit(Kind.TRAIN, 1, requests(1, "a", "b"), temperature=1.0)
        while len(engine.requests) < 2:
            time.sleep(0.01)
    assert sorted(world.closed) == [("s1-0", None), ("s1-1", None)]


class Versions:
    """An engine whose turns end when they are told to; it says of each under which version it began."""

    runs_here = True
    publishes_merged = False

    def __init__(self, *, keeps_versions: bool) -> None:
        self.keeps_versions = keeps_versions
        self.version = 0
        self.may_end = asyncio.Event()

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Completion:
        version = self.version if sampling.version is None else sampling.version
        await self.may_end.wait()
        return Completion(token_ids=[2], logprobs=[0.0], finished=True, policy_version=version)


@pytest.mark.parametrize("keeps_versions", [False, True])
async def test_weights_change_between_turns_or_beside_them_where_the_engine_keeps_their_version(keeps_versions):
    engine = Versions(keeps_versions=keeps_versions)
    watched, sampling = WatchedEngine(engine, limit_s=60), Sampling(max_tokens=1, temperature=1, top_p=1, seed=0)
    under_way = asyncio.create_task(watched.generate([1], sampling))
    await asyncio.sleep(0)
    later: list[asyncio.Task[Completion]] = []

    async def publish() -> None:
        async with watched.held():
            assert under_way.done() is not keeps_versions
            later.append(asyncio.create_task(watched.generate([1], sampling)))
            await asyncio.sleep(0.01)
            engine.version = 1

    publishing = asyncio.create_task(publish())
    await asyncio.sleep(0.01)
    assert publishing.done() is False
    if keeps_versions:
        async with asyncio.timeout(30):
            await publishing
    engine.may_end.set()
    async with asyncio.timeout(30):
        await publishing
        assert (await under_way).policy_version == 0 and (await later[0]).policy_version == 1


async def test_after_a_publish_that_was_not_proved_no_turn_begins():
    engine = Versions(keeps_versions=False)
    engine.may_end.set()
    watched = WatchedEngine(engine, limit_s=60)
    with pytest.raises(PublishError):
        async with watched.held():
            raise PublishError("another policy")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await watched.generate([1], Sampling(max_tokens=1, temperature=1, top_p=1, seed=0))


@pytest.mark.parametrize("pins_version", [False, True])
async def test_the_next_turn_takes_the_newest_weights_unless_the_episode_is_pinned(chat, pins_version):
    asked: list[int | None] = []

    class Moving(Writer):
        async def generate(self, prompt_ids, sampling):
            asked.append(sampling.version)
            return await super().generate(prompt_ids, sampling)

    engine = Moving(chat, [call("echo", text="a"), "42"])
    (rollout,) = await make_worker(chat, engine, TOOLS, pins_version=pins_version).run(
        requests(1, "a"), temperature=1.0
    )
    assert len(rollout.episode.turns) == 2
    assert asked == [None, 7 if pins_version else None]


def _rollout(version: int, reward: float) -> Rollout:
    ledger = Ledger()
    ledger.append_context([1])
    ledger.append_sampled([2, 3], [-0.1, -0.2], version, turn=0)
    episode = Episode(
        rollout_id=f"r{version}-{reward}", task_id="t", messages=(), turns=(), stop_reason=StopReason.ANSWERED
    )
    return Rollout(episode=episode, task=TASK, ledgers=(ledger,), grade=Grade(reward=reward))


def test_staleness_is_counted_in_updates_and_its_bound_in_steps(config):
    config = config.model_copy(
        update={
            "rollout": RolloutConfig(group_size=2),
            "overlap": OverlapConfig(max_staleness=1),
            "optim": config.optim.model_copy(update={"minibatches": 2}),
        }
    )
    samples, _ = to_samples([_rollout(version, reward) for version in (8, 7, 6, 5) for reward in (0.0, 1.0)], config)
    fresh, metrics = fresh_samples(samples, config, version=8)
    assert {v for sample in fresh for v in sample.versions if v >= 0} == {8, 7, 6}
    assert metrics == {"staleness/mean": 1, "staleness/max": 2, "staleness/dropped": 2}
    at_once = config.model_copy(update={"overlap": OverlapConfig()})
    assert fresh_samples(samples, at_once, version=8) == (samples, {})
