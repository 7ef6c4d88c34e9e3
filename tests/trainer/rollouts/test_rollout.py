"""One episode, its limits and its faults; a step's episodes together; the token ledger (invariants 1 and 5)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from envs.errors import Unscored, WorldError
from envs.tools import Tool, schema_tool, tool
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind
from graders.types import Grade
from tests.support.episodes import (
    CONFIG,
    STOP,
    TASK,
    TOOLS,
    Env,
    LengthGrader,
    LiveIds,
    World,
    executed,
    play,
)
from tests.support.scripted_engine import BROKEN_CALL, Writer, call
from tests.support.template_play import DIALECTS, TOY_TEMPLATE
from trainer.config import RolloutConfig
from trainer.measures.masked import Masked, masked_by
from trainer.measures.summary import summarise
from trainer.rollouts.calls import OVER_BUDGET_ANSWER
from trainer.rollouts.episode import MALFORMED_ANSWER
from trainer.rollouts.worker import RolloutWorker
from trainer.runs.records import rollout_from_json, rollout_to_json
from trainer.tasks.expert import play_expert
from trainer.templates.chat import Chat
from trainer.types import Rollout, RolloutRequest


@pytest.fixture(autouse=True)
def nothing_executed():
    executed.clear()


# --- stop reasons


async def test_a_turn_without_calls_is_the_answer(chat):
    played = await play(chat, [call("echo", text="a"), "42 million"])
    assert played.episode.stop_reason is StopReason.ANSWERED
    assert played.episode.answer == "42 million"
    assert [m.role for m in played.episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert played.episode.messages[2].content == "heard a"
    assert played.episode.turns[0].results[0].call_id == played.episode.messages[1].tool_calls[0].call_id
    assert played.rollout.grade and played.rollout.reward == 1.0


async def test_the_turn_limit_ends_an_episode_that_never_answers(chat):
    played = await play(chat, lambda prompt, seed: call("echo", text="again"), max_turns=3, max_tool_calls=10)
    assert played.episode.stop_reason is StopReason.MAX_TURNS
    assert len(played.episode.turns) == 3 == len(played.engine.requests)
    assert played.episode.answer is None


async def test_an_answer_in_the_last_turn_counts(chat):
    played = await play(chat, [call("echo", text="a"), "42"], max_turns=2)
    assert played.episode.stop_reason is StopReason.ANSWERED


async def test_calls_over_the_budget_are_answered_but_not_run_and_a_second_such_turn_ends_it(chat):
    turns = [call("echo", text=str(i)) for i in range(5)]
    played = await play(chat, turns, max_tool_calls=2, max_turns=8)
    assert played.episode.stop_reason is StopReason.MAX_TOOL_CALLS
    assert executed == ["0", "1"]
    assert [t.results[0].error for t in played.episode.turns] == [None, None, *[ToolErrorKind.OVER_BUDGET] * 2]
    assert played.episode.messages[-1].content == OVER_BUDGET_ANSWER
    assert played.episode.num_tool_calls == 4 and played.episode.num_invalid_calls == 0


async def test_after_the_budget_is_used_up_the_model_may_still_answer(chat):
    turns = [call("echo", text="0"), call("echo", text="1"), "42"]
    played = await play(chat, turns, max_tool_calls=1)
    assert played.episode.stop_reason is StopReason.ANSWERED and executed == ["0"]


async def test_of_parallel_calls_only_those_within_the_budget_run(chat):
    turns = ["\n".join(call("echo", text=str(i)) for i in range(3)), "42"]
    played = await play(chat, turns, max_tool_calls=2, max_turn_tokens=200)
    assert sorted(executed) == ["0", "1"]
    assert [r.error for r in played.episode.turns[0].results] == [None, None, ToolErrorKind.OVER_BUDGET]
    assert played.episode.stop_reason is StopReason.ANSWERED


async def test_a_budget_of_zero_runs_nothing(chat):
    played = await play(chat, [call("echo", text="0"), "42"], max_tool_calls=0)
    assert executed == [] and played.episode.stop_reason is StopReason.ANSWERED


async def test_a_turn_cut_at_its_token_limit_ends_the_episode(chat):
    played = await play(chat, ["word " * 200], max_turn_tokens=20)
    assert played.episode.stop_reason is StopReason.MAX_TURN_TOKENS
    assert played.episode.num_tokens == 20 and played.episode.answer is None


async def test_the_episode_limit_shortens_the_last_turn(chat):
    prompt = len(chat.open(TASK.messages, [t.schema() for t in TOOLS.values()]))
    played = await play(chat, ["word " * 200], max_turn_tokens=60, max_episode_tokens=prompt + 9)
    assert played.episode.stop_reason is StopReason.MAX_EPISODE_TOKENS
    assert played.episode.num_tokens == 9 and len(played.rollout.ledgers[0]) == prompt + 9


async def test_a_tool_output_that_fills_the_episode_ends_it_before_the_next_turn(chat):
    played = await play(chat, [call("echo", text="word " * 30), "42"], max_episode_tokens=150)
    assert played.episode.stop_reason is StopReason.MAX_EPISODE_TOKENS
    assert len(played.engine.requests) == 1 and len(played.episode.turns) == 1


async def test_the_wall_clock_ends_an_episode_and_keeps_the_turn_that_was_waiting(chat):
    forever = asyncio.Event()

    @tool
    async def hang(text: str) -> str:
        """Wait.

        Args:
            text: anything
        """
        await forever.wait()
        return text

    world = World({"hang": hang})
    played = await play(chat, [call("hang", text="x")], world=world, episode_timeout_s=0.5)
    assert played.episode.stop_reason is StopReason.WALL_CLOCK
    assert len(played.episode.turns) == 1 and played.episode.num_tool_calls == 1
    assert played.episode.messages[-1].tool_calls, "what the model wrote is in the transcript"
    assert played.rollout.grade is not None


async def test_an_environment_that_does_not_open_in_time_is_the_worlds_fault(chat):
    world = World(dict(TOOLS), on_open=lambda rollout_id: asyncio.Event().wait())
    played = await play(chat, ["42"], world=world, episode_timeout_s=0.05, world_retries=1)
    assert played.episode.stop_reason is StopReason.WORLD_FAULT and played.rollout.grade is None
    assert played.episode.error == "no turn within 0.05 s" and played.rollout.num_attempts == 2


# --- the model's faults


async def test_a_malformed_call_is_answered_counted_and_never_the_final_answer(chat):
    played = await play(chat, [BROKEN_CALL, "42"])
    assert played.episode.stop_reason is StopReason.ANSWERED and played.episode.answer == "42"
    first = played.episode.turns[0]
    assert first.malformed and not first.message.tool_calls
    assert played.episode.messages[2] == Message(role="user", content=MALFORMED_ANSWER)
    assert played.episode.num_invalid_calls == 1 == played.episode.num_tool_calls


async def test_malformed_calls_to_the_end_are_no_answer(chat):
    played = await play(chat, lambda prompt, seed: BROKEN_CALL, max_turns=3)
    assert played.episode.stop_reason is StopReason.MAX_TURNS and played.episode.answer is None
    assert played.episode.num_invalid_calls == 3


@pytest.mark.parametrize(
    ("written", "kind", "shown"),
    [
        (call("shout", text="a"), ToolErrorKind.UNKNOWN_TOOL, "no tool named 'shout'; use one of echo, refuse"),
        (call("echo", words="a"), ToolErrorKind.BAD_ARGUMENTS, "text: Field required"),
        (call("refuse", text="a"), ToolErrorKind.REFUSED, "not today"),
    ],
)
async def test_a_call_that_fails_is_shown_to_the_model(chat, written, kind, shown):
    played = await play(chat, [written, "42"])
    (result,) = played.episode.turns[0].results
    assert result.error is kind and shown in result.output
    assert shown in chat.decode(played.engine.requests[1][0]), "the next prompt holds it"
    assert played.episode.num_invalid_calls == (kind is not ToolErrorKind.REFUSED)
    assert played.episode.stop_reason is StopReason.ANSWERED


async def test_a_tool_that_takes_too_long_is_given_up_and_the_episode_goes_on(chat):
    @tool
    async def hang(text: str) -> str:
        """Wait.

        Args:
            text: anything
        """
        await asyncio.Event().wait()
        return text

    played = await play(chat, [call("hang", text="a"), "42"], world=World({"hang": hang}), tool_timeout_s=0.05)
    assert played.episode.turns[0].results[0].error is ToolErrorKind.TIMEOUT
    assert played.episode.stop_reason is StopReason.ANSWERED


async def test_long_tool_outputs_are_cut_and_say_so(chat):
    played = await play(chat, [call("echo", text="x" * 50), "42"], max_tool_output_chars=10)
    assert played.episode.turns[0].results[0].output == "heard xxxx\n[cut: 46 more characters]"


async def test_a_task_that_names_its_tools_is_offered_no_others(chat):
    task = Task(task_id="t", messages=TASK.messages, tools=("echo",))
    played = await play(chat, [call("refuse", text="a"), "42"], task=task)
    assert played.episode.turns[0].results[0].error is ToolErrorKind.UNKNOWN_TOOL
    prompt = chat.decode(played.engine.requests[0][0])
    assert "echo(" in prompt and "refuse(" not in prompt


async def test_a_task_with_an_empty_list_of_tools_is_offered_none(chat):
    played = await play(chat, ["42"], task=Task(task_id="t", messages=TASK.messages, tools=()))
    assert "echo(" not in chat.decode(played.engine.requests[0][0])


# --- concurrency


async def test_the_calls_of_one_turn_run_at_the_same_time_and_results_keep_the_order_of_the_calls(chat):
    first_waits, order = asyncio.Event(), []

    @tool
    async def meet(name: str) -> str:
        """Meet.

        Args:
            name: who
        """
        if name == "first":
            await first_waits.wait()  # only the second call, running beside it, opens the way
        first_waits.set()
        order.append(name)
        return f"met {name}"

    turn = "\n".join(call("meet", name=n) for n in ("first", "second"))
    played = await play(chat, [turn, "42"], world=World({"meet": meet}), episode_timeout_s=30)
    assert order == ["second", "first"]
    assert [r.output for r in played.episode.turns[0].results] == ["met first", "met second"]


async def test_an_episode_that_waits_for_a_tool_holds_up_no_other(chat):
    """The first episode's tool ends only when all the others have answered."""
    others = asyncio.Event()

    @tool
    async def wait(text: str) -> str:
        """Wait.

        Args:
            text: anything
        """
        await others.wait()
        return text

    def script(prompt: str, seed: int) -> str:
        waits = "slow" in prompt and "<tool_call>" not in prompt.rpartition("slow")[2]
        return call("wait", text="x") if waits else "42"

    done = []
    world, engine = World({"wait": wait}), Writer(chat, script)
    worker = RolloutWorker(world=world, grader=LengthGrader(), chat=chat, engine=engine, config=CONFIG)
    slow = Task(task_id="slow", messages=(Message(role="user", content="slow"),))
    requests = [RolloutRequest(task=slow if i == 0 else TASK, rollout_id=f"r{i}", seed=i) for i in range(5)]

    def on_rollout(rollout: Rollout) -> None:
        done.append(rollout.episode.rollout_id)
        if len(done) == 4:
            others.set()

    async with asyncio.timeout(60):
        rollouts = await worker.run(requests, temperature=1.0, on_rollout=on_rollout)
    assert done[-1] == "r0" and sorted(done) == [f"r{i}" for i in range(5)]
    assert [r.episode.rollout_id for r in rollouts] == [f"r{i}" for i in range(5)], "in the order of the requests"


