"""The user's own graders: classes, and TRL-style reward functions held against trl's own trainer."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from envs.custom.trl_env import live_environment
from envs.custom.world import CustomEnvConfig, CustomWorld
from envs.errors import Unscored, UserError, WorldError
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from envs.user_code import load_target
from graders.build import build_grader
from graders.config import GraderConfig
from graders.penalties import PenaltiesConfig, PenaltyConfig
from graders.types import Grade, GraderErrorKind, check_numbers
from graders.user.custom import CustomConfig, conversation, load_custom_grader

PROMPT = (Message(role="system", content="Be brief."), Message(role="user", content="What is in the drawer?"))
TASK = Task(task_id="t", messages=PROMPT, item={"code": 7, "answer": "gold"})
TOKENS = (0, 0, 1, 0, 2)


def played(answer: str | None = "gold", *, rollout_id: str = "r", output: str = "it opens") -> Episode:
    """Two calls of one turn, one of the next, then the answer."""
    calls = [
        Message(
            role="assistant",
            content="Let me see.",
            tool_calls=(
                ToolCall(call_id="c1", name="turn", arguments='{"code": 7}'),
                ToolCall(call_id="c2", name="look", arguments="{}"),
            ),
        ),
        Message(role="assistant", tool_calls=(ToolCall(call_id="c3", name="look", arguments="{}"),)),
    ]
    outputs = [(("c1", "turn", output), ("c2", "look", "something shines")), (("c3", "look", "something shines"),)]
    turns, messages = [], list(PROMPT)
    for message, given in zip(calls, outputs, strict=True):
        results = tuple(ToolResult(call_id=c, name=n, output=o) for c, n, o in given)
        turns.append(Turn(message=message, results=results))
        messages.append(message)
        messages += [Message(role="tool", content=r.output, call_id=r.call_id, name=r.name) for r in results]
    if answer is not None:
        turns.append(Turn(message=Message(role="assistant", content=answer)))
        messages.append(turns[-1].message)
    stop = StopReason.MAX_TURNS if answer is None else StopReason.ANSWERED
    return Episode(rollout_id=rollout_id, task_id="t", messages=tuple(messages), turns=tuple(turns), stop_reason=stop)


# ---- what users write; loaded by name from this file


class Drawer:
    """A TRL-style environment."""

    def reset(self, code: int, **row: Any) -> str:
        self.code, self.reward = code, 0.0
        return " It is locked."

    def turn(self, code: int) -> str:
        """Turn the lock.

        Args:
            code: what to dial
        """
        self.reward = float(code == self.code)
        return "it opens"

    def look(self) -> str:
        """Look into it."""
        return "something shines"

    async def get_reward(self) -> float:
        return self.reward


class Checks:
    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus
        self.closed = False

    def grade(self, task: Task, episode: Episode) -> float:
        self.thread = threading.current_thread().name
        return float(episode.answer == task.item["answer"]) + self.bonus

    def check(self, task: Task) -> None:
        if "answer" not in task.item:
            raise UserError(f"task {task.task_id!r}: no answer")

    async def aclose(self) -> None:
        self.closed = True


class Grades:
    async def grade(self, task: Task, episode: Episode) -> Grade:
        return Grade(reward=0.75, explanation="nearly", errors=(GraderErrorKind.OTHER,))


class Parts:
    async def grade(self, task: Task, episode: Episode) -> Grade:
        return Grade(reward=0.75, parts={"style": 0.5, "fact": 0.25 if episode.answer == "gold" else 0.0})


class Odd:
    """Gives a Grade that holds `number` under `key`."""

    def __init__(self, key: str, number: str) -> None:
        self.key, self.number = key, float(number)

    def grade(self, task: Task, episode: Episode) -> Grade:
        if self.key == "reward":
            return Grade(reward=self.number)
        if self.key == "parts":
            return Grade(reward=0.5, parts={"style": 0.5, "fact": self.number})
        return Grade(reward=0.5, scores={"style": self.number})


def leaves(completions: list[Any], **kwargs: Any) -> list[float]:
    sys.exit(0)


class Callable_:
    async def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(c)) for c in completions]


seen: dict[str, Any] = {}


def record(**kwargs: Any) -> list[float]:
    seen.update(kwargs)
    return [0.5]


def by_name(completions: list[Any], answer: list[str]) -> list[float]:
    return [float(c[-1]["content"] == a) for c, a in zip(completions, answer, strict=True)]


async def in_time(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(prompts))]


def logs(completions: list[Any], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[bool]:
    log_extra("extracted", [c[-1]["content"] for c in completions])
    log_metric("num_messages", len(completions[0]))
    return [True]


def none_at_all(completions: list[Any], **kwargs: Any) -> list[float | None]:
    return [None]


def not_finite(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float("nan")]


def too_many(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0, 2.0]


def no_list(completions: list[Any], **kwargs: Any) -> float:
    return 1.0


def fails(completions: list[Any], **kwargs: Any) -> list[float]:
    raise KeyError("gold")


def unreachable(completions: list[Any], **kwargs: Any) -> list[float]:
    raise WorldError("the judge is gone")


def wants_tokens(completions: list[Any], completion_ids: list[Any], **kwargs: Any) -> list[float]:
    return [1.0]


def wants_the_trainer(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
    return [1.0]


def counts_tokens(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def get_bonus(size: float = 0.5) -> Any:
    def bonus(completions: list[Any], **kwargs: Any) -> list[float]:
        return [size] * len(completions)

    return bonus


class Forgets:
    async def grade(self, task: Task, episode: Episode) -> float:  # type: ignore[empty-body]
        score = max([len(message.content) for message in episode.messages], key=lambda n: -n)
        if score:
            self.score = score


class SometimesForgets:
    """Its last branch has no `return`."""

    def grade(self, task: Task, episode: Episode) -> float | None:  # noqa: RET503
        if episode.answer == "gold":
            return 1.0


class PassesOver:
    def grade(self, task: Task, episode: Episode) -> float:
        raise Unscored("mine gave None")


class NoNumber:
    def grade(self, task: Task, episode: Episode) -> Grade:
        return Grade(reward=None)  # type: ignore[arg-type]


def as_dict(completions: list[Any], **kwargs: Any) -> dict[str, float]:
    return {"reward": 1.0}


def as_text(completions: list[Any], **kwargs: Any) -> str:
    return "5"


def of_dicts(completions: list[Any], **kwargs: Any) -> list[dict[str, float]]:
    return [{"reward": 1.0}]


def of_texts(completions: list[Any], **kwargs: Any) -> list[str]:
    return ["0.5"]


def as_array(completions: list[Any], **kwargs: Any) -> Any:
    return np.array([0.5])


def as_scalar(completions: list[Any], **kwargs: Any) -> Any:
    return np.array(0.5)


def by_position(completions: list[Any], /, **kwargs: Any) -> list[float]:
    return [1.0]


def singular(prompt: str, completion: str, **kwargs: Any) -> list[float]:
    return [1.0]


class Gives:
    def __init__(self, what: str) -> None:
        kinds: dict[str, Any] = {
            **{"true": True, "numpy": np.bool_(True), "decimal": Decimal("0.25"), "array": np.array(0.25)},
            **{"tensor": torch.tensor(0.25), "text": "0.5", "dict": {"score": 1.0}, "list": [1.0], "huge": 10**400},
            "axes": np.ones(1),
        }
        self._value = kinds[what]

    def grade(self, task: Task, episode: Episode) -> Any:
        return self._value


class Hosted:
    def grade(self, sample: dict[str, Any], item: dict[str, Any]) -> float:
        return 1.0


class HostedSwapped:
    def grade(self, item: dict[str, Any], sample: dict[str, Any]) -> float:
        return 1.0


class Swapped:
    async def grade(self, episode: Episode, task: Task) -> float:
        return 1.0


class TooFew:
    def grade(self, episode: Episode) -> float:
        return 1.0


class TooMany:
    def grade(self, task: Task, episode: Episode, gold: str) -> float:
        return 1.0


class AnyNames:
    def grade(self, row: Any, played: Any, *more: Any, weight: float = 1.0, **rest: Any) -> float:
        return weight


def of_numbers(x: float) -> float:
    return x


def grader(name: str, **kwargs: Any) -> Any:
    return load_custom_grader(CustomConfig(type="custom", name="mine", target=f"{__file__}:{name}", kwargs=kwargs))


def built(name: str, **kwargs: Any) -> Any:
    config = CustomConfig(type="custom", name="mine", target=f"{__file__}:{name}", kwargs=kwargs)
    return build_grader(config, PenaltiesConfig())


def of_file(name: str) -> Any:
    return load_target(f"{__file__}:{name}", key="test")


# ---- classes


async def test_a_class_grades_with_its_kwargs_off_the_event_loop() -> None:
    checks = grader("Checks", bonus=0.25)
    grade = await checks.grade(TASK, played())
    assert (grade.reward, grade.parts) == (1.25, {"mine": 1.25})
    assert (await checks.grade(TASK, played("lead"))).reward == 0.25
    with pytest.raises(UserError, match="no answer"):
        checks.check(Task(task_id="t", messages=PROMPT))
    await checks.aclose()
    assert not hasattr(grader("Grades"), "check")


async def test_a_class_may_give_a_whole_grade() -> None:
    grade = await grader("Grades").grade(TASK, played())
    assert (grade.reward, grade.parts, grade.explanation) == (0.75, {"mine": 0.75}, "nearly")
    assert grade.errors == (GraderErrorKind.OTHER,)
    assert (await grader("Parts").grade(TASK, played())).parts == {"style": 0.5, "fact": 0.25}
    with pytest.raises(ValueError, match=r"reward 0.75 is not the sum of parts"):
        await grader("Parts").grade(TASK, played("lead"))


async def test_penalties_are_taken_off_a_custom_score() -> None:
    config = CustomConfig(type="custom", name="mine", target=f"{__file__}:by_name", pass_threshold=1.0)
    penalties = PenaltiesConfig(tool_calls=PenaltyConfig(free=1, slope=0.1, floor=-0.5))
    built = build_grader(config, penalties, tasks=[TASK])
    assert (await built.grade(TASK, played("lead"))).reward == pytest.approx(-0.2)
    assert (await built.grade(TASK, played("gold"))).reward == 1.0


# ---- reward functions


async def test_reward_functions_get_what_they_name_and_are_sync_or_async() -> None:
    assert (await grader("by_name").grade(TASK, played("gold"))).parts == {"mine": 1.0}
    assert (await grader("by_name").grade(TASK, played("lead"))).reward == 0.0
    assert (await grader("in_time").grade(TASK, played())).reward == 1.0
    written = TASK.messages
    assert len(played().messages) - len(written) == 6
    callable_object = load_custom_grader(CustomConfig(type="custom", target=f"{__file__}:Callable_"))
    assert (await callable_object.grade(TASK, played())).reward == 6.0


async def test_what_a_function_logs_is_kept() -> None:
    logging = grader("logs")
    assert (await logging.grade(TASK, played("gold"))).explanation == "extracted: gold"
    await logging.grade(TASK, played(None))
    assert logging.take_metrics() == {"num_messages": 5.5}
    assert logging.take_metrics() == {}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("not_finite", "grader 'mine' gave nan; expected a finite number"),
        ("too_many", "reward function 'mine': expected one reward for one completion, got 2"),
        ("no_list", "reward function 'mine': expected a list with one reward, got float"),
        ("as_dict", "reward function 'mine': expected a list with one reward, got dict"),
        ("as_text", "reward function 'mine': expected a list with one reward, got str"),
        ("as_scalar", "reward function 'mine': expected a list with one reward, got ndarray"),
        ("of_dicts", "grader 'mine' gave dict; expected a number"),
        ("of_texts", "grader 'mine' gave str; expected a number"),
    ],
)
async def test_no_reward_is_never_taken_for_one(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        await grader(name).grade(TASK, played())
    assert not isinstance(caught.value, WorldError)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("key", ["reward", "parts", "scores"])
async def test_no_number_of_a_grade_is_taken_that_is_none_and_task_and_grader_are_named(key: str, number: str) -> None:
    with pytest.raises(UserError, match=rf"^task 't': grader 'mine'.* gave {number}; expected a finite number"):
        await built("Odd", key=key, number=number).grade(TASK, played())


@pytest.mark.parametrize("inside", ["multi", "targets"])
async def test_it_is_named_inside_other_graders_too(inside: str) -> None:
    targets = {"odd": f"{__file__}:not_finite", "same": f"{__file__}:by_name"}
    settings: dict[str, Any] = {"type": "custom", "targets": list(targets.values())}
    if inside == "multi":
        graders = {name: {"type": "custom", "name": name, "target": target} for name, target in targets.items()}
        settings = {"type": "multi", "graders": graders, "calculate_output": "odd + same"}
    config: Any = TypeAdapter(GraderConfig).validate_python(settings)
    with pytest.raises(UserError, match=r"^task 't': grader '(odd|not_finite)' gave nan; expected a finite number"):
        await build_grader(config, PenaltiesConfig()).grade(TASK, played())


def test_a_number_that_no_gradient_could_hold_loses_its_rollout_and_names_task_and_grader() -> None:
    with pytest.raises(WorldError, match=r"^mine: reward is 1e\+300 for task 't'; expected a number from -1e\+12 to"):
        check_numbers(Grade(reward=1e300, parts={"mine": 1e300}), TASK)
    with pytest.raises(WorldError, match=r"^mine: style is nan for task 't'"):
        check_numbers(Grade(reward=1.0, parts={"mine": 1.0}, scores={"style": float("nan")}), TASK)
    check_numbers(Grade(reward=-1e12, parts={"mine": -1e12}), TASK)


async def test_a_grader_that_exits_ends_no_run() -> None:
    with pytest.raises(RuntimeError, match=r"leaves called sys\.exit\(0\)"):
        await built("leaves").grade(TASK, played())


@pytest.mark.parametrize(
    ("what", "score"), [("true", 1.0), ("numpy", 1.0), ("decimal", 0.25), ("array", 0.25), ("tensor", 0.25)]
)
async def test_whatever_says_itself_what_number_it_is_is_a_score(what: str, score: float) -> None:
    assert (await grader("Gives", what=what).grade(TASK, played())).reward == score
    assert (await grader("as_array").grade(TASK, played())).reward == 0.5


@pytest.mark.parametrize(
    ("what", "told"), [("text", "str"), ("dict", "dict"), ("list", "list"), ("axes", "ndarray"), ("huge", "inf")]
)
async def test_what_is_no_number_is_no_score(what: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"grader 'mine' gave {told}; expected a"):
        await grader("Gives", what=what).grade(TASK, played())


async def test_the_parameters_of_a_class_may_have_any_names() -> None:
    assert (await grader("AnyNames").grade(TASK, played())).reward == 1.0


@pytest.mark.parametrize("name", ["none_at_all", "PassesOver"])
async def test_a_reward_of_none_masks_the_rollout(name: str) -> None:
    with pytest.raises(Unscored, match="mine gave None"):
        await grader(name).grade(TASK, played())


async def test_a_class_that_gives_none_is_refused_alone_and_in_a_sum() -> None:
    assert (await grader("SometimesForgets").grade(TASK, played("gold"))).reward == 1.0
    for gives in (grader("SometimesForgets"), summed("by_name", "SometimesForgets")):
        with pytest.raises(UserError, match=r"grader '(mine|SometimesForgets)' gave None; expected a number or a Gra"):
            await gives.grade(TASK, played("lead"))
    with pytest.raises(UserError, match="grader 'mine' gave NoneType; expected a number"):
        await grader("NoNumber").grade(TASK, played())


async def test_errors_of_the_users_code_stop_the_run_and_name_the_grader() -> None:
    with pytest.raises(KeyError) as caught:
        await grader("fails").grade(TASK, played())
    assert caught.value.__notes__ == ["raised by the grader 'mine'"]
    with pytest.raises(KeyError) as caught:
        await built("fails").grade(TASK, played())
    assert caught.value.__notes__ == ["raised by the grader 'mine'", "for task 't', rollout 'r'"]
    with pytest.raises(WorldError, match="the judge is gone"):
        await grader("unreachable").grade(TASK, played())


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("wants_the_trainer", {}, "'trainer_state' can't be given: graders do not know the trainer"),
        ("by_position", {}, "parameter 'completions' is given by its name; expected none before a /"),
        ("singular", {}, "'prompt' can't be given: expected prompts"),
        ("Hosted", {}, r"grade is called as grade\(task, episode\); sample and item are a python grader's"),
        ("HostedSwapped", {}, r"grade is called as grade\(task, episode\); sample and item are"),
        ("Swapped", {}, r"grade is called as grade\(task, episode\), but: its parameters are episode, task, in this"),
        ("TooFew", {}, r"grade is called as grade\(task, episode\), but: too many positional arguments"),
        ("TooMany", {}, r"grade is called as grade\(task, episode\), but: missing a required argument: 'gold'"),
        ("of_numbers", {}, r"expected a function f\(prompts, completions, \*\*columns\)"),
        ("seen", {}, r"expected a class with grade\(task, episode\) or a function .*, got dict"),
        ("by_name", {"x": 1}, "kwargs: got an unexpected keyword argument 'x'|kwargs: missing a required argument"),
        ("seen", {"x": 1}, "kwargs: a class or a factory is called with them, not dict"),
        ("get_bonus", {"x": 1}, "kwargs: got an unexpected keyword argument 'x'"),
        ("Checks", {"x": 1}, "kwargs: got an unexpected keyword argument 'x'"),
    ],
)
def test_a_target_that_is_no_grader_is_named(name: str, kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        grader(name, **kwargs)


def test_a_class_that_forgets_to_return_is_told_before_it_is_asked() -> None:
    with pytest.raises(UserError, match=r":Forgets': grade has no `return`; expected one with a number or a Grade"):
        grader("Forgets")


def test_a_row_without_a_column_that_the_function_needs_is_told_before_the_run() -> None:
    row = Task(task_id="t9", messages=PROMPT, item={"gold": 1})
    config = CustomConfig(type="custom", target=f"{__file__}:by_name")
    with pytest.raises(UserError, match=r"task 't9' has no key 'answer', which the function needs"):
        build_grader(config, PenaltiesConfig(), tasks=[TASK, row])


async def test_factories_make_reward_functions() -> None:
    assert (await grader("get_bonus", size=0.25).grade(TASK, played())).reward == 0.25
    assert (await grader("get_bonus").grade(TASK, played())).reward == 0.5, (
        "one that needs nothing is called all the same"
    )


async def test_a_function_of_tokens_is_given_those_behind_the_prompt_or_says_that_there_are_none() -> None:
    counting = grader("counts_tokens")
    assert (await counting.grade(TASK, replace(played(), completion_ids=(5, 6, 7)))).reward == 3.0
    with pytest.raises(UserError, match="needs 'completion_ids', but this sample has no tokens"):
        await counting.grade(TASK, played())


def summed(*targets: Any) -> Any:
    named = [f"{__file__}:{t}" if isinstance(t, str) else t | {"target": f"{__file__}:{t['target']}"} for t in targets]
    return load_custom_grader(CustomConfig.model_validate({"type": "custom", "name": "sum", "targets": named}))


async def test_the_reward_of_several_functions_is_their_weighted_sum_and_none_is_left_out() -> None:
    both = summed(
        {"target": "by_name", "weight": 2}, "none_at_all", {"target": "get_bonus", "kwargs": {"size": 0.25}}, "Checks"
    )
    grade = await both.grade(TASK, played("gold"))
    assert (grade.reward, grade.parts) == (3.25, {"sum": 3.25})
    assert grade.scores == {"by_name": 1.0, "get_bonus": 0.25, "Checks": 1.0}
    assert grade.explanation == "by_name 1; none_at_all gave None; get_bonus 0.25; Checks 1"
    with pytest.raises(UserError, match="no key 'answer'"):
        both.check(Task(task_id="t", messages=PROMPT, item={}))
    await both.aclose()


async def test_where_all_functions_give_none_the_rollout_is_masked() -> None:
    with pytest.raises(Unscored, match="sum: every one of none_at_all, none_at_all_2 gave None"):
        await summed("none_at_all", "none_at_all").grade(TASK, played())
    with pytest.raises(KeyError):
        await summed("none_at_all", "fails").grade(TASK, played())


@pytest.mark.parametrize(
    "settings", [{}, {"target": "a:b", "targets": ["c:d"]}, {"targets": ["a:b"], "kwargs": {"x": 1}}, {"targets": []}]
)
def test_either_a_target_or_targets_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CustomConfig.model_validate({"type": "custom", **settings})


async def test_the_rewards_that_trl_ships_give_here_what_they_give_there() -> None:
    """All in a sum, held against trl's own functions and its rule for None."""
    from trl import rewards

    factories = {
        "get_soft_overlong_punishment": {"max_completion_len": 8, "soft_punish_cache": 4},
        "get_cosine_scaled_reward": {"max_len": 10},
        "get_repetition_penalty_reward": {"ngram_size": 2},
    }
    plain = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
    shipped = {**{name: {} for name in plain}, **factories}
    assert set(shipped) == {name for names in rewards._import_structure.values() for name in names}
    functions = {n: getattr(rewards, n)(**k) if k else getattr(rewards, n) for n, k in shipped.items()}
    targets = [{"target": f"trl.rewards:{n}", "kwargs": k, "weight": 0.5} for n, k in shipped.items()]
    all_of_them = load_custom_grader(CustomConfig.model_validate({"type": "custom", "targets": targets}))
    cases = [
        (r"<think>Half of it.</think>It is $\boxed{\frac{1}{2}}$", r"$\frac{1}{2}$", (1, 2, 3, 4, 5)),
        (r"It is $\boxed{3}$", "$4$", (7, 7, 7, 7, 7, 7)),
        (r"<think>Who knows?</think>It is $\boxed{3}$", "no number", tuple(range(12))),
    ]
    num_none = 0
    for answer, solution, tokens in cases:
        task = Task(task_id="t", messages=PROMPT, item={"solution": solution})
        message = Message(role="assistant", content=answer)
        episode = Episode(
            rollout_id="r",
            task_id="t",
            messages=(*PROMPT, message),
            turns=(Turn(message=message),),
            stop_reason=StopReason.ANSWERED,
            completion_ids=tokens,
        )
        theirs = {
            name: function(
                prompts=[[]], completions=[[{"content": answer}]], completion_ids=[list(tokens)], solution=[solution]
            )[0]
            for name, function in functions.items()
        }
        grade = await all_of_them.grade(task, episode)
        assert grade.scores == {name: reward for name, reward in theirs.items() if reward is not None}
        assert grade.reward == pytest.approx(sum(0.5 * reward for reward in theirs.values() if reward is not None))
        num_none += sum(reward is None for reward in theirs.values())
    assert num_none == 3


