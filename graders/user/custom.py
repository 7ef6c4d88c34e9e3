"""The user's own graders: a class with `grade(task, episode)`, or a TRL-style reward function, accepted as it is.

A class: `grade` is sync or async and gives a `Grade` or a number; to pass a rollout over it raises `Unscored`. It may
have `check(task)`, `async aclose()` and `take_metrics()`, as graders have.

A reward function is called as trl's GRPOTrainer calls it, with a batch of one: `prompts` and `completions` are lists of
message lists (tool calls with their arguments decoded, without ids), `completion_ids` the token ids behind the prompt
(tool results included, up to the last that the model sampled), every key of the row is a list, `log_extra(column,
values)` and `log_metric(name, value)` are there, and `environments` where the world's are TRL-style. It gives
`list[float | None]`, sync or async. Where it has no `**kwargs` it gets what it names. A factory of reward functions is
called with `kwargs`, or without any where it needs none. Not covered: `trainer_state`, which graders do not know (a
function that needs it is refused), and reward models (trl scores those itself).

Of several `targets` the reward is the weighted sum. A reward function's None passes the rollout over, as in trl: the
other rewards make up the sum; where all give None, `Unscored` masks the rollout. Errors of the user's code stop the
run, `WorldError` aside, which masks the rollout; so does a reward that is no finite number (`UserError`), and a class's
None: it is what a branch without a `return` gives. Sync code runs in a thread.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from envs.base import Checks, Closes, Counts
from envs.custom.trl_env import live_environment
from envs.errors import Unscored, UserError, first_error, nearest
from envs.messages import trl_form
from envs.settings import Kwargs, Settings
from envs.types import Episode, Task
from envs.user_code import (
    TARGET_PATTERN,
    accepted,
    call_user,
    check_order,
    forgets_to_return,
    load_target,
    looked_at,
    make,
    raised_by,
    required,
    required_by_name,
)
from graders.sandbox.scores import score_of
from graders.settings import Continuous, Name
from graders.types import Grade, Grader, taken_metrics

_RESERVED = ("prompt", "completion", "completion_ids")
"""Columns that trl does not hand on."""
_COMPLETIONS = ("prompts", "completions", "completion_ids")
_OFFERED = (*_COMPLETIONS, "log_extra", "log_metric", "environments")
_NEVER_GIVEN = {
    "trainer_state": "graders do not know the trainer",
    "prompt": "expected prompts",
    "completion": "expected completions",
}
_MARGIN = 1e-9


class CustomTarget(Settings):
    """One of several graders of the user's own, whose rewards are summed."""

    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:Name` or `path/to/file.py:name`.")
    kwargs: Kwargs = Field(default={}, description="A class or a factory is called with them.")
    weight: float = Field(default=1.0, description="What its reward is multiplied with, as trl's reward_weights.")


class CustomConfig(Continuous):
    """The user's own Python: classes with `grade(task, episode)`, or TRL-style reward functions."""

    type: Literal["custom"]
    name: Name = "custom"
    target: str | None = Field(
        default=None, pattern=TARGET_PATTERN, description="`package.module:Name` or `path/to/file.py:name`."
    )
    kwargs: Kwargs = Field(default={}, description="A class or a factory is called with them.")
    targets: list[CustomTarget] | None = Field(
        default=None,
        min_length=1,
        description="Several, in place of target: the reward is the weighted sum, as trl's reward_funcs give it. Names "
        "of targets, or {target, kwargs, weight}.",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _by_name(cls, targets: Any) -> Any:
        return [{"target": t} if isinstance(t, str) else t for t in targets] if isinstance(targets, list) else targets

    @model_validator(mode="after")
    def _has_one_form(self) -> CustomConfig:
        if (self.target is None) == (self.targets is None):
            raise ValueError("expected target or targets, one of the two")
        if self.targets is not None and self.kwargs:
            raise ValueError("kwargs: with targets they stand beside each target")
        return self


def load_custom_grader(config: CustomConfig) -> Grader:
    """Raises `UserError` for a target that can't be loaded or is no grader."""
    if config.target is not None:
        return _load(config.target, config.kwargs, config.name, key="grader.target")
    assert config.targets is not None, "target or targets, the config says"
    parts: dict[str, tuple[Grader, float]] = {}
    for place, part in enumerate(config.targets):
        name = part.target.rpartition(":")[2].rpartition(".")[2]
        name = f"{name}_{place + 1}" if name in parts else name
        parts[name] = (_load(part.target, part.kwargs, name, key=f"grader.targets.{place}.target"), part.weight)
    return _SumOfRewards(parts, config.name)


def _load(name: str, kwargs: Mapping[str, Any], grader_name: str, *, key: str) -> Grader:
    where = f"{key} {name!r}"
    target = load_target(name, key=key)
    is_factory = callable(target) and not isinstance(target, type) and not callable(getattr(target, "grade", None))
    if isinstance(target, type) or (is_factory and (kwargs or _is_bare_factory(target))):
        with looked_at(where):
            target = make(target, kwargs, where=where)
    elif kwargs:
        raise UserError(f"{where}: kwargs: a class or a factory is called with them, not {type(target).__name__}")
    if callable(getattr(target, "grade", None)):
        _check_grade(target.grade, where)
        return _ClassGrader(target, grader_name)
    if callable(target):
        return _FunctionGrader(target, grader_name, where=where)
    raise UserError(
        f"{where}: expected a class with grade(task, episode) or a function f(prompts, completions, **columns), got "
        f"{type(target).__name__}"
    )


def _check_grade(grade: Callable[..., Any], where: str) -> None:
    names = check_order(grade, ("task", "episode"), f"{where}: grade")
    if sorted(names) == ["item", "sample"]:
        raise UserError(f"{where}: grade is called as grade(task, episode); sample and item are a python grader's")
    if forgets_to_return(grade):
        raise UserError(f"{where}: grade has no `return`; expected one with a number or a Grade")


def _is_bare_factory(function: Callable[..., Any]) -> bool:
    """Takes nothing of what a reward function is given, and needs nothing else."""
    return not required(function) and not accepted(function, dict.fromkeys(_COMPLETIONS))


class _SumOfRewards:
    """The weighted sum of what several graders give; those that give None are left out of it, as in trl."""

    def __init__(self, parts: Mapping[str, tuple[Grader, float]], name: str) -> None:
        self._parts = dict(parts)
        self._name = name

    async def grade(self, task: Task, episode: Episode) -> Grade:
        async with first_error(), asyncio.TaskGroup() as group:
            running = {
                name: group.create_task(_or_none(part, task, episode)) for name, (part, _) in self._parts.items()
            }
        given = {name: grade for name, t in running.items() if (grade := t.result()) is not None}
        if not given:
            raise Unscored(f"{self._name}: every one of {', '.join(self._parts)} gave None")
        reward = sum(self._parts[name][1] * grade.reward for name, grade in given.items())
        return Grade(
            reward=reward,
            parts={self._name: reward},
            explanation="; ".join(
                f"{name} {given[name].reward:.6g} ({given[name].explanation})".removesuffix(" ()")
                if name in given
                else f"{name} gave None"
                for name in self._parts
            ),
            turn_rewards=_weighted([(self._parts[name][1], grade.turn_rewards) for name, grade in given.items()]),
            scores={name: grade.reward for name, grade in given.items()},
            errors=tuple(dict.fromkeys(kind for grade in given.values() for kind in grade.errors)),
        )

    def check(self, task: Task) -> None:
        for part, _ in self._parts.values():
            if isinstance(part, Checks):
                part.check(task)

    def take_metrics(self) -> dict[str, float]:
        return {name: value for part, _ in self._parts.values() for name, value in taken_metrics(part).items()}

    async def aclose(self) -> None:
        for part, _ in self._parts.values():
            if isinstance(part, Closes):
                await part.aclose()


def _weighted(parts: Sequence[tuple[float, tuple[float, ...] | None]]) -> tuple[float, ...] | None:
    """The weighted sum of rewards by turn, of the graders that give any."""
    told = [tuple(weight * x for x in by_turn) for weight, by_turn in parts if by_turn is not None]
    if len({len(by_turn) for by_turn in told}) > 1:
        raise UserError(f"graders give turn_rewards of {sorted({len(x) for x in told})} turns for the same episode")
    return tuple(map(sum, zip(*told, strict=True))) if told else None


async def _or_none(grader: Grader, task: Task, episode: Episode) -> Grade | None:
    try:
        return await grader.grade(task, episode)
    except Unscored:
        return None


class _ClassGrader:
    def __init__(self, grader: Any, name: str) -> None:
        self._grader = grader
        self._name = name
        # Absent where the user's class has none.
        if isinstance(grader, Checks):
            self.check = grader.check
        if isinstance(grader, Counts):
            self.take_metrics = grader.take_metrics
        if isinstance(grader, Closes):
            self.aclose = grader.aclose

    async def grade(self, task: Task, episode: Episode) -> Grade:
        given = await _call_named(self._name, self._grader.grade, task, episode)
        if given is None:
            raise UserError(
                f"grader {self._name!r} gave None; expected a number or a Grade, or that it raises "
                "envs.errors.Unscored where a rollout is to be passed over"
            )
        if not isinstance(given, Grade):
            reward = _finite(given, repr(self._name))
            return Grade(reward=reward, parts={self._name: reward})
        reward = _finite(given.reward, repr(self._name))
        parts = {name: _finite(part, f"{self._name!r}, part {name!r},") for name, part in given.parts.items()}
        scores = {name: _finite(score, f"{self._name!r}, score {name!r},") for name, score in given.scores.items()}
        if abs(sum(parts.values()) - reward) > _MARGIN and parts:
            raise UserError(f"grader {self._name!r}: reward {reward:g} is not the sum of parts {parts}")
        by_turn = given.turn_rewards
        if by_turn is not None:
            by_turn = tuple(_finite(x, f"{self._name!r}, turn {k + 1}'s reward,") for k, x in enumerate(by_turn))
        return replace(given, reward=reward, parts=parts or {self._name: reward}, scores=scores, turn_rewards=by_turn)


class _FunctionGrader:
    """A TRL-style reward function, called for one rollout at a time."""

    def __init__(self, function: Callable[..., Any], name: str, *, where: str) -> None:
        self._function = function
        self._name = name
        self._where = where
        self._logged: dict[str, list[float]] = defaultdict(list)
        needed = required_by_name(function, where)
        for parameter, why in _NEVER_GIVEN.items():
            if parameter in needed:
                raise UserError(f"{where}: {parameter!r} can't be given: {why}")
        if not accepted(function, dict.fromkeys(_COMPLETIONS)):
            raise UserError(
                f"{where}: expected a function f(prompts, completions, **columns), or a class with grade(task, episode)"
            )
        self._columns = [parameter for parameter in needed if parameter not in _OFFERED]
        self._needs_tokens = "completion_ids" in needed

    def check(self, task: Task) -> None:
        if missing := [column for column in self._columns if column not in task.item or column in _RESERVED]:
            raise UserError(
                f"{self._where}: task {task.task_id!r} has no key {missing[0]!r}, which the function needs"
                f"{nearest(missing[0], [key for key in task.item if key not in _RESERVED])}"
            )

    async def grade(self, task: Task, episode: Episode) -> Grade:
        notes: list[str] = []

        def log_extra(column: str, values: list[Any]) -> None:
            notes.append(f"{column}: {', '.join(map(str, values))}")

        def log_metric(name: str, value: float) -> None:
            self._logged[name].append(float(value))

        prompt, completion = conversation(task, episode)
        columns = {key: [value] for key, value in task.item.items() if key not in _RESERVED}
        offered = {
            **columns,
            "prompts": [prompt],
            "completions": [completion],
            "log_extra": log_extra,
            "log_metric": log_metric,
        }
        if episode.completion_ids is not None:
            offered["completion_ids"] = [list(episode.completion_ids)]
        elif self._needs_tokens:
            raise UserError(
                f"{self._where}: needs 'completion_ids', but this sample has no tokens; a run's rollouts have"
            )
        if (environment := live_environment(episode.rollout_id)) is not None:
            offered["environments"] = [environment]
        given = await _call_named(self._name, self._function, **accepted(self._function, offered))
        # Of an object or text a list could be made too, of its keys or letters.
        if (
            isinstance(given, str | bytes | Mapping)
            or not isinstance(given, Iterable)
            or getattr(given, "ndim", 1) != 1
        ):
            raise UserError(
                f"reward function {self._name!r}: expected a list with one reward, got {type(given).__name__}"
            )
        rewards = list(given)
        if len(rewards) != 1:
            raise UserError(
                f"reward function {self._name!r}: expected one reward for one completion, got {len(rewards)}"
            )
        if rewards[0] is None:
            raise Unscored(f"{self._name} gave None")
        reward = _finite(rewards[0], repr(self._name))
        return Grade(reward=reward, parts={self._name: reward}, explanation="; ".join(notes))

    def take_metrics(self) -> dict[str, float]:
        """The means of what the function logged since the last call."""
        taken = {name: fmean(values) for name, values in self._logged.items()}
        self._logged.clear()
        return taken


def conversation(task: Task, episode: Episode) -> tuple[Any, Any]:
    """The prompt and the completion as trl hands them to reward functions: both messages or, for rows whose `prompt` is
    text (trl's standard form), both text.

    A turn that could not be parsed is followed by the user message that said so; trl ends such an episode instead. Text
    is that of the messages, one a line; in trl it holds the markers of calls and reasoning too.
    """
    num_written = sum(turn.num_messages for turn in episode.turns)
    start = max(0, len(episode.messages) - num_written)
    prompt, written = task.item.get("prompt"), episode.messages[start:]
    if isinstance(prompt, str) and "messages" not in task.item:
        return prompt, "\n".join(message.content for message in written if message.content)
    messages = [message.to_openai() for message in episode.messages[:start] or task.messages]
    return messages, [trl_form(message) for message in written]


async def _call_named(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with raised_by(f"the grader {name!r}"):
        return await call_user(function, *args, **kwargs)


def _finite(value: Any, whose: str) -> float:
    try:
        return score_of(value, f"grader {whose}")
    except ValueError as e:
        raise UserError(str(e)) from None