async def test_every_rollout_has_an_id_and_turns_have_seeds_of_their_own(chat):
    played = await play(chat, lambda prompt, seed: BROKEN_CALL, num_rollouts=3, max_turns=2)
    assert sorted(played.world.opened) == ["r0", "r1", "r2"]
    assert [r.episode.rollout_id for r in played.rollouts] == ["r0", "r1", "r2"]
    seeds = [sampling.seed for _, sampling in played.engine.requests]
    assert len(set(seeds)) == len(seeds) == 6


@pytest.mark.parametrize("max_num_seqs", [1, 3, None])
async def test_a_slow_engine_is_on_no_episodes_clock(chat, max_num_seqs):
    """One sequence at a time, 0.3 s a turn, whatever we believe of it: the last of them waits longer than its limit."""
    one = asyncio.Semaphore(1)

    async def take_long() -> None:
        async with one:
            await asyncio.sleep(0.3)

    def set_up(engine: Writer, grader: LengthGrader) -> None:
        engine.before_turn = lambda number: take_long()

    def script(prompt: str, seed: int) -> str:
        return "42" if "heard" in prompt else call("echo", text="a")

    played = await play(
        chat, script, num_rollouts=8, set_up=set_up, max_num_seqs=max_num_seqs, episode_timeout_s=1.5, world_retries=0
    )
    assert [r.episode.stop_reason for r in played.rollouts] == [StopReason.ANSWERED] * 8
    assert [r.reward for r in played.rollouts] == [1.0] * 8
    assert [r.num_attempts for r in played.rollouts] == [1] * 8 and len(played.engine.requests) == 16


