"""What stands before the engine: an end to every wait for it, and a gate at which turns wait for new weights.

An engine that hangs ends the run: while it is asked for something, it has to answer something. What waits for the
engine is on no episode's clock, so nothing else would end the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from envs.errors import EngineHungError
from envs.limits.clocks import time_limit
from trainer.engines.engine import Completion, Engine, EngineStart, KeepsBase, Sampling, Sleeps, keeps_versions

_T = TypeVar("_T")


class WatchedEngine:
    """The engine given, with an end to every wait for it.

    Covered: each answer, to whatever request, gives all open requests the whole limit anew, so that a long queue is no
    fault; the time in which this process stood still or was busy does not count. Not covered: the engine's start, which
    has limits of vLLM's own; an engine that answers some and never others, unless nothing else is asked for.
    """

    def __init__(self, engine: Engine, *, limit_s: float) -> None:
        """`limit_s`: the longest time without any answer while one is waited for, seconds."""
        self.engine = engine
        self._limit_s = limit_s
        self._num_answers = 0
        self._may_begin = asyncio.Event()
        self._may_begin.set()
        self._have_ended = asyncio.Event()
        self._num_turns = self._num_held = 0
        self._version: int | None = None

    @property
    def runs_here(self) -> bool:
        return self.engine.runs_here

    @property
    def publishes_merged(self) -> bool:
        return self.engine.publishes_merged

    async def start(self, given: EngineStart) -> None:
        await self.engine.start(given)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        return await self._at_the_gate("a turn", lambda: self.engine.generate(prompt_ids, sampling))

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return await self._answered("log-probabilities", self.engine.score(token_ids))

    async def publish(self, weights: Path, version: int) -> None:
        await self._answered("the loading of new weights", self.engine.publish(weights, version))
        self._version = version

    async def sleep(self) -> None:
        """Nothing where the engine can't."""
        if isinstance(self.engine, Sleeps):
            await self._answered("its sleep", self.engine.sleep())

    async def wake_up(self) -> None:
        if isinstance(self.engine, Sleeps):
            await self._answered("its awakening", self.engine.wake_up())

    async def generate_base(self, prompt_ids: Sequence[int], **how: Any) -> list[int]:
        """As `KeepsBase` has it; only where the engine is one."""
        assert isinstance(self.engine, KeepsBase)
        engine = self.engine
        return await self._at_the_gate("the base model's words", lambda: engine.generate_base(prompt_ids, **how))

    def shutdown(self) -> None:
        self.engine.shutdown()

    def gauges(self) -> dict[str, float]:
        """How it is at the moment."""
        told: dict[str, float] = {"turns_in_flight": self._num_turns, "turns_held": self._num_held}
        return told | ({} if self._version is None else {"policy_version": self._version})

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """No turn begins in the body. Those under way end before it, or go on where the engine keeps their version.

        After an error in the body they are held for good: which weights they would be sampled with is not known.
        """
        self._may_begin.clear()
        while self._num_turns and not keeps_versions(self.engine):
            self._have_ended.clear()
            await self._have_ended.wait()
        yield
        self._may_begin.set()

    async def _at_the_gate(self, what: str, ask: Callable[[], Awaitable[_T]]) -> _T:
        self._num_held += 1
        try:
            while not self._may_begin.is_set():
                await self._may_begin.wait()
        finally:
            self._num_held -= 1
        self._num_turns += 1
        try:
            return await self._answered(what, ask())
        finally:
            self._num_turns -= 1
            if not self._num_turns:
                self._have_ended.set()

    async def _answered(self, what: str, answer: Awaitable[_T]) -> _T:
        try:
            async with time_limit(self._limit_s, renewals=lambda: self._num_answers) as clock:
                answered = await answer
        except TimeoutError:
            if not clock.expired():
                raise
            raise EngineHungError(
                f"the engine was asked for {what} and has answered nothing for {self._limit_s:g} s "
                "(engine.hung_after_s); its log says more with VLLM_LOGGING_LEVEL=INFO. Start the same command again: "
                "the run goes on where its last checkpoint stands"
            ) from None
        self._num_answers += 1
        return answered