# ---- environments that own the reward


async def test_the_environment_gives_the_reward_while_its_rollout_is_open(tmp_path: Path) -> None:
    env = CustomWorld(CustomEnvConfig(type="custom", target=f"{__file__}:Drawer")).make_env()
    owned = load_custom_grader(CustomConfig(type="custom", name="env", target="graders.custom:EnvReward"))
    await env.open(TASK, "r-1")
    assert (await owned.grade(TASK, played(rollout_id="r-1"))).reward == 0.0
    await env.tools["turn"].function(code=7)
    assert (await owned.grade(TASK, played(rollout_id="r-1"))).parts == {"env": 1.0}
    environment = live_environment("r-1")
    assert environment is not None
    environment.reward = None
    with pytest.raises(Unscored, match="get_reward gave None"):
        await owned.grade(TASK, played(rollout_id="r-1"))
    await env.close(None)
    with pytest.raises(UserError, match=r"EnvReward': expected a world of type custom .* rollout 'r-1' has none"):
        await owned.grade(TASK, played(rollout_id="r-1"))


# ---- the contract with trl


def test_malformed_turns_and_odd_arguments_keep_their_place() -> None:
    bad = Message(role="assistant", tool_calls=(ToolCall(call_id="c", name="turn", arguments="{code"),))
    error = ToolResult(call_id="c", name="turn", output="Error: not JSON", error=ToolErrorKind.BAD_ARGUMENTS)
    told = Message(role="user", content="Error: could not be parsed")
    garbled = Message(role="assistant", content="<tool_call>{")
    episode = Episode(
        rollout_id="r",
        task_id="t",
        messages=(
            *PROMPT,
            bad,
            Message(role="tool", content=error.output, call_id="c", name="turn"),
            garbled,
            told,
        ),
        turns=(Turn(message=bad, results=(error,)), Turn(message=garbled, malformed=True)),
        stop_reason=StopReason.MAX_TURNS,
    )
    prompt, completion = conversation(TASK, episode)
    assert prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT[1].content}]
    assert [message["role"] for message in completion] == ["assistant", "tool", "assistant", "user"]
    assert completion[0]["tool_calls"][0]["function"] == {"name": "turn", "arguments": "{code"}