async def test_no_more_turns_are_asked_for_than_the_engine_holds_and_the_rollouts_are_the_same(chat):
    told: list[dict[str, Any]] = []
    for max_num_seqs in (None, 2, 1):
        at_once, most = 0, 0

        async def count() -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.02)
            at_once -= 1

        def set_up(engine: Writer, grader: LengthGrader, count: Callable[[], Any] = count) -> None:
            engine.before_turn = lambda number: count()

        def script(prompt: str, seed: int) -> str:
            return f"it is {seed}" if "heard" in prompt else call("echo", text=str(seed))

        played = await play(chat, script, num_rollouts=5, set_up=set_up, max_num_seqs=max_num_seqs, max_turn_tokens=128)
        assert most == (max_num_seqs or 5)
        told.append({r.episode.rollout_id: r.episode.messages for r in played.rollouts})
    assert told[0] == told[1] == told[2] and len(told[0]) == 5


async def test_with_one_place_an_episode_that_waits_for_a_tool_holds_up_no_other(chat):
    others = asyncio.Event()

    @tool
    async def wait(text: str) -> str:
        """Wait.

        Args:
            text: anything
        """
        if text == "first":
            await others.wait()
        else:
            others.set()
        return f"heard {text}"

    def script(prompt: str, seed: int) -> str:
        return "42" if "heard" in prompt else call("wait", text="other" if others_asked else "first")

    others_asked: list[int] = []

    def set_up(engine: Writer, grader: LengthGrader) -> None:
        engine.before_turn = lambda number: others_asked.append(number) if number else None

    played = await play(
        chat, script, world=World({"wait": wait}), num_rollouts=2, set_up=set_up, max_num_seqs=1, episode_timeout_s=60
    )
    assert [r.episode.stop_reason for r in played.rollouts] == [StopReason.ANSWERED] * 2


