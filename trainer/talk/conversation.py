"""A conversation is one episode whose user is a person: the rollout worker plays it, and a queue tells what happens.

Two threads: the episode is on the loop's, the person's is the one that reads `next`.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Sequence
from dataclasses import dataclass

from envs.errors import Unscored
from envs.limits.clocks import stopped_clocks
from envs.types import Episode, Message, Task
from envs.users import Exchange
from graders.types import Grade, Grader
from trainer.engines.engine import Completion, Sampler, Sampling
from trainer.rollouts.live import Live
from trainer.rollouts.worker import RolloutWorker
from trainer.seeds import derive_seed
from trainer.talk.agent import Agent
from trainer.types import Rollout, RolloutRequest


@dataclass(frozen=True, slots=True)
class Said:
    """By the model, by a tool, or to a call that did not parse."""

    message: Message


@dataclass(frozen=True, slots=True)
class YourTurn:
    """The model waits for the person."""

    num_tokens: int
    """That it has generated in all."""
    was_interrupted: bool


@dataclass(frozen=True, slots=True)
class Over:
    """The episode has ended, by the person's wish or for a reason that it names."""

    rollout: Rollout


Event = Said | YourTurn | Over


class Conversation:
    """Begins when it is made. Call all of it from one thread, not the loop's."""

    def __init__(self, agent: Agent, task: Task, *, number: int) -> None:
        self._agent = agent
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._answer: asyncio.Future[str | None] | None = None
        self._num_told = len(task.messages)
        self._sampler = _Interruptible(agent.sampler, sorted(agent.prepared.chat.stop_token_ids)[0])
        self._was_interrupted = False
        request = RolloutRequest(task=task, rollout_id=f"chat-{number}", seed=derive_seed(agent.seed, "chat", number))
        self._task = agent.loop.run(self._begin(request))

    def next(self) -> Event:
        """Waits for it. Raises what ended the episode where that is a fault of ours, or of what the user wrote."""
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def say(self, text: str | None) -> None:
        """At `YourTurn`; None ends the conversation, after which `Over` follows."""
        self._agent.loop.run(self._set(text))

    def interrupt(self) -> None:
        """End the turn: what the model is writing is dropped; a tool that runs is waited for, as in training."""
        self._agent.loop.run(self._interrupt())

    def end(self) -> None:
        """At once, whatever is going on; its environment is closed."""
        self._agent.loop.run(self._cancel())

    async def reply(self, exchange: Exchange) -> str | None:
        """The person's words, in the place of a simulated user's; on no episode's clock."""
        self._answer = asyncio.get_running_loop().create_future()
        num_tokens = sum(turn.num_tokens for turn in exchange.turns)
        self._events.put(YourTurn(num_tokens, self._sampler.was_interrupted()))
        with stopped_clocks():
            return await self._answer

    # ---- on the loop

    async def _begin(self, request: RolloutRequest) -> asyncio.Task[None]:
        return asyncio.create_task(self._play(request))

    async def _play(self, request: RolloutRequest) -> None:
        prepared = self._agent.prepared
        grader: Grader = prepared.grader if self._agent.grades else _NoGrader()
        worker = RolloutWorker(
            world=prepared.world,
            grader=grader,
            chat=prepared.chat,
            engine=self._sampler,
            config=prepared.config.rollout,
            users=self,
            on_turn=self._tell,
        )
        try:
            [rollout] = await worker.run([request], temperature=self._agent.temperature)
            self._events.put(Over(rollout))
        except asyncio.CancelledError:
            raise
        except BaseException as e:
            self._events.put(e)

    def _tell(self, live: Live) -> None:
        for message in live.messages[self._num_told :]:
            # A turn that was interrupted is empty; what the person says they know.
            if message.role == "tool" or message.content or message.reasoning or message.tool_calls:
                self._events.put(Said(message))
        self._num_told = len(live.messages)

    async def _set(self, text: str | None) -> None:
        assert self._answer is not None and not self._answer.done()
        self._num_told += text is not None
        self._answer.set_result(text)

    async def _interrupt(self) -> None:
        self._sampler.interrupt()

    async def _cancel(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class _Interruptible:
    """A sampler that can be told to end its turn, which is then an empty one."""

    def __init__(self, inner: Sampler, stop_token_id: int) -> None:
        self._inner = inner
        self._stop_token_id = stop_token_id
        self._running: asyncio.Future[Completion] | None = None
        self._is_asked = False

    def interrupt(self) -> None:
        self._is_asked = True
        if self._running is not None:
            self._running.cancel()

    def was_interrupted(self) -> bool:
        """Since this was last asked."""
        was, self._is_asked = self._is_asked, False
        return was

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        empty = Completion(token_ids=[self._stop_token_id], logprobs=[0.0], finished=True, policy_version=0)
        if self._is_asked:
            return empty
        self._running = asyncio.ensure_future(self._inner.generate(prompt_ids, sampling))
        try:
            return await self._running
        except asyncio.CancelledError:
            if self._running.cancelled() and self._is_asked:
                return empty
            self._running.cancel()
            raise
        finally:
            self._running = None


class _NoGrader:
    async def grade(self, task: Task, episode: Episode) -> Grade:
        raise Unscored("nobody asked for a grade")
