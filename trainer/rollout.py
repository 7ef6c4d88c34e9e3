"""Rollouts: one episode, its retries and its grade, then all groups of a step at once.

Every episode is a coroutine of its own. The engine batches whatever turns are ready, so an episode that waits for a
tool never holds up the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from envs.base import Env, World
from envs.errors import WorldError, first_error
from envs.tools import Tool, call_tool, offered_tools
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.types import Grade, Grader
from trainer.chat import Chat
from trainer.config import RolloutConfig
from trainer.engine import Engine, Sampling
from trainer.samples import Ledger

MALFORMED_ANSWER = (
    "Error: your tool call could not be parsed. Write it exactly in the format given, or answer the question."
)
OVER_BUDGET_ANSWER = "Error: the tool call budget is used up. Answer now."


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """An episode with its token ledger and its grade."""

    episode: Episode
    task: Task
    ledgers: tuple[Ledger, ...]
    """Usually one training row; one more for every turn at which the template rewrote the earlier text."""
    grade: Grade | None
    """None where the world failed: masked out of the loss."""
    watch: Grade | None = None
    """What the grader that is never trained on gave; None without one, and where it failed."""
    num_drifted_turns: int = 0
    """Turns whose raw text differs from what serving would render for the parsed message."""
    num_attempts: int = 1
    """More than one where earlier attempts were lost to faults of the world."""

    @property
    def reward(self) -> float | None:
        return None if self.grade is None else self.grade.reward


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """What to roll out: the task and how its randomness is fixed."""

    task: Task
    rollout_id: str
    seed: int


@dataclass(slots=True)
class _Live:
    """An episode in the making."""

    messages: list[Message]
    ledgers: list[Ledger]
    turns: list[Turn] = field(default_factory=list)
    num_tool_calls: int = 0
    num_drifted_turns: int = 0
    waiting_for: str = ""
    """The remote tool whose server is being asked at the moment."""
    over_budget: bool = False
    """The model has been told that its call budget is used up."""


class LiveRollouts(Protocol):
    """Keeps on disk which rollouts are open, so that what a killed run left behind can be released."""

    def opened(self, rollout_id: str) -> None: ...

    def closed(self, rollout_id: str) -> None: ...


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values; stable over processes and Python versions."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class RolloutWorker:
    """Runs episodes of one world on one engine. Holds nothing of any single episode."""

    def __init__(
        self,
        *,
        world: World,
        grader: Grader,
        chat: Chat,
        engine: Engine,
        config: RolloutConfig,
        watch_grader: Grader | None = None,
        live: LiveRollouts | None = None,
    ) -> None:
        self._world = world
        self._grader = grader
        self._watch_grader = watch_grader
        self._live = live
        self._chat = chat
        self._engine = engine
        self._config = config

    async def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        on_rollout: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:
        """All rollouts at once; the result is in the order of the requests.

        `on_rollout` is called as each one finishes. An error that is neither the model's nor the world's cancels the
        others, closes their environments and is raised.
        """

        async def one(request: RolloutRequest) -> Rollout:
            rollout = await self._with_retries(request, temperature)
            on_rollout(rollout)
            return rollout

        async with first_error(), asyncio.TaskGroup() as group:
            running = [group.create_task(one(r)) for r in requests]
        return [t.result() for t in running]

    async def _with_retries(self, request: RolloutRequest, temperature: float) -> Rollout:
        for attempt in range(1 + self._config.world_retries):
            rollout_id = request.rollout_id if attempt == 0 else f"{request.rollout_id}-retry{attempt}"
            rollout = await self._attempt(request, rollout_id, temperature, attempt + 1)
            if rollout.grade is not None:
                break
        return rollout

    async def _attempt(self, request: RolloutRequest, rollout_id: str, temperature: float, number: int) -> Rollout:
        live = _Live(messages=list(request.task.messages), ledgers=[])
        env = self._world.make_env()
        start = time.perf_counter()
        episode: Episode | None = None
        grade: Grade | None = None
        watch: Grade | None = None
        if self._live:
            self._live.opened(rollout_id)
        try:
            stop, error = await self._play(env, live, request, rollout_id, temperature)
            episode = Episode(
                rollout_id=rollout_id,
                task_id=request.task.task_id,
                messages=tuple(live.messages),
                turns=tuple(live.turns),
                stop_reason=stop,
                error=error,
                latency_s=time.perf_counter() - start,
            )
            if stop is not StopReason.WORLD_FAULT:
                try:
                    grade = await _timed_grade(self._grader, request.task, episode)
                except WorldError as e:
                    episode = replace(episode, error=f"grader: {e}")
                # What only watches must not cost a rollout.
                with contextlib.suppress(WorldError):
                    if self._watch_grader and grade:
                        watch = await _timed_grade(self._watch_grader, request.task, episode)
        finally:
            await env.close(episode)
            if self._live:
                self._live.closed(rollout_id)
        return Rollout(
            episode=episode,
            task=request.task,
            ledgers=tuple(live.ledgers),
            grade=grade,
            watch=watch,
            num_drifted_turns=live.num_drifted_turns,
            num_attempts=number,
        )

    async def _play(
        self, env: Env, live: _Live, request: RolloutRequest, rollout_id: str, temperature: float
    ) -> tuple[StopReason, str]:
        """The episode's turns in the opened environment: why they ended, and the world's fault where it was that."""
        try:
            async with asyncio.timeout(self._config.episode_timeout_s) as limit:
                await env.open(request.task, rollout_id)
                if observation := getattr(env, "observation", None):
                    prompt = live.messages[-1]
                    live.messages[-1] = replace(prompt, content=prompt.content + observation)
                tools = offered_tools(request.task, env.tools)
                return await self._turns(live, request, tools, temperature), ""
        except WorldError as e:
            return StopReason.WORLD_FAULT, str(e)
        except TimeoutError:
            if not limit.expired():
                raise
            # A slow world or engine must not be scored 0.
            if not live.turns:
                return StopReason.WORLD_FAULT, f"no turn within {self._config.episode_timeout_s:g} s"
            if live.waiting_for:
                return StopReason.WORLD_FAULT, f"{live.waiting_for} did not answer in the episode's time"
            return StopReason.WALL_CLOCK, ""

    async def _turns(
        self, live: _Live, request: RolloutRequest, tools: dict[str, Tool], temperature: float
    ) -> StopReason:
        """Generate, call tools, repeat; appends to `live` as it goes, so that a time-out loses nothing."""
        config = self._config
        schemas = [t.schema() for t in tools.values()]
        live.ledgers.append(Ledger())
        live.ledgers[-1].append_context(self._chat.open(live.messages, schemas))
        for turn in range(config.max_turns):
            ledger = live.ledgers[-1]
            room = config.max_episode_tokens - len(ledger)
            if room <= 0:
                return StopReason.MAX_EPISODE_TOKENS
            sampling = Sampling(
                max_tokens=min(config.max_turn_tokens, room),
                temperature=temperature,
                top_p=config.top_p,
                seed=derive_seed(request.seed, turn),
            )
            start = time.perf_counter()
            completion = await self._engine.generate(ledger.prompt_ids, sampling)
            generation_s = time.perf_counter() - start
            ledger.append_sampled(completion.token_ids, completion.logprobs, completion.policy_version)
            parsed = self._chat.parse(completion.token_ids, schemas, turn=turn)
            message = parsed.message
            before = list(live.messages)
            live.messages.append(message)
            live.turns.append(
                Turn(
                    message=message,
                    malformed=parsed.malformed,
                    num_tokens=len(completion.token_ids),
                    num_reasoning_tokens=parsed.num_reasoning_tokens,
                    generation_s=generation_s,
                )
            )
            was_over_budget = live.over_budget
            start = time.perf_counter()
            results = await self._call_tools(live, message, tools)
            tools_s = time.perf_counter() - start
            answers = [Message(role="tool", content=r.output, call_id=r.call_id, name=r.name) for r in results]
            if parsed.malformed:
                answers.append(Message(role="user", content=parsed.complaint or MALFORMED_ANSWER))
            live.turns[-1] = replace(live.turns[-1], results=tuple(results), tools_s=tools_s)
            live.messages += answers
            if not completion.finished:
                cut_by_turn = len(completion.token_ids) >= config.max_turn_tokens
                return StopReason.MAX_TURN_TOKENS if cut_by_turn else StopReason.MAX_EPISODE_TOKENS
            if not answers:
                return StopReason.ANSWERED
            if was_over_budget:
                return StopReason.MAX_TOOL_CALLS
            continuation = self._chat.extend(before, message, answers, schemas, completion.token_ids)
            live.num_drifted_turns += continuation.drifted
            if continuation.forked:
                live.ledgers.append(Ledger())
            live.ledgers[-1].append_context(continuation.token_ids)
        return StopReason.MAX_TURNS

    async def _call_tools(self, live: _Live, message: Message, tools: dict[str, Tool]) -> list[ToolResult]:
        """Run the turn's calls concurrently; results in the order called. Calls over the budget are not run."""
        budget_left = max(0, self._config.max_tool_calls - live.num_tool_calls)
        live.num_tool_calls += len(message.tool_calls)
        allowed, refused = message.tool_calls[:budget_left], message.tool_calls[budget_left:]
        live.over_budget |= bool(refused)
        # Where one call fails for good, the others must not go on in an environment that is being closed.
        async with first_error(), asyncio.TaskGroup() as group:
            running = [group.create_task(self._call_tool(tools, call)) for call in allowed]
            live.waiting_for = next((c.name for c in allowed if c.name in tools and tools[c.name].is_remote), "")
        live.waiting_for = ""
        done = [t.result() for t in running]
        over = [
            ToolResult(call_id=c.call_id, name=c.name, output=OVER_BUDGET_ANSWER, error=ToolErrorKind.OVER_BUDGET)
            for c in refused
        ]
        return [*done, *over]

    async def _call_tool(self, tools: dict[str, Tool], call: ToolCall) -> ToolResult:
        result = await call_tool(tools, call, timeout_s=self._config.tool_timeout_s)
        output, limit = result.output, self._config.max_tool_output_chars
        if len(output) > limit:
            output = f"{output[:limit]}\n[cut: {len(output) - limit:,} more characters]"
        return replace(result, output=output, num_tokens=self._chat.num_tokens(output))


async def _timed_grade(grader: Grader, task: Task, episode: Episode) -> Grade:
    start = time.perf_counter()
    grade = await grader.grade(task, episode)
    return replace(grade, latency_s=time.perf_counter() - start)