# --- the world's faults


async def test_an_environment_whose_closing_hangs_or_fails_costs_no_rollout_and_is_told(chat):
    class Stuck(Env):
        async def close(self, episode: Episode | None) -> None:
            await super().close(episode)
            if self._rollout_id == "r0":
                await asyncio.Event().wait()
            if self._rollout_id == "r1":
                raise OSError("no such browser")

    world = World(dict(TOOLS))
    world.make_env = lambda: Stuck(world)
    live = LiveIds()
    played = await play(chat, lambda prompt, seed: "42", world=world, num_rollouts=3, settle_timeout_s=0.2, live=live)
    assert [r.reward for r in played.rollouts] == [1.0] * 3
    assert [name for what, name in live.events if what == "closed"] == ["r2"], "the others are still to be released"
    assert [r.unclosed for r in played.rollouts] == [
        ("close: not done within 0.2 s",),
        ("close: OSError: no such browser",),
        (),
    ]
    stored = json.loads(json.dumps(rollout_to_json(played.rollouts[0])))
    assert rollout_from_json(stored) == played.rollouts[0]
    assert summarise(played.rollouts)["unclosed_environments"] == 2


async def test_an_environment_that_can_not_be_made_is_the_worlds_fault(chat):
    def make_env() -> Env:
        raise WorldError("no room")

    world = World(dict(TOOLS))
    world.make_env = make_env
    played = await play(chat, ["42"], world=world, world_retries=1)
    assert played.episode.stop_reason is StopReason.WORLD_FAULT and played.rollout.num_attempts == 2
    assert played.episode.error == "no room"


