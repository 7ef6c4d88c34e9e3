"""Rollouts: all of a step at once, each an episode with its retries and its grade.

Every episode is a coroutine of its own. The engine batches whatever turns are ready, so an episode that waits for a
tool never holds up the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from envs.base import Env, World
from envs.errors import WorldError, first_error
from envs.limits.clocks import time_limit
from envs.limits.threads import let_loop_end
from envs.secrets import hidden_in
from envs.state import read_state
from envs.types import Episode, StopReason
from envs.users import Users
from graders.types import Grader
from trainer.config import RolloutConfig
from trainer.engines.engine import Sampler
from trainer.rollouts.admission import Place, Places
from trainer.rollouts.episode import Player
from trainer.rollouts.grading import Graded, Grading
from trainer.rollouts.live import Live
from trainer.templates.chat import Chat
from trainer.types import LiveRollouts, Rollout, RolloutRequest, completion_ids


@dataclass(slots=True)
class Flight:
    """The rollouts of one `run` while they are under way."""

    step: int = 0
    """Those of earlier steps come first."""
    tasks: list[asyncio.Task[Rollout]] = field(default_factory=list)
    is_cut: bool = False

    def cut(self) -> None:
        """End those that are not done, as far as they have come; of those that only close their environment nothing
        is lost."""
        self.is_cut = True
        for task in self.tasks:
            task.cancel()


class RolloutWorker:
    """Runs episodes of one world on one engine. Holds nothing of any single episode."""

    def __init__(
        self,
        *,
        world: World,
        grader: Grader,
        chat: Chat,
        engine: Sampler,
        config: RolloutConfig,
        users: Users | None = None,
        watch_grader: Grader | None = None,
        live: LiveRollouts | None = None,
        max_num_seqs: int | None = None,
        pins_version: bool = False,
        on_turn: Callable[[Live], None] = lambda live: None,
    ) -> None:
        """`max_num_seqs`: how many turns the engine decodes at once; None: any number. The last two: as `Player`."""
        self._grading = Grading(grader, watch_grader, timeout_s=config.settle_timeout_s, retries=config.world_retries)
        self._live = live
        self._places = Places(max_num_seqs)
        self._config = config
        self._num_in_flight = 0
        self._player = Player(
            world=world,
            chat=chat,
            engine=engine,
            config=config,
            users=users,
            pins_version=pins_version,
            on_turn=on_turn,
        )

    def gauges(self) -> dict[str, float]:
        """How it is at the moment."""
        return {"rollouts_in_flight": self._num_in_flight, "rollouts_waiting": self._places.num_waiting}

    async def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        on_rollout: Callable[[Rollout], None] = lambda rollout: None,
        flight: Flight | None = None,
    ) -> list[Rollout]:
        """All rollouts, as the engine has room for them; the result is in the order of the requests.

        `on_rollout` is called as each one finishes; `flight` is a new one, by which they can be cut off. An error that
        is neither the model's nor the world's cancels the others, closes their environments and is raised. Several may
        go on at once.
        """
        let_loop_end()
        flight = flight or Flight()

        async def one(number: int, request: RolloutRequest) -> Rollout:
            attempts: list[Live] = []
            try:
                place = Place(self._places, (flight.step, number))
                rollout = await self._with_retries(request, temperature, place, attempts, flight)
            except asyncio.CancelledError:
                if not flight.is_cut:
                    raise
                rollout = _cut_off(request, attempts)
            on_rollout(rollout)
            return rollout

        async with first_error(), asyncio.TaskGroup() as group:
            flight.tasks += [group.create_task(one(i, r)) for i, r in enumerate(requests)]
        return [t.result() for t in flight.tasks]

    async def _with_retries(
        self, request: RolloutRequest, temperature: float, place: Place, attempts: list[Live], flight: Flight
    ) -> Rollout:
        """`attempts` holds what there is of each, the newest last."""
        for attempt in range(1 + self._config.world_retries):
            rollout_id = request.rollout_id if attempt == 0 else f"{request.rollout_id}-retry{attempt}"
            try:
                # Admitted: what comes before is no part of the episode.
                await place.take()
                live = Live(request=request, rollout_id=rollout_id, place=place, messages=list(request.task.messages))
                attempts.append(live)
                rollout = await self._attempt(live, temperature, flight)
            finally:
                place.leave()
            if flight.is_cut or rollout.episode.stop_reason is not StopReason.WORLD_FAULT:
                break
        return replace(rollout, unclosed=_unclosed(attempts), num_attempts=rollout.num_attempts + attempt)

    async def _attempt(self, live: Live, temperature: float, flight: Flight) -> Rollout:
        """One episode and its grading, in an environment of its own."""
        episode: Episode | None = None
        graded = Graded()
        self._num_in_flight += 1
        if self._live:
            self._live.opened(live.rollout_id)
        try:
            episode = await self._episode(live, temperature)
            if episode.stop_reason is not StopReason.WORLD_FAULT:
                graded = await self._grading.grade(live.request.task, episode)
                episode = replace(episode, error=graded.error)
        finally:
            live.place.leave()
            self._num_in_flight -= 1
            await self._closed(live, episode, flight)
        return Rollout(
            episode=episode,
            task=live.request.task,
            ledgers=tuple(live.ledgers),
            grade=graded.grade,
            watch=graded.watch,
            is_unscored=graded.is_unscored,
            num_drifted_turns=live.num_drifted_turns,
            num_attempts=graded.num_tries,
        )

    async def _episode(self, live: Live, temperature: float) -> Episode:
        """What was played, and the state in which it left the environment."""
        start = time.perf_counter()
        stop, error = await self._player.play(live, temperature)
        live.place.leave()
        state: dict[str, Any] = {}
        if stop is not StopReason.WORLD_FAULT:
            try:
                state = await read_state(live.env, timeout_s=self._config.tool_timeout_s)
            except WorldError as e:
                stop, error = StopReason.WORLD_FAULT, str(e)
        return Episode(
            rollout_id=live.rollout_id,
            task_id=live.request.task.task_id,
            messages=tuple(live.messages),
            turns=tuple(live.turns),
            stop_reason=stop,
            error=error,
            state=state,
            latency_s=time.perf_counter() - start,
            completion_ids=completion_ids(live.ledgers),
        )

    async def _closed(self, live: Live, episode: Episode | None, flight: Flight) -> None:
        """To its end though it be cancelled meanwhile. What did not close stays noted as open, for the next start."""
        closing = asyncio.ensure_future(self._close(live, episode))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await closing
            if not flight.is_cut:
                raise

    async def _close(self, live: Live, episode: Episode | None) -> None:
        live.unclosed = await self._why_unclosed(live.env, episode)
        if self._live and not live.unclosed:
            self._live.closed(live.rollout_id)

    async def _why_unclosed(self, env: Env, episode: Episode | None) -> str:
        """Empty where it closed. The rollout is over, and nothing that fails here may cost it."""
        limit_s = min(self._config.settle_timeout_s, self._config.episode_timeout_s)
        try:
            async with time_limit(limit_s) as limit:
                await env.close(episode)
        except Exception as e:
            if isinstance(e, TimeoutError) and limit.expired():
                return f"close: not done within {limit_s:g} s"
            return f"close: {type(e).__name__}: {hidden_in(str(e))}".removesuffix(": ")
        return ""


def _cut_off(request: RolloutRequest, attempts: Sequence[Live]) -> Rollout:
    """What there is of it; nothing but the prompt where it was not admitted."""
    live = attempts[-1] if attempts else None
    ledgers = tuple(live.ledgers) if live else ()
    episode = Episode(
        rollout_id=live.rollout_id if live else request.rollout_id,
        task_id=request.task.task_id,
        messages=tuple(live.messages if live else request.task.messages),
        turns=tuple(live.turns) if live else (),
        stop_reason=StopReason.DEADLINE,
        error="not done when the step had waited overlap.deadline_s for it",
        completion_ids=completion_ids(ledgers),
    )
    return Rollout(
        episode=episode,
        task=request.task,
        ledgers=ledgers,
        grade=None,
        num_attempts=max(1, len(attempts)),
        unclosed=_unclosed(attempts),
    )


def _unclosed(attempts: Sequence[Live]) -> tuple[str, ...]:
    return tuple(live.unclosed for live in attempts if live.unclosed)
