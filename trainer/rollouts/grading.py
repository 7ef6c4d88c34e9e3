"""An episode's grading: its limit and its retries. The episode is kept, whatever becomes of its grade."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace

from envs.errors import Unscored, WorldError
from envs.limits.clocks import time_limit
from envs.types import Episode, Task
from graders.types import Grade, Grader, check_numbers

_PAUSE_S = 0.5
"""Before the second try, and twice as long before each further one: who fails at once fails the next moment too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """What came of it."""

    grade: Grade | None = None
    """None where no try gave one."""
    watch: Grade | None = None
    is_unscored: bool = False
    error: str = ""
    """The cause, where there is no grade."""
    num_tries: int = 1


class Grading:
    """Grades episodes, each until it has a grade or the tries are used up."""

    def __init__(self, grader: Grader, watch_grader: Grader | None, *, timeout_s: float, retries: int) -> None:
        """`timeout_s` is of one try; places and engines that the grader waits for do not count in it."""
        self._grader = grader
        self._watch_grader = watch_grader
        self._timeout_s = timeout_s
        self._retries = retries

    async def grade(self, task: Task, episode: Episode) -> Graded:
        """Faults of the grader (`WorldError`, over its time) end in a `Graded` without a grade; bugs are raised.

        A grader that only watches is asked once, and costs nothing where it fails.
        """
        for attempt in range(1 + self._retries):
            if attempt:
                await asyncio.sleep(_PAUSE_S * 2 ** (attempt - 1))
            try:
                grade = await self._try(self._grader, task, episode)
            except Unscored as e:
                return Graded(is_unscored=True, error=f"grader: {e}", num_tries=attempt + 1)
            except WorldError as e:
                graded = Graded(error=f"grader: {e}", num_tries=attempt + 1)
            else:
                return Graded(grade=grade, watch=await self._watch(task, episode), num_tries=attempt + 1)
        return graded

    async def _watch(self, task: Task, episode: Episode) -> Grade | None:
        if self._watch_grader is not None:
            with contextlib.suppress(WorldError):
                return await self._try(self._watch_grader, task, episode)
        return None

    async def _try(self, grader: Grader, task: Task, episode: Episode) -> Grade:
        start = time.perf_counter()
        try:
            async with time_limit(self._timeout_s) as limit:
                grade = await grader.grade(task, episode)
        except TimeoutError:
            if not limit.expired():
                raise
            raise WorldError(f"no grade within {self._timeout_s:g} s (rollout.settle_timeout_s)") from None
        check_numbers(grade, task)
        return replace(grade, latency_s=time.perf_counter() - start)