async def test_an_environment_whose_making_hangs_is_the_worlds_fault(chat):
    world = World(dict(TOOLS))
    world.make_env = lambda: time.sleep(60)
    played = await play(chat, ["42"], world=world, world_retries=1, episode_timeout_s=0.2)
    assert played.episode.stop_reason is StopReason.WORLD_FAULT and played.rollout.num_attempts == 2
    assert played.episode.error == "make_env: not done within 0.2 s"


@pytest.mark.parametrize("member", ["tools", "observation", "turn_reward", "is_over"])
async def test_a_member_of_an_environment_that_hangs_is_the_worlds_fault(chat, member):
    hangs = type("Hangs", (Env,), {member: property(lambda env: time.sleep(60))})
    world = World(dict(TOOLS))
    world.make_env = lambda: hangs(world)
    played = await play(chat, [call("echo", text="hi"), "42"], world=world, episode_timeout_s=0.2, world_retries=0)
    assert played.episode.stop_reason is StopReason.WORLD_FAULT
    assert played.episode.error == f"Hangs.{member}: not done within 0.2 s"


@pytest.mark.parametrize("member", ["make_env", "tools", "observation", "is_over"])
async def test_an_experts_environment_that_hangs_is_the_worlds_fault(member):
    world = World(dict(TOOLS))
    hangs = type("Hangs", (Env,), {member: property(lambda env: time.sleep(60))})
    world.make_env = (lambda: time.sleep(60)) if member == "make_env" else lambda: hangs(world)
    told = rf"expert's episode of task .*: (Hangs\.)?{member}: not done within 0\.2 s"
    limits = RolloutConfig(episode_timeout_s=0.2, world_retries=0)
    with pytest.raises(WorldError, match=told):
        await play_expert(TASK, ((("echo", {"text": "hi"}),), "42"), world=world, rollout=limits)


async def test_a_fault_of_the_world_is_retried_in_a_fresh_environment(chat):
    def fail_twice(number: int) -> None:
        if number < 2:
            raise WorldError("engine down")

    def set_up(engine: Writer, grader: LengthGrader) -> None:
        engine.before_turn = fail_twice

    played = await play(chat, lambda prompt, seed: "42", set_up=set_up)
    assert played.world.opened == ["r0", "r0-retry1", "r0-retry2"]
    assert played.rollout.num_attempts == 3 and played.episode.rollout_id == "r0-retry2"
    assert played.episode.stop_reason is StopReason.ANSWERED and played.rollout.reward == 1.0
    assert [e.rollout_id for e in played.grader.graded] == ["r0-retry2"]
    assert {s.seed for _, s in played.engine.requests} == {played.engine.requests[0][1].seed}


@pytest.mark.parametrize("where", ["open", "engine", "tool"])
async def test_a_world_that_stays_broken_masks_the_rollout_and_is_never_graded(chat, where):
    def fail(*args: object) -> None:
        raise WorldError(f"{where} down")

    @tool
    def broken(text: str) -> str:
        """Is down.

        Args:
            text: anything
        """
        raise WorldError("tool down")

    world = World({"broken": broken}, on_open=fail if where == "open" else lambda rollout_id: None)

    def set_up(engine: Writer, grader: LengthGrader) -> None:
        if where == "engine":
            engine.before_turn = fail

    played = await play(chat, lambda prompt, seed: call("broken", text="a"), world=world, set_up=set_up)
    assert played.episode.stop_reason is StopReason.WORLD_FAULT
    assert played.episode.error == f"{where} down"
    assert played.rollout.grade is None and played.rollout.reward is None
    assert played.grader.graded == [] and len(world.closed) == 3


async def test_a_judge_that_cannot_be_reached_masks_the_rollout_with_its_cause(chat):
    def set_up(engine: Writer, grader: LengthGrader) -> None:
        grader.failures = 9

    played = await play(chat, lambda prompt, seed: "42", set_up=set_up, world_retries=1)
    assert played.rollout.grade is None and played.rollout.num_attempts == 2
    assert played.episode.error == "grader: the judge is out" and masked_by(played.rollout) is Masked.GRADER
    assert played.world.opened == ["r0"] and len(played.engine.requests) == 1, "it was not played again"


