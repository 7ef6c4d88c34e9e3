"""A whole run over many trainers and samplers, simulated: what waits for what, and what gives way first.

    python scripts/bench/simulate.py [--trainers 1 16 256] [--samplers 4 64 1024] [--ahead 0 1 2] [--deadline-s 10]

Nothing is computed: an asyncio loop whose clock jumps to the next event plays the episodes. Admission is the run's own
(`trainer.rollouts.admission`, ranks of step and number), and so are the order of submitting and taking steps and the
rule that a turn is sampled under the newest published version. Each trainer is a process that drives its share of the
samplers: one thread for all its turns, as in a run. What the parts cost is given in `COSTS`, each with where it was
measured; tools take a log-normal time with a long tail.

A step is counted by where the trainers' time went: waiting for rollouts (of which *tail*: while less than half of the
samplers' places decode), gathering them, training, publishing; the largest of these gives way first. Where that is
rollouts, places that decode most of the time ask for more samplers, and a large tail for overlap or a deadline.

*Not covered:* prefill, the network between processes, failures, versions that an engine takes time to switch
to. No two samplers differ but by chance.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from common import Figure, parser, report, run_main

from envs.errors import UserError
from trainer.rollouts.admission import Place, Places


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of the parts, seconds."""

    decoding_step_s: float = 0.008
    """Of one token of every live sequence, on a 1.5B; and a little for each (128 at once: 14,400 tokens/s, H200)."""
    decoding_sequence_s: float = 7e-6
    worker_turn_s: float = 0.001
    """Of the process's thread, a turn: RESULTS, "the rollout worker's own time"."""
    trained_token_s: float = 1 / 95_400
    """Of one card, prefix trees (H200, 1.5B)."""
    update_s: float = 0.3
    """What an update takes however small it is (the same)."""
    publish_s: float = 0.83
    """Adapter to the engine, and its proof (H200, 1.5B)."""
    gathered_token_s: float = 0.32e-6
    """To read a token of the other processes' rollouts (pickle of a run's rollouts of 500 tokens, one EPYC core)."""


COSTS = Costs()
PLACES, TURNS, TURN_TOKENS, READ_TOKENS = 32, 5, (20, 180), 1500
"""Of a sampler; of an episode: turns, tokens of each, and what it is long in the end."""
TOOL_S, TOOL_SPREAD = 0.5, 1.2
"""The median of a tool call, and the spread of its logarithm: one in a hundred takes 16 times as long."""


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its clock goes to the next event at once."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everything waits for something that nobody does")
        self._loop.now += max(timeout, 0.0)
        return super().select(0)


