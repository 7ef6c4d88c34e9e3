"""One episode: an environment of its own, and turn after turn until one of its ends.

What it waits for because of us (the engine, a place, a thread) is on no clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from envs.base import World, of_env
from envs.errors import WorldError
from envs.limits.clocks import blocking_limit, stopped_clocks, time_limit
from envs.tools import finite_reward
from envs.types import NOT_PARSED, Message, StopReason, Turn
from envs.users import Exchange, Users, hear
from trainer.config import RolloutConfig
from trainer.config.response_format import schema_text
from trainer.engines.engine import Completion, Sampler, Sampling
from trainer.rollouts.calls import ToolCalls
from trainer.rollouts.live import Live
from trainer.seeds import derive_seed
from trainer.tasks.offer import tools_offered
from trainer.templates.chat import Chat, Continuation, OfferedTools, ParsedTurn, TemplateRefused
from trainer.types import Ledger

MALFORMED_ANSWER = f"{NOT_PARSED}. Write it exactly in the format given, or answer the question."


class Player:
    """Plays episodes of one world on one engine. Holds nothing of any single one: that is `Live`."""

    def __init__(
        self,
        *,
        world: World,
        chat: Chat,
        engine: Sampler,
        config: RolloutConfig,
        users: Users | None = None,
        pins_version: bool = False,
        on_turn: Callable[[Live], None] = lambda live: None,
    ) -> None:
        """`pins_version`: all turns of an episode are asked for under the policy version of its first. `on_turn` hears
        of every turn twice: when it has been generated, and when its calls have their results.
        """
        self._world = world
        self._chat = chat
        self._engine = engine
        self._config = config
        self._users = users
        self._pins_version = pins_version
        self._on_turn = on_turn
        self._calls = ToolCalls(chat, config)

    async def play(self, live: Live, temperature: float) -> tuple[StopReason, str]:
        """The episode's turns in an environment opened for it: why they ended, and the world's fault where it was that.

        What counts in its time: making and opening the environment, tools, the user.
        """
        limit_s = self._config.episode_timeout_s
        try:
            async with time_limit(limit_s) as limit:
                with blocking_limit(limit_s, "make_env"):
                    live.env = self._world.make_env()
                await live.env.open(live.request.task, live.rollout_id)
                if observation := of_env(live.env, "observation", limit_s=limit_s):
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
            before = list(live.messages)
            completion, stop = await self._turn(live, number, min(config.max_turn_tokens, room), temperature)
            if (reward := of_env(live.env, "turn_reward", limit_s=config.episode_timeout_s)) is not None:
                whose = f"{type(live.env).__name__}.turn_reward"
                live.turns[-1] = replace(live.turns[-1], env_reward=finite_reward(reward, whose))
            if stop is not None:
                return stop
            try:
                self._continue(live, before, completion)
            except TemplateRefused as e:
                turn, *answers = live.messages[len(before) :]
                if self._chat.minds_texts(before, turn, answers, live.schemas):
                    raise WorldError(f"the chat template can't render what was said to the model: {e.reason}") from e
                return StopReason.TEMPLATE_REFUSED
        return StopReason.MAX_TURNS

    async def _turn(
        self, live: Live, number: int, max_tokens: int, temperature: float
    ) -> tuple[Completion, StopReason | None]:
        """One generation and what it causes; with it, where the episode ends, why."""
        config, was_over_budget = self._config, live.over_budget
        completion, parsed = await self._generate(live, number, max_tokens, temperature)
        self._on_turn(live)
        await self._answer_calls(live, parsed)
        self._on_turn(live)
        if not completion.finished:
            cut_by_turn = len(completion.token_ids) >= config.max_turn_tokens
            return completion, StopReason.MAX_TURN_TOKENS if cut_by_turn else StopReason.MAX_EPISODE_TOKENS
        if config.answer == "tool_calls" and parsed.message.tool_calls:
            return completion, StopReason.CALLED
        if not parsed.message.tool_calls and not parsed.malformed:
            if stop := await self._hear_user(live):
                return completion, stop
        elif was_over_budget:
            return completion, StopReason.MAX_TOOL_CALLS
        is_over = of_env(live.env, "is_over", limit_s=config.episode_timeout_s)
        return completion, StopReason.ENDED if is_over else None

    async def _generate(
        self, live: Live, number: int, max_tokens: int, temperature: float
    ) -> tuple[Completion, ParsedTurn]:
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=self._config.top_p,
            seed=derive_seed(live.request.seed, number),
            schema=schema_text(self._config.response_format),
            version=live.version if self._pins_version else None,
        )
        ledger = live.ledgers[-1]
        await live.place.take()
        start = time.perf_counter()
        with stopped_clocks():
            completion = await self._engine.generate(ledger.prompt_ids, sampling)
        generation_s = time.perf_counter() - start
        token_ids, version = completion.token_ids, completion.policy_version
        live.version = version if live.version is None else live.version
        ledger.append_sampled(
            token_ids, completion.logprobs, version, turn=number, constrained_from=completion.constrained_from
        )
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
        results = await self._calls.results(live, parsed.message)
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

    def _look_at_tools(self, live: Live) -> bool:
        """Take up the tools that the environment has now; True where the model is offered others than before."""
        seen = list(of_env(live.env, "tools", limit_s=self._config.episode_timeout_s).items())
        if seen == live.seen_tools:
            return False
        live.seen_tools = seen
        live.tools = tools_offered(live.request.task, dict(seen), self._config)
        before, live.schemas = live.schemas, OfferedTools(t.schema() for t in live.tools.values())
        return live.schemas != before