async def test_a_rollout_that_all_reward_functions_pass_over_is_masked_and_not_tried_again(chat):
    def set_up(engine: Writer, grader: LengthGrader) -> None:
        async def pass_over(task: Task, episode: Episode) -> Grade:
            raise Unscored("mine gave None")

        grader.grade = pass_over

    played = await play(chat, lambda prompt, seed: "42", set_up=set_up)
    assert played.rollout.grade is None and played.rollout.is_unscored and played.rollout.num_attempts == 1
    assert played.episode.error == "grader: mine gave None" and played.episode.stop_reason is StopReason.ANSWERED
    stored = json.loads(json.dumps(rollout_to_json(played.rollout)))
    assert rollout_from_json(stored) == played.rollout


async def test_an_episode_knows_its_tokens_behind_the_prompt_tool_results_included(chat):
    written = [call("echo", text="7"), "It is 7."]
    played = await play(chat, written)
    (ledger,) = played.rollout.ledgers
    ids = played.episode.completion_ids
    assert ids == tuple(ledger.prompt_ids[-len(ids) :]), "all tokens behind the prompt"
    text = chat.decode(ids)
    assert text.startswith(f"{written[0]}{STOP}") and text.endswith(f"{written[1]}{STOP}")
    assert "heard 7" in text
    stored = rollout_to_json(played.rollout)
    assert stored["episode"]["completion_ids"] is None, "the ledger holds them already"
    assert rollout_from_json(json.loads(json.dumps(stored))).episode.completion_ids == ids


async def test_a_judge_that_comes_back_grades_the_episode_that_was_played(chat):
    def set_up(engine: Writer, grader: LengthGrader) -> None:
        grader.failures = 1

    turns = [call("echo", text="a"), "42"]
    played = await play(chat, turns, set_up=set_up)
    assert played.rollout.reward == 1.0 and played.rollout.num_attempts == 2
    assert played.world.opened == ["r0"] and len(played.engine.requests) == 2 and executed == ["a"]
    assert played.grader.graded[0] == played.grader.graded[1] == played.episode and played.episode.error == ""


async def test_a_watching_grader_grades_the_same_episodes_and_costs_none_when_it_fails(chat):
    watch = LengthGrader()
    played = await play(chat, lambda prompt, seed: "42", num_rollouts=3, watch_grader=watch)
    assert [r.watch and r.watch.reward for r in played.rollouts] == [1.0] * 3
    assert {e.rollout_id for e in watch.graded} == {"r0", "r1", "r2"}
    watch.failures = 2
    played = await play(chat, lambda prompt, seed: "42", num_rollouts=3, watch_grader=watch)
    assert [r.reward for r in played.rollouts] == [1.0] * 3 and len(played.grader.graded) == 3
    assert sum(r.watch is None for r in played.rollouts) == 2


async def test_open_rollouts_are_noted_before_they_are_opened_and_after_they_are_closed(chat):
    live, world = LiveIds(), World(dict(TOOLS))

    def on_open(rollout_id: str) -> None:
        assert live.events[-1] == ("opened", rollout_id)
        if rollout_id == "r0":
            raise WorldError("not yet")

    world.on_open = on_open
    await play(chat, ["42"], world=world, live=live)
    assert live.events == [("opened", "r0"), ("closed", "r0"), ("opened", "r0-retry1"), ("closed", "r0-retry1")]


async def test_what_closes_though_the_step_is_cancelled_meanwhile_is_noted_as_closed(chat):
    closing, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Env):
        async def close(self, episode: Episode | None) -> None:
            closing.set()
            await go_on.wait()
            await super().close(episode)

    live, world = LiveIds(), World(dict(TOOLS))
    world.make_env = lambda: Slow(world)
    running = asyncio.create_task(play(chat, ["42"], world=world, live=live))
    await closing.wait()
    running.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert live.events == [("opened", "r0"), ("closed", "r0")]


async def test_what_an_environment_observes_at_its_opening_ends_the_prompt(chat):
    class Observed(Env):
        observation = " The door is red."

    world = World(dict(TOOLS))
    world.make_env = lambda: Observed(world)
    played = await play(chat, ["42"], world=world)
    assert played.episode.messages[0].content == "How much? The door is red."
    assert "How much? The door is red.<|im_end|>" in chat.decode(played.engine.requests[0][0])
    assert TASK.messages[0].content == "How much?"


