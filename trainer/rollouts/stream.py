"""Rollouts that are asked for and taken in order, over all processes, and written to disk as they finish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from envs.base import Sweeps, World
from envs.errors import WorldError
from envs.limits.clocks import time_limit
from envs.limits.loops import Loop
from envs.user_code import looked_at
from trainer import processes
from trainer.rollouts.collect import warn_of_unclosed
from trainer.rollouts.worker import Flight, RolloutWorker
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress
from trainer.types import Kind, Metrics, Phase, Rollout, RolloutRequest

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(slots=True, kw_only=True, eq=False)
class _Part:
    """What has been asked for of one step."""

    kind: Kind
    requests: Sequence[RolloutRequest]
    mine: Sequence[RolloutRequest]
    """Of them this process's share."""
    finished: dict[str, Rollout]
    """By rollout id; until it is done those of an interrupted run."""
    read: frozenset[str]
    """What of them an interrupted run had finished."""
    flight: Flight
    num_done: int
    running: asyncio.Task[None] = field(init=False)


class RolloutStream:
    """Splits requests over the processes, each with its own engine, and brings all rollouts to every process.

    What is asked for goes on while nobody waits for it where the loop does (`envs.limits.loops.LoopThread`); on
    another it is rolled out when it is taken. Each rollout is written to the folder of its kind when it finishes, and
    what an interrupted run has written there is read and not rolled out again.
    """

    def __init__(
        self,
        run: RunFolder,
        worker: RolloutWorker,
        accelerator: Accelerator,
        progress: Progress,
        loop: Loop,
        *,
        deadline_s: float | None = None,
    ) -> None:
        """`deadline_s`: how long a step of training is waited for when it is taken; what is left is cut off then."""
        self._run = run
        self._worker = worker
        self._accelerator = accelerator
        self._progress = progress
        self._loop = loop
        self._deadline_s = deadline_s
        self._parts: dict[tuple[Kind, int], _Part] = {}
        self._taken: _Part | None = None
        self._num_running = 0
        self._idle_since: float | None = None
        """When the last of what had been asked for was done; None before the first."""
        self._waited_s = {"rollouts": 0.0, "trainer": 0.0}
        self._num_sampled_tokens = 0

    def is_asked(self, kind: Kind, step: int) -> bool:
        """Whether it has been submitted and not been taken."""
        return (kind, step) in self._parts

    def submit(self, kind: Kind, step: int, requests: Sequence[RolloutRequest], *, temperature: float) -> None:
        """Ask for the rollouts of a step, in the same order on every process."""
        mine = requests[self._accelerator.process_index :: self._accelerator.num_processes]
        finished = self._run.finished_rollouts(kind, step)
        missing = [r for r in mine if r.rollout_id not in finished]
        part = _Part(
            kind=kind,
            requests=requests,
            mine=mine,
            finished=finished,
            read=frozenset(finished),
            flight=Flight(step=step),
            num_done=len(mine) - len(missing),
        )
        self._parts[kind, step] = part
        self._loop.run(self._begin(part, missing, temperature))

    def take(self, kind: Kind, step: int, phase: Phase) -> list[Rollout]:
        """All rollouts of the step, in the order in which they were asked for, on every process. Raises what they did.

        The progress shows it as `phase`.
        """
        part = self._parts[kind, step]
        self._progress.phase(phase, total=len(part.requests))
        start = time.perf_counter()
        self._loop.run(self._finish(part))
        if kind is Kind.TRAIN:
            self._waited_s["rollouts"] += time.perf_counter() - start
        del self._parts[kind, step]
        told = processes.gather(
            [(r.rollout_id, part.finished[r.rollout_id], r.rollout_id in part.read) for r in part.mine]
        )
        if kind is Kind.TRAIN:
            self._num_sampled_tokens += sum(rollout.episode.num_tokens for _, rollout, is_read in told if not is_read)
        everyone = {rollout_id: rollout for rollout_id, rollout, _ in told}
        rollouts = [everyone[r.rollout_id] for r in part.requests]
        warn_of_unclosed(rollouts, self._progress)
        return rollouts

    def close(self) -> None:
        """End what nobody will take; its environments are closed."""
        self._loop.run(self._cancel())

    def take_num_sampled_tokens(self) -> int:
        """Of the training rollouts that were taken since the last call, without those of an interrupted run."""
        taken, self._num_sampled_tokens = self._num_sampled_tokens, 0
        return taken

    def take_metrics(self) -> Metrics:
        """How long the trainer waited for rollouts, and this process's engine for the trainer, since the last call."""
        self._note_idle()
        waited = {f"time/waiting_for_{side}_s": seconds for side, seconds in self._waited_s.items()}
        self._waited_s = dict.fromkeys(self._waited_s, 0.0)
        return waited

    def gauges(self) -> dict[str, float]:
        """How it is at the moment, of this process's share."""
        return {"rollouts_asked": sum(len(part.mine) - part.num_done for part in list(self._parts.values()))}

    # ---- on the loop

    async def _begin(self, part: _Part, missing: Sequence[RolloutRequest], temperature: float) -> None:
        part.running = asyncio.create_task(self._roll_out(part, missing, temperature))

    async def _roll_out(self, part: _Part, missing: Sequence[RolloutRequest], temperature: float) -> None:
        def keep(rollout: Rollout) -> None:
            self._run.keep_rollout(part.kind, part.flight.step, rollout)
            part.num_done += 1
            if self._taken is part:
                self._progress.advance(1, tokens=rollout.episode.num_tokens)

        self._note_idle()
        self._num_running += 1
        try:
            new = await self._worker.run(missing, temperature=temperature, on_rollout=keep, flight=part.flight)
        finally:
            self._num_running -= 1
            self._idle_since = time.perf_counter()
        part.finished |= {request.rollout_id: rollout for request, rollout in zip(missing, new, strict=True)}

    def _note_idle(self) -> None:
        """Count until now."""
        if not self._num_running and self._idle_since is not None:
            now = time.perf_counter()
            self._waited_s["trainer"] += now - self._idle_since
            self._idle_since = now

    async def _finish(self, part: _Part) -> None:
        self._progress.advance(part.num_done)
        self._taken = part
        try:
            limit_s = self._deadline_s if part.kind is Kind.TRAIN else None
            done, _ = await asyncio.wait({part.running}, timeout=limit_s)
            if not done:
                part.flight.cut()
            await part.running
        finally:
            self._taken = None

    async def _cancel(self) -> None:
        running = [part.running for part in self._parts.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def release_left_open(world: World, run: RunFolder, progress: Progress, loop: Loop, *, timeout_s: float) -> None:
    """Let the world release what rollouts of this run hold that a kill left open. Every process of the run calls it.

    A fault of the world (`WorldError`, over its time) is told, and the run goes on. Raises `UserError` on all of them
    for what else `sweep` raises, and for a damaged record of what is open.
    """
    processes.from_main(lambda: loop.run(_release(world, run, progress, timeout_s=timeout_s)))


async def _release(world: World, run: RunFolder, progress: Progress, *, timeout_s: float) -> None:
    left_open = run.left_open()
    if left_open and isinstance(world, Sweeps):
        progress.say(f"releasing {len(left_open)} rollouts that an earlier process left open")
        told = f"{len(left_open)} rollouts that an earlier process left open could not be released"
        try:
            async with time_limit(timeout_s):
                with looked_at("world: sweep()"):
                    await world.sweep(left_open)
        except TimeoutError:
            progress.warn(f"{told} in time")
        except WorldError as e:
            progress.warn(f"{told}: {e}")
    run.forget_left_open()