def test_of_a_row_whose_prompt_is_text_prompt_and_completion_are_text_as_in_trl() -> None:
    answer = Message(role="assistant", content="gold", reasoning="It shines.")
    episode = Episode(
        rollout_id="r",
        task_id="t",
        messages=(PROMPT[1], answer),
        turns=(Turn(message=answer),),
        stop_reason=StopReason.ANSWERED,
    )
    question = PROMPT[1].content
    row = Task(task_id="t", messages=(PROMPT[1],), item={"prompt": question, "answer": "gold"})
    assert conversation(row, episode) == (question, "gold")
    for item in ({"prompt": [{"role": "user", "content": question}]}, {"prompt": question, "messages": []}):
        prompt, completion = conversation(replace(row, item=item), episode)
        assert prompt == [{"role": "user", "content": question}] and completion[0]["content"] == "gold"


class _Parsed:
    """A tokenizer whose token n stands for the n-th parsed message."""

    response_template = None
    response_schema = "given"
    eos_token = "</s>"

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._messages = messages

    def parse_response(self, ids: list[int]) -> dict[str, Any]:
        return json.loads(json.dumps(self._messages[ids[0]]))


def trl_trainer(written: list[dict[str, Any]], environment: Any, reward: Any) -> Any:
    """What trl's methods need of a trainer, without a model."""
    turns = iter(range(1, len(written)))
    tools = {"turn": environment.turn, "look": environment.look}
    return SimpleNamespace(
        max_tool_calling_iterations=10,
        max_completion_length=10_000,
        use_vllm=False,
        _is_vlm=False,
        model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10_000)),
        tools=list(tools.values()),
        environment_factories=None,
        environments=[environment],
        _sync_tool_dicts=[tools],
        _async_tool_dicts=[{}],
        _tokenizer=_Parsed(written),
        _get_tool_suffix_ids=lambda messages: [0],
        _generate_single_turn=lambda *args, **kwargs: ([[next(turns)]], None),
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=1),
        reward_funcs=[reward],
        reward_func_names=["record"],
        reward_processing_classes=[None],
        _log_completion_extra=lambda column, values: None,
        _log_metric=lambda name, value: None,
    )