def slow_remote(name: str) -> Tool:
    async def ask(asked: ToolCall) -> str:
        await asyncio.sleep(30)
        return asked.arguments

    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}
    return schema_tool({"type": "function", "function": {"name": name, "parameters": parameters}}, ask, is_remote=True)


async def test_a_remote_tool_that_outlasts_the_episode_masks_it(chat):
    world = World({"far": slow_remote("far")})
    played = await play(
        chat,
        lambda prompt, seed: call("far", text="a"),
        world=world,
        episode_timeout_s=0.5,
        tool_timeout_s=0.1,
        world_retries=0,
    )
    assert played.episode.stop_reason is StopReason.WORLD_FAULT and "far did not answer" in played.episode.error
    assert played.rollout.grade is None and played.grader.graded == []


async def test_tool_outputs_are_counted_in_tokens(chat):
    played = await play(chat, [call("echo", text="a b c"), "42"])
    (result,) = played.episode.turns[0].results
    assert result.num_tokens == len(chat._encode("heard a b c")) > 3


async def test_a_call_that_fails_for_good_stops_the_calls_beside_it(chat):
    cancelled = []

    @tool
    async def meet(name: str) -> str:
        """Meet.

        Args:
            name: who
        """
        if name == "broken":
            raise WorldError("server down")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(len(world.closed))
            raise
        return name

    world = World({"meet": meet})
    turn = "\n".join(call("meet", name=n) for n in ("waits", "broken"))
    played = await play(chat, [turn], world=world, world_retries=0)
    assert played.episode.stop_reason is StopReason.WORLD_FAULT
    assert cancelled == [0], "it ended before its environment was closed"


# --- our own faults


async def test_our_own_bug_passes_and_the_other_episodes_are_cancelled_and_closed(chat):
    @tool
    async def act(name: str) -> str:
        """Act.

        Args:
            name: who
        """
        raise KeyError("a bug")

    def script(prompt: str, seed: int) -> str:
        return call("act", name="x")

    async def hold() -> None:
        await asyncio.Event().wait()

    def set_up(engine: Writer, grader: LengthGrader) -> None:
        engine.before_turn = lambda number: hold() if number else None

    world = World({"act": act})
    with pytest.raises(KeyError, match="a bug"):
        await play(chat, script, world=world, num_rollouts=3, set_up=set_up)
    assert len(world.closed) == 3 and all(episode is None for _, episode in world.closed)


async def test_a_bug_is_raised_rather_than_a_fault_of_the_world_beside_it(chat):
    @tool
    async def act(name: str) -> str:
        """Act.

        Args:
            name: who
        """
        raise KeyError("a bug") if name == "bug" else WorldError("down")

    turn = "\n".join(call("act", name=n) for n in ("world", "bug"))
    with pytest.raises(KeyError, match="a bug"):
        await play(chat, [turn], world=World({"act": act}))


async def test_cancelling_the_step_closes_every_environment(chat):
    started = asyncio.Event()

    async def hold() -> None:
        started.set()
        await asyncio.Event().wait()

    def set_up(engine: Writer, grader: LengthGrader) -> None:
        engine.before_turn = lambda number: hold()

    world = World(dict(TOOLS))
    running = asyncio.create_task(play(chat, ["42"], world=world, num_rollouts=3, set_up=set_up))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(world.closed) == 3


# --- forks


async def test_a_template_that_drops_old_reasoning_forks_a_row_and_trains_each_token_once(smollm2, tmp_path):
    """The user's message that answers a malformed call makes the template drop the reasoning before it."""
    template = tmp_path / "template.jinja"
    template.write_text(TOY_TEMPLATE.replace("CALL_FORMAT", DIALECTS["hermes"]))
    chat = Chat(smollm2, chat_template=str(template), reasoning_parser="qwen3")
    turns = ["<think>\nhm\n</think>\n\n" + BROKEN_CALL, "<think>\nso\n</think>\n\n42"]
    played = await play(chat, turns)
    assert played.episode.stop_reason is StopReason.ANSWERED and played.episode.num_reasoning_tokens > 0
    assert len(played.rollout.ledgers) == 2
    second_prompt = played.engine.requests[1][0]
    assert "hm" not in chat.decode(second_prompt), "serving would not show it either"
    assert played.rollout.ledgers[1].prompt_ids[: len(second_prompt)] == second_prompt
