"""Who may go to the engine: as many episodes as it decodes at once, the earliest first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Iterator

from envs.limits.clocks import stopped_clocks

Rank = tuple[int, int]
"""The step, and the number in it: steps that are asked ahead wait for those that are trained on before."""


class Places:
    """The engine's places. An episode holds one from its admission on, but not while it waits for tools or a user.

    So the engine always has as much to do as it can hold, has no queue of its own in which clocks would run, and
    finishes what it has begun before it begins anew. Which rollouts come of it does not depend on the order: each has
    its own seeds.
    """

    def __init__(self, num_places: int | None) -> None:
        """None: any number."""
        self._num_free = num_places
        self._waiting: list[tuple[Rank, int, asyncio.Future[None]]] = []
        self._numbers: Iterator[int] = itertools.count()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def take(self, rank: Rank) -> None:
        """Wait for one, on nobody's clock; of those who wait the lowest rank is next."""
        if self._num_free is None:
            return
        if self._num_free:
            self._num_free -= 1
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._numbers), given))
        try:
            with stopped_clocks():
                await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        if self._num_free is None:
            return
        while self._waiting:
            *_, given = heapq.heappop(self._waiting)
            if not given.done():
                given.set_result(None)
                return
        self._num_free += 1


class Place:
    """One episode's claim to a place."""

    def __init__(self, places: Places, rank: Rank) -> None:
        self._places = places
        self._rank = rank
        self._is_held = False

    async def take(self) -> None:
        """May be called while it is held."""
        if not self._is_held:
            await self._places.take(self._rank)
            self._is_held = True

    def leave(self) -> None:
        """May be called while it is not held."""
        if self._is_held:
            self._is_held = False
            self._places.give_back()
