"""Rollouts: one episode, its retries and its grade, then all groups of a step at once.

Every episode is a coroutine of its own. The engine batches whatever turns are ready, so an episode that waits for a
tool never holds up the others. What an episode waits for because of us (the engine, a place, a thread) is on no clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from envs.base import Ends, Env, Observes, OrdersCalls, World
from envs.errors import WorldError, first_error
from envs.limits.clocks import blocking_limit, stopped_clocks, time_limit
from envs.limits.threads import let_loop_end
from envs.secrets import hidden_in
from envs.state import read_state
from envs.tools import Tool, call_tool
from envs.types import NOT_PARSED, Episode, Message, StopReason, ToolCall, ToolErrorKind, ToolResult, Turn
from envs.users import Exchange, Users, hear
from graders.types import Grader
from trainer.config import RolloutConfig
from trainer.config.response_format import schema_text
from trainer.engines.engine import Completion, Sampler, Sampling
from trainer.rollouts.admission import Place, Places
from trainer.rollouts.grading import Graded, Grading
from trainer.rollouts.live import Live
from trainer.seeds import derive_seed
from trainer.tasks.offer import tools_offered
from trainer.templates.chat import Chat, Continuation, ParsedTurn, TemplateRefused
from trainer.types import Ledger, Rollout, RolloutRequest, completion_ids

MALFORMED_ANSWER = f"{NOT_PARSED}. Write it exactly in the format given, or answer the question."
OVER_BUDGET_ANSWER = "Error: the tool call budget is used up. Answer now."


class LiveRollouts(Protocol):
    """Keeps on disk which rollouts are open, so that what a killed run left behind can be released."""

    def opened(self, rollout_id: str) -> None: ...

    def closed(self, rollout_id: str) -> None: ...


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
    ) -> None:
        """`max_num_seqs`: how many turns the engine decodes at once; None: any number."""
        self._world = world
        self._grading = Grading(grader, watch_grader, timeout_s=config.settle_timeout_s, retries=config.world_retries)
        self._live = live
        self._max_num_seqs = max_num_seqs
        self._chat = chat
        self._engine = engine
        self._config = config
        self._users = users

    async def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        on_rollout: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:
        """All rollouts, as the engine has room for them; the result is in the order of the requests.

        `on_rollout` is called as each one finishes. An error that is neither the model's nor the world's cancels the
        others, closes their environments and is raised.
        """
        let_loop_end()
        places = Places(self._max_num_seqs)

        async def one(number: int, request: RolloutRequest) -> Rollout:
            rollout = await self._with_retries(request, temperature, Place(places, number))
            on_rollout(rollout)
            return rollout

        async with first_error(), asyncio.TaskGroup() as group:
            running = [group.create_task(one(i, r)) for i, r in enumerate(requests)]
        return [t.result() for t in running]

    async def _with_retries(self, request: RolloutRequest, temperature: float, place: Place) -> Rollout:
        unclosed: tuple[str, ...] = ()
        for attempt in range(1 + self._config.world_retries):
            rollout_id = request.rollout_id if attempt == 0 else f"{request.rollout_id}-retry{attempt}"
            try:
                # Admitted: what comes before is no part of the episode.
                await place.take()
                live = Live(request=request, rollout_id=rollout_id, place=place, messages=list(request.task.messages))
                rollout = await self._attempt(live, temperature)
            finally:
                place.leave()
            unclosed += rollout.unclosed
            if rollout.episode.stop_reason is not StopReason.WORLD_FAULT:
                break
        return replace(rollout, unclosed=unclosed, num_attempts=rollout.num_attempts + attempt)

    async def _attempt(self, live: Live, temperature: float) -> Rollout:
        """One episode and its grading, in an environment of its own."""
        start = time.perf_counter()
        episode: Episode | None = None
        graded, unclosed = Graded(), ""
        if self._live:
            self._live.opened(live.rollout_id)
        try:
            stop, error = await self._play(live, temperature)
            live.place.leave()
            state: dict[str, Any] = {}
            if stop is not StopReason.WORLD_FAULT:
                try:
                    state = await read_state(live.env, timeout_s=self._config.tool_timeout_s)
                except WorldError as e:
                    stop, error = StopReason.WORLD_FAULT, str(e)
            episode = Episode(
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
            if stop is not StopReason.WORLD_FAULT:
                graded = await self._grading.grade(live.request.task, episode)
                episode = replace(episode, error=graded.error)
        finally:
            live.place.leave()
            unclosed = await self._close(live.env, episode)
            if self._live:
                self._live.closed(live.rollout_id)
        return Rollout(
            episode=episode,
            task=live.request.task,
            ledgers=tuple(live.ledgers),
            grade=graded.grade,
            watch=graded.watch,
            is_unscored=graded.is_unscored,
            num_drifted_turns=live.num_drifted_turns,
            num_attempts=graded.num_tries,
            unclosed=(unclosed,) if unclosed else (),
        )

    async def _close(self, env: Env, episode: Episode | None) -> str:
        """Why it did not close; empty where it did. The rollout is over, and nothing that fails here may cost it."""
        limit_s = min(self._config.settle_timeout_s, self._config.episode_timeout_s)
        try:
            async with time_limit(limit_s) as limit:
                await env.close(episode)
        except Exception as e:
            if isinstance(e, TimeoutError) and limit.expired():
                return f"close: not done within {limit_s:g} s"
            return f"close: {type(e).__name__}: {hidden_in(str(e))}".removesuffix(": ")
        return ""

    async def _play(self, live: Live, temperature: float) -> tuple[StopReason, str]:
        """The episode's turns in an environment opened for it: why they ended, and the world's fault where it was that.

        What counts in its time: making and opening the environment, tools, the user.
        """
        limit_s = self._config.episode_timeout_s
        try:
            async with time_limit(limit_s) as limit:
                with blocking_limit(limit_s, "make_env"):
                    live.env = self._world.make_env()
                await live.env.open(live.request.task, live.rollout_id)
                if isinstance(live.env, Observes) and (observation := live.env.observation):
                    prompt = live.messages[-1]
                    live.messages[-1] = replace(prompt, content=prompt.content + observation)
                return await self._turns(live, temperature), ""
        except WorldError as e:
            return StopReason.WORLD_FAULT, str(e)
        except TimeoutError:
            if not limit.expired():
                raise
            if not live.turns:
                return StopReason.WORLD_FAULT, f"no turn within {limit_s:g} s"
            if live.waiting_for:
                return StopReason.WORLD_FAULT, f"{live.waiting_for} did not answer in the episode's time"
            return StopReason.WALL_CLOCK, ""

    async def _turns(self, live: Live, temperature: float) -> StopReason:
        """Generate, call tools or hear the user, repeat; appends to `live` as it goes: a time-out loses nothing."""
        config = self._config
        self._look_at_tools(live)
        self._go_on(live, self._chat.begin(live.messages, live.schemas))
        for number in range(config.max_turns):
            room = config.max_episode_tokens - len(live.ledgers[-1])
            if room <= 0:
                return StopReason.MAX_EPISODE_TOKENS
            before, was_over_budget = list(live.messages), live.over_budget
            completion, parsed = await self._generate(live, number, min(config.max_turn_tokens, room), temperature)
            await self._answer_calls(live, parsed)
            if not completion.finished:
                cut_by_turn = len(completion.token_ids) >= config.max_turn_tokens
                return StopReason.MAX_TURN_TOKENS if cut_by_turn else StopReason.MAX_EPISODE_TOKENS
            if config.answer == "tool_calls" and parsed.message.tool_calls:
                return StopReason.CALLED
            if not parsed.message.tool_calls and not parsed.malformed:
                if stop := await self._hear_user(live):
                    return stop
            elif was_over_budget:
                return StopReason.MAX_TOOL_CALLS
            if isinstance(live.env, Ends) and live.env.is_over:
                return StopReason.ENDED
            try:
                self._continue(live, before, completion)
            except TemplateRefused as e:
                turn, *answers = live.messages[len(before) :]
                if self._chat.minds_texts(before, turn, answers, live.schemas):
                    raise WorldError(f"the chat template can't render what was said to the model: {e.reason}") from e
                return StopReason.TEMPLATE_REFUSED
        return StopReason.MAX_TURNS

    def _look_at_tools(self, live: Live) -> bool:
        """Take up the tools that the environment has now; True where the model is offered others than before."""
        seen = list(live.env.tools.items())
        if seen == live.seen_tools:
            return False
        live.seen_tools = seen
        live.tools = tools_offered(live.request.task, dict(seen), self._config)
        before, live.schemas = live.schemas, [t.schema() for t in live.tools.values()]
        return live.schemas != before

    async def _generate(
        self, live: Live, number: int, max_tokens: int, temperature: float
    ) -> tuple[Completion, ParsedTurn]:
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=self._config.top_p,
            seed=derive_seed(live.request.seed, number),
            schema=schema_text(self._config.response_format),
        )
        ledger = live.ledgers[-1]
        await live.place.take()
        start = time.perf_counter()
        with stopped_clocks():
            completion = await self._engine.generate(ledger.prompt_ids, sampling)
        generation_s = time.perf_counter() - start
        token_ids, version = completion.token_ids, completion.policy_version
        ledger.append_sampled(token_ids, completion.logprobs, version, constrained_from=completion.constrained_from)
        parsed = self._chat.parse(token_ids, live.schemas, turn=number)
        live.messages.append(parsed.message)
        live.turns.append(
            Turn(
                message=parsed.message,
                malformed=parsed.malformed,
                num_tokens=len(token_ids),
                num_reasoning_tokens=parsed.num_reasoning_tokens,
                num_spelled_tokens=self._chat.special.num_spelled(token_ids),
                generation_s=generation_s,
            )
        )
        return completion, parsed

    async def _answer_calls(self, live: Live, parsed: ParsedTurn) -> None:
        """The results of the last turn's calls, and what is said to a malformed one."""
        start = time.perf_counter()
        if self._config.answer == "tool_calls":
            # Nothing was run; what remains are the calls that no tool could have taken.
            checked = [await self._call_tool(live.tools, call) for call in parsed.message.tool_calls]
            results = [result for result in checked if result.error]
        else:
            if parsed.message.tool_calls:
                live.place.leave()
            results = await self._call_tools(live, parsed.message)
        live.turns[-1] = replace(live.turns[-1], results=tuple(results), tools_s=time.perf_counter() - start)
        live.messages += [Message(role="tool", content=r.output, call_id=r.call_id, name=r.name) for r in results]
        if parsed.malformed:
            live.messages.append(Message(role="user", content=parsed.complaint or MALFORMED_ANSWER))

    async def _hear_user(self, live: Live) -> StopReason | None:
        """What the user says to a turn without calls; where they say nothing more, or may not, why the episode ends."""
        exchange = Exchange(
            task=live.request.task,
            rollout_id=live.rollout_id,
            messages=tuple(live.messages),
            turns=tuple(live.turns),
            seed=derive_seed(live.request.seed, "user", live.num_replies),
        )
        start = time.perf_counter()
        live.place.leave()
        live.waiting_for = "the user"
        reply = await hear(live.env, self._users, exchange)
        live.waiting_for = ""
        if reply is None:
            return StopReason.ANSWERED
        if live.num_replies == self._config.max_user_turns:
            return StopReason.MAX_USER_TURNS
        live.num_replies += 1
        live.turns[-1] = replace(live.turns[-1], reply=reply, reply_s=time.perf_counter() - start)
        live.messages.append(Message(role="user", content=reply))
        return None

    def _continue(self, live: Live, before: list[Message], completion: Completion) -> None:
        """The prompt of the next turn. Other tools are another prompt: they begin a row, as a forking template does."""
        schemas = live.schemas
        if self._look_at_tools(live):
            self._go_on(live, self._chat.begin(live.messages, live.schemas, strict=False))
            return
        message, *answers = live.messages[len(before) :]
        sampled = completion.token_ids
        self._go_on(live, self._chat.extend(before, message, answers, schemas, sampled, prompt=live.prompt))

    def _go_on(self, live: Live, continuation: Continuation) -> None:
        live.num_drifted_turns += continuation.drifted
        if continuation.forked:
            live.ledgers.append(Ledger())
        live.ledgers[-1].append_context(continuation.token_ids)
        live.prompt = continuation.text

    async def _call_tools(self, live: Live, message: Message) -> list[ToolResult]:
        """Run the turn's calls, concurrently unless the environment wants them in order; results in the order called.

        Calls over the budget are not run.
        """
        tools = live.tools
        budget_left = max(0, self._config.max_tool_calls - live.num_tool_calls)
        live.num_tool_calls += len(message.tool_calls)
        allowed, refused = message.tool_calls[:budget_left], message.tool_calls[budget_left:]
        live.over_budget |= bool(refused)
        live.waiting_for = next((c.name for c in allowed if c.name in tools and tools[c.name].is_remote), "")
        if isinstance(live.env, OrdersCalls) and live.env.calls_in_order:
            done = [await self._call_tool(tools, call) for call in allowed]
        else:
            # Where one call fails for good, the others must not go on in an environment that is being closed.
            async with first_error(), asyncio.TaskGroup() as group:
                running = [group.create_task(self._call_tool(tools, call)) for call in allowed]
            done = [t.result() for t in running]
        live.waiting_for = ""
        over, kind = OVER_BUDGET_ANSWER, ToolErrorKind.OVER_BUDGET
        return [*done, *(ToolResult(call_id=c.call_id, name=c.name, output=over, error=kind) for c in refused)]

    async def _call_tool(self, tools: dict[str, Tool], call: ToolCall) -> ToolResult:
        result = await call_tool(tools, call, timeout_s=self._config.tool_timeout_s)
        output, limit = result.output, self._config.max_tool_output_chars
        if len(output) > limit:
            output = f"{output[:limit]}\n[cut: {len(output) - limit:,} more characters]"
        special = self._chat.special.num_in(output)
        return replace(result, output=output, num_tokens=self._chat.num_tokens(output), num_special_tokens=special)
