"""Rollouts: one episode, its retries and its grade, then all groups of a step at once.

Every episode is a coroutine of its own. The engine batches whatever turns are ready, so an episode that waits for a
tool never holds up the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from envs.base import Env, World
from envs.errors import WorldError
from envs.tools import Tool, call_tool
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
    over_budget: bool = False
    """The model has been told that its call budget is used up."""


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values; stable over processes and Python versions."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.asynccontextmanager
async def _first_error() -> AsyncIterator[None]:
    """Of the errors that end a task group, raise one: ours before the world's, the first of its kind."""
    try:
        yield
    except ExceptionGroup as e:
        ours = [x for x in e.exceptions if not isinstance(x, WorldError)]
        raise (ours or e.exceptions)[0] from None


def _offered(task: Task, env: Env) -> Iterable[str]:
    return env.tools if task.tools is None else task.tools


class RolloutWorker:
    """Runs episodes of one world on one engine. Holds nothing of any single episode."""

    def __init__(self, *, world: World, grader: Grader, chat: Chat, engine: Engine, config: RolloutConfig) -> None:
        self._world = world
        self._grader = grader
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

        async with _first_error(), asyncio.TaskGroup() as group:
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
        try:
            try:
                async with asyncio.timeout(self._config.episode_timeout_s) as limit:
                    await env.open(request.task, rollout_id)
                    tools = {name: env.tools[name] for name in _offered(request.task, env)}
                    stop, error = await self._turns(live, request, tools, temperature), ""
            except WorldError as e:
                stop, error = StopReason.WORLD_FAULT, str(e)
            except TimeoutError:
                if not limit.expired():
                    raise
                stop, error = StopReason.WALL_CLOCK, ""
                if not live.turns:
                    # The model never had its say: a slow world or engine, which must not be scored 0.
                    stop, error = StopReason.WORLD_FAULT, f"no turn within {self._config.episode_timeout_s:g} s"
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
                    grade = await self._grader.grade(request.task, episode)
                except WorldError as e:
                    episode = replace(episode, error=f"grader: {e}")
        finally:
            await env.close(episode)
        return Rollout(
            episode=episode,
            task=request.task,
            ledgers=tuple(live.ledgers),
            grade=grade,
            num_drifted_turns=live.num_drifted_turns,
            num_attempts=number,
        )

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
                answers.append(Message(role="user", content=MALFORMED_ANSWER))
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
        async with _first_error(), asyncio.TaskGroup() as group:
            running = [group.create_task(self._call_tool(tools, call)) for call in allowed]
        done = [t.result() for t in running]
        over = [
            ToolResult(call_id=c.call_id, name=c.name, output=OVER_BUDGET_ANSWER, error=ToolErrorKind.OVER_BUDGET)
            for c in refused
        ]
        return [*done, *over]

    async def _call_tool(self, tools: dict[str, Tool], call: ToolCall) -> ToolResult:
        result = await call_tool(tools, call, timeout_s=self._config.tool_timeout_s)
        limit = self._config.max_tool_output_chars
        if len(result.output) <= limit:
            return result
        cut = f"{result.output[:limit]}\n[cut: {len(result.output) - limit:,} more characters]"
        return replace(result, output=cut)