async def test_a_reward_function_is_called_as_trl_calls_it() -> None:
    """trl's own tool loop and reward code on one side, ours on the other; the same function records what it gets."""
    from accelerate import PartialState
    from trl import GRPOTrainer

    PartialState(cpu=True)
    env = CustomWorld(CustomEnvConfig(type="custom", target=f"{__file__}:Drawer")).make_env()
    await env.open(TASK, "r-1")
    recorder, recorded = grader("record"), of_file("seen")
    recorded.clear()
    assert (await recorder.grade(TASK, replace(played(rollout_id="r-1"), completion_ids=TOKENS))).reward == 0.5
    ours = dict(recorded)
    await env.close(None)

    def asks(content: str, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        functions = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
        return {"role": "assistant", "content": content, "tool_calls": functions}

    written = [
        asks("Let me see.", ("turn", {"code": 7}), ("look", {})),
        asks("", ("look", {})),
        {"role": "assistant", "content": "gold"},
    ]
    prompt = [{"role": m.role, "content": m.content} for m in PROMPT]
    drawer = of_file("Drawer")()
    assert drawer.reset(prompt=prompt, **TASK.item) == getattr(env, "observation")  # noqa: B009
    trainer = trl_trainer(written, drawer, of_file("record"))
    _, completions, completion_ids, *_ = GRPOTrainer._tool_call_loop(
        trainer, [list(prompt)], [[9]], [[0]], [[_Parsed(written).parse_response([0])]], None, None, {}
    )
    # Each turn is one token there, and so is what follows each turn's calls.
    assert completion_ids == [list(TOKENS)]
    recorded.clear()
    rewards = GRPOTrainer._calculate_rewards(
        trainer, [{"prompt": prompt, **TASK.item}], [prompt], completions, completion_ids
    )
    theirs = dict(recorded)

    assert rewards.tolist() == [[0.5]]
    assert set(theirs) - set(ours) == {"trainer_state"}
    assert set(ours) <= set(theirs)
    for key in ("prompts", "completions", "completion_ids", "code", "answer"):
        assert ours[key] == theirs[key], key
    assert [type(e).__name__ for e in ours["environments"]] == ["Drawer"]
