"""Rewards of turns: from tools, environments and graders, and penalties charged to the turns that caused them."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace

import pytest

from envs.errors import UserError, WorldError
from envs.tools import Rewarded, call_tool, tool
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.penalties import PenalisedGrader, PenaltiesConfig
from graders.types import Grade
from graders.user.custom import CustomConfig, load_custom_grader
from tests.support.episodes import World, play
from tests.support.scripted_engine import call
from trainer.config import RunConfig
from trainer.learning.advantages.attempts import attempt_of

TASK = Task(task_id="t", messages=(Message(role="user", content="?"),))


@tool
def dig(depth: int):
    """Dig.

    Args:
        depth: how deep
    """
    return Rewarded({"found": "gold"}, 0.25 * depth) if depth else "nothing"


def called(depth: int) -> ToolResult:
    made = ToolCall(call_id="c", name="dig", arguments=f'{{"depth": {depth}}}')
    return asyncio.run(call_tool({"dig": dig}, made, timeout_s=5))


def turn(*results: ToolResult, num_tokens: int = 10, malformed: bool = False) -> Turn:
    calls = tuple(ToolCall(call_id=r.call_id, name=r.name, arguments="{}") for r in results)
    said = Message(role="assistant", content="x", tool_calls=calls)
    return Turn(message=said, results=results, num_tokens=num_tokens, malformed=malformed)


def episode(*turns: Turn) -> Episode:
    messages = tuple(t.message for t in turns)
    return Episode(rollout_id="r", task_id="t", messages=messages, turns=turns, stop_reason=StopReason.ANSWERED)


@dataclass
class Fixed:
    grade_: Grade

    async def grade(self, task: Task, episode: Episode) -> Grade:
        return self.grade_


def graded(of: Episode, grade: Grade | None = None, *, floor: float | None = None, **penalties: object) -> Grade:
    grade = grade or Grade(reward=1.0, parts={"score": 1.0})
    threshold = 0.5 if floor is None else floor
    grader = PenalisedGrader(Fixed(grade), PenaltiesConfig(**penalties), threshold=threshold, floor=floor)
    return asyncio.run(grader.grade(TASK, of))


BAD = ToolResult(call_id="c", name="digg", output="Error", error=ToolErrorKind.UNKNOWN_TOOL)
GOOD = ToolResult(call_id="c", name="dig", output="gold")


def test_a_tool_may_say_what_a_call_was_worth_and_the_model_reads_its_output_alone():
    result = called(2)
    assert (result.reward, result.output) == (0.5, '{"found": "gold"}')
    assert (called(0).reward, called(0).output) == (None, "nothing")


@pytest.mark.parametrize("worth", [math.nan, math.inf, "much", None, True])
def test_a_tools_reward_that_is_no_finite_number_names_the_tool(worth):
    lucky = replace(dig, function=lambda depth: Rewarded("gold", worth))
    made = ToolCall(call_id="c", name="dig", arguments='{"depth": 1}')
    with pytest.raises(UserError, match="tool 'dig': reward: expected a finite number"):
        asyncio.run(call_tool({"dig": lucky}, made, timeout_s=5))


@pytest.mark.parametrize("worth", [1e308, -1e13, 10**400])
def test_a_tools_reward_that_no_gradient_could_hold_is_the_tools_fault(worth):
    lucky = replace(dig, function=lambda depth: Rewarded("gold", worth))
    made = ToolCall(call_id="c", name="dig", arguments='{"depth": 1}')
    with pytest.raises(WorldError, match=r"tool 'dig': reward is .*; expected a number from -1e\+12 to 1e\+12"):
        asyncio.run(call_tool({"dig": lucky}, made, timeout_s=5))


@pytest.mark.parametrize("by_turn", [(1e308, 1e308), (1e308, -1e308), (math.inf, -math.inf), (math.nan, 0.0)])
def test_rewards_by_turn_that_no_gradient_could_hold_are_the_graders_fault(by_turn):
    of = episode(turn(called(1)), turn())
    with pytest.raises(WorldError, match=r"score: turn 1's reward is .* for task 't'; expected a number from"):
        graded(of, Grade(reward=1.0, parts={"score": 1.0}, turn_rewards=by_turn))


@pytest.mark.parametrize(("part", "penalties"), [("turn_rewards", {}), ("kl", {}), ("tool_calls", {"tool_calls": 1})])
def test_no_part_of_a_grader_is_called_as_one_of_ours(part, penalties):
    settings = {name: {"slope": 0.1, "floor": -0.2} for name in penalties}
    with pytest.raises(UserError, match=f"^task 't': grader: parts: '{part}' is a part of the reward of the trainer's"):
        graded(episode(turn()), Grade(reward=1.0, parts={part: 1.0}), **settings)


def test_the_name_of_a_penalty_that_is_not_set_is_free():
    assert graded(episode(turn()), Grade(reward=1.0, parts={"tool_calls": 1.0})).parts == {"tool_calls": 1.0}


def test_rewards_of_turns_are_a_part_of_the_reward_and_decide_nothing_about_passing():
    grade = graded(episode(turn(called(1), called(2)), turn()), Grade(reward=0.0, parts={"score": 0.0}))
    assert grade.parts == {"score": 0.0, "turn_rewards": 0.75} and grade.reward == 0.75
    assert grade.turn_rewards == (0.75, 0.0) and grade.passed is False and grade.score == 0.0


def test_without_rewards_of_turns_nothing_is_told_of_them():
    grade = graded(episode(turn(GOOD), turn()), invalid_calls={"slope": 0.1, "floor": -0.3})
    assert grade.turn_rewards is None and grade.parts == {"score": 1.0, "invalid_calls": 0.0}


@pytest.mark.parametrize("by_turn", [False, True])
def test_an_invalid_call_is_charged_to_the_turn_that_made_it_and_the_reward_is_the_same(by_turn):
    of = episode(turn(GOOD), turn(BAD, BAD), turn(malformed=True), turn(BAD), turn())
    # The first is free, and past the floor nothing costs more.
    grade = graded(of, invalid_calls={"slope": 0.1, "floor": -0.25, "free": 1, "by_turn": by_turn})
    assert grade.reward == pytest.approx(0.75)
    if by_turn:
        assert grade.turn_rewards == pytest.approx((0.0, -0.1, -0.1, -0.05, 0.0))
    else:
        assert grade.turn_rewards is None


def test_what_is_held_at_the_threshold_or_not_due_is_so_by_turn_too():
    of = episode(turn(BAD), turn(BAD))
    held = graded(
        of,
        Grade(reward=0.6, parts={"score": 0.6}),
        floor=0.5,
        invalid_calls={"slope": 0.2, "floor": -0.4, "by_turn": True},
    )
    assert held.reward == pytest.approx(0.5) and held.turn_rewards == pytest.approx((-0.05, -0.05))
    wrong = Grade(reward=0.0, parts={"score": 0.0})
    free = graded(of, wrong, invalid_calls={"slope": 0.2, "floor": -0.4, "by_turn": True, "only_passing": True})
    assert free.reward == 0.0 and free.turn_rewards == (0.0, 0.0)


@pytest.mark.parametrize("length", [0, 99, 100, 101, 110, 119, 120, 500])
def test_a_penalty_on_generated_tokens_is_daposs_soft_punishment_of_overlong_answers(length):
    """Half of it, since scores of 0 and 1 are half as far apart as the paper's -1 and 1."""
    longest, buffer = 120, 20
    slope = {"free": longest - buffer, "slope": 0.5 / buffer, "floor": -0.5}
    exact = {"type": "string_check", "name": "same", "operation": "eq", "input": "x", "reference": "x"}
    RunConfig.model_validate({"output_dir": "x", "grader": exact, "penalties": {"generated_tokens": slope}})
    grade = graded(episode(turn(num_tokens=length)), generated_tokens=slope)
    expected = 0.0 if length <= longest - buffer else (longest - buffer - length) / buffer if length <= longest else -1
    assert 2 * grade.parts["generated_tokens"] == pytest.approx(expected)