@dataclass(slots=True, kw_only=True)
class Process:
    """A trainer's process: its samplers' places, its thread, and what it counts."""

    places: Places
    num_samplers: int
    live: int = 0
    free_at: float = 0.0
    """When the thread is done with what it has."""
    decoded_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Run:
    """What all processes share, and where the trainers' time went."""

    processes: Sequence[Process]
    version: int = 0
    num_cut: int = 0
    staleness: list[int] = field(default_factory=list)
    waits: dict[str, list[float]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    @property
    def share_decoding(self) -> float:
        return sum(p.live for p in self.processes) / sum(p.num_samplers * PLACES for p in self.processes)


async def episode(run: Run, process: Process, rank: tuple[int, int], rng: random.Random) -> None:
    """Turns that hold a place, tools that do not."""
    loop, place, oldest = asyncio.get_running_loop(), Place(process.places, rank), None
    for turn in range(TURNS):
        await place.take()
        version = run.version
        oldest = version if oldest is None else oldest
        process.live += 1
        tokens = rng.randint(*TURN_TOKENS)
        one = COSTS.decoding_step_s + COSTS.decoding_sequence_s * process.live / process.num_samplers
        begun = loop.time()
        try:
            await asyncio.sleep(tokens * one)
        finally:
            process.live -= 1
            process.decoded_s += loop.time() - begun
            place.leave()
        process.free_at = max(process.free_at, loop.time()) + COSTS.worker_turn_s
        await asyncio.sleep(process.free_at - loop.time())
        if turn < TURNS - 1:
            await asyncio.sleep(TOOL_S * rng.lognormvariate(0, TOOL_SPREAD))
    run.staleness.append(rank[0] - 1 - (oldest or 0))


async def simulate(
    num_trainers: int, num_samplers: int, *, ahead: int, num_steps: int, deadline_s: float | None, seed: int = 0
) -> Run:
    """The spine's order: step s + ahead is asked for before s is taken. After the deadline a step's rest is cut off."""
    loop = asyncio.get_running_loop()
    each = num_samplers // num_trainers
    run = Run(processes=[Process(places=Places(each * PLACES), num_samplers=each) for _ in range(num_trainers)])
    asked: dict[int, list[asyncio.Task[None]]] = {}
    size = num_samplers * PLACES

    def submit(step: int) -> None:
        asked[step] = [
            asyncio.create_task(
                episode(run, run.processes[i % num_trainers], (step, i), random.Random(f"{seed}.{step}.{i}"))
            )
            for i in range(size)
        ]

    async def waited(what: str, doing: Any) -> None:
        begun = loop.time()
        await doing
        run.waits.setdefault(what, []).append(loop.time() - begun)

    async def taken(tasks: Sequence[asyncio.Task[None]]) -> None:
        end = loop.time() + (deadline_s or float("inf"))
        tail_s, left = 0.0, set(tasks)
        while left and loop.time() < end:
            begun, is_tail = loop.time(), run.share_decoding < 0.5
            _, left = await asyncio.wait(left, timeout=min(0.25, end - begun))
            tail_s += (loop.time() - begun) * is_tail
        for task in left:
            task.cancel()
        run.num_cut += len(left)
        run.waits.setdefault("tail", []).append(tail_s)

    start = loop.time()
    for step in range(1, num_steps + 1):
        for asked_step in range(len(asked) + 1, min(step + ahead, num_steps) + 1):
            submit(asked_step)
        await waited("rollouts", taken(asked[step]))
        if num_trainers > 1:
            await waited("gathering", asyncio.sleep(size * READ_TOKENS * COSTS.gathered_token_s))
        tokens = size / num_trainers * READ_TOKENS
        await waited("training", asyncio.sleep(COSTS.update_s + tokens * COSTS.trained_token_s))
        await waited("publishing", asyncio.sleep(COSTS.publish_s))
        run.version = step
        run.steps.append(loop.time() - start)
        start = loop.time()
    return run


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--trainers", type=int, nargs="+", default=[1, 16, 256])
    arguments.add_argument("--samplers", type=int, nargs="+", default=[4, 64, 1024], help="one number for each")
    arguments.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2], help="overlap.max_staleness")
    arguments.add_argument("--deadline-s", type=float, help="overlap.deadline_s (default none)")
    arguments.add_argument("--steps", type=int, default=6, help="the first and the last are not counted (default 6)")
    given = arguments.parse_args()
    if len(given.trainers) != len(given.samplers) or any(
        s % t or s < t for t, s in zip(given.trainers, given.samplers, strict=False)
    ):
        raise UserError("--samplers: expected a number for each of --trainers, a multiple of it")
    if given.steps < 3 or min(given.trainers) < 1 or min(given.ahead) < 0:
        raise UserError("--steps, --trainers, --ahead: expected at least 3, 1 and 0")
    figures: list[Figure] = []
    for trainers, samplers in zip(given.trainers, given.samplers, strict=True):
        for ahead in given.ahead:
            begun = time.perf_counter()
            with asyncio.Runner(loop_factory=JumpingLoop) as runner:
                run = runner.run(
                    simulate(trainers, samplers, ahead=ahead, num_steps=given.steps, deadline_s=given.deadline_s)
                )
            figures += figures_of(run, f"{trainers}/{samplers}, {ahead} ahead")
            print(f"simulated in {time.perf_counter() - begun:.0f} s", flush=True)
    report("Simulation", figures, about={"costs": str(COSTS)}, json_path=given.json)


def figures_of(run: Run, name: str) -> list[Figure]:
    """Prints them as a row, too. Raises `UserError` where no rollout ended."""
    if not run.staleness:
        raise UserError(f"--deadline-s: with {name} no rollout ends in time; expected a longer one")
    inner = slice(1, -1)
    step_s = mean(run.steps[inner])
    shares = {what: mean(values[inner]) / step_s for what, values in run.waits.items()}
    first = max((what for what in shares if what != "tail"), key=lambda what: shares[what])
    num_places = sum(p.num_samplers * PLACES for p in run.processes)
    decoding = sum(p.decoded_s for p in run.processes) / num_places / sum(run.steps)
    told = ", ".join(f"{what} {share:.2f}" for what, share in shares.items())
    print(f"{name}: {step_s:.1f} s a step; trainers at {told}; places decode {decoding:.2f}; first: {first}")
    return [
        Figure(name=f"{name}: step", unit="s", values=run.steps[inner]),
        Figure(name=f"{name}: places decoding", unit="share", values=[decoding]),
        *(Figure(name=f"{name}: trainers at {what}", unit="share", values=[share]) for what, share in shares.items()),
        Figure(name=f"{name}: age of a rollout's first token", unit="steps", values=[mean(run.staleness)]),
        Figure(name=f"{name}: rollouts cut off", unit="share", values=[run.num_cut / num_places / len(run.steps)]),
    ]


if __name__ == "__main__":
    run_main(main)