def test_a_users_grader_gives_rewards_by_turn_one_a_turn(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from graders.types import Grade\n"
        "class Mine:\n"
        "    def grade(self, task, episode):\n"
        "        return Grade(reward=1.5, turn_rewards=(0.5, 0.0))\n"
        "class Other(Mine): pass\n"
    )
    one = load_custom_grader(CustomConfig(type="custom", target=f"{file}:Mine"))
    of = episode(turn(called(1)), turn())
    grade = asyncio.run(PenalisedGrader(one, PenaltiesConfig(), threshold=None, floor=None).grade(TASK, of))
    assert grade.reward == 1.75 and grade.turn_rewards == (0.75, 0.0)
    with pytest.raises(UserError, match="gave 2 turn_rewards for an episode of 1 turns"):
        asyncio.run(PenalisedGrader(one, PenaltiesConfig(), threshold=None, floor=None).grade(TASK, episode(turn())))
    targets = [{"target": f"{file}:Mine", "weight": 2.0}, f"{file}:Other"]
    summed = load_custom_grader(CustomConfig(type="custom", targets=targets))
    assert asyncio.run(summed.grade(TASK, of)).turn_rewards == (1.5, 0.0)


async def test_in_an_episode_tools_and_environment_reward_the_turn_and_the_rest_is_the_outcomes(chat):
    class Judging(World):
        def make_env(self):
            env = super().make_env()

            class Scoring(type(env)):
                turn_reward = 0.125

            return Scoring(self)

    def wrap(engine, grader):
        plain = grader.grade

        async def penalised(task, episode):
            return await PenalisedGrader(
                type("Plain", (), {"grade": staticmethod(plain)})(), PenaltiesConfig(), threshold=None, floor=None
            ).grade(task, episode)

        grader.grade = penalised

    played = await play(chat, [call("dig", depth=1), "42 million"], world=Judging({"dig": dig}), set_up=wrap)
    rollout = played.rollout
    assert [t.reward for t in played.episode.turns] == [0.375, 0.125]
    assert rollout.grade.turn_rewards == (0.375, 0.125) and rollout.reward == 1.5
    attempt = attempt_of(rollout)
    assert attempt.outcome == 1.0 and attempt.turn_rewards_T == (0.375, 0.125)
    assert [ledger.turns[-1] for ledger in rollout.ledgers][-1] == 1
