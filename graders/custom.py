"""The user's own graders: a class with `grade(task, episode)`, or a TRL-style reward function, accepted as it is.

A class: `grade` is sync or async and gives a `Grade` or a number. It may have `check(task)`, `async aclose()` and
`take_metrics()`, as graders have.

A reward function is called as trl's GRPOTrainer calls it, with a batch of one: `prompts` and `completions` are lists of
message lists (tool calls with their arguments decoded, without ids), every key of the row is a list, `log_extra(column,
values)` and `log_metric(name, value)` are there, and `environments` where the world's are TRL-style. It gives
`list[float | None]`, sync or async. Where it has no `**kwargs` it gets what it names. Not covered, for graders know
neither tokens nor the trainer: `completion_ids` and `trainer_state`; a function that names them is refused.

None is an error, for with one grader no score is left; in trl the other functions would make it up. Errors of the
user's code stop the run, `WorldError` aside, which masks the rollout. Sync code runs in a thread.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

from envs.custom import live_environment
from envs.errors import UserError
from envs.loading import accepted, call_user, load_target, make, required
from envs.types import Episode, Message, Task
from graders.config import CustomConfig
from graders.types import Grade, Grader

_RESERVED = ("prompt", "completion", "completion_ids")
"""Columns that trl does not hand on."""
_OFFERED = ("prompts", "completions", "log_extra", "log_metric", "environments")
_UNKNOWN = ("completion_ids", "trainer_state")
_MARGIN = 1e-9


def load_custom_grader(config: CustomConfig) -> Grader:
    """Raises `UserError` for a target that can't be loaded or is no grader."""
    where = f"grader.target {config.target!r}"
    target = load_target(config.target, key="grader.target")
    if isinstance(target, type):
        target = make(target, config.kwargs, where=where)
    elif config.kwargs:
        raise UserError(f"{where}: kwargs: a class is made with them, but this is {type(target).__name__}")
    if callable(getattr(target, "grade", None)):
        return _ClassGrader(target, config.name)
    if callable(target):
        return _FunctionGrader(target, config.name, where=where)
    raise UserError(
        f"{where}: expected a class with grade(task, episode) or a function f(prompts, completions, **columns), got "
        f"{type(target).__name__}"
    )


class EnvReward:
    """What the rollout's own TRL-style environment gives as `get_reward()`; its state is gone when the rollout ends.

    As a grader: `{"type": "custom", "target": "graders.custom:EnvReward"}`.
    """

    async def grade(self, task: Task, episode: Episode) -> float | None:
        environment = live_environment(episode.rollout_id)
        get_reward = getattr(environment, "get_reward", None)
        if get_reward is None:
            raise UserError(
                "grader.target 'graders.custom:EnvReward': expected a world of type custom with a TRL-style "
                f"environment that has get_reward; rollout {episode.rollout_id!r} has none"
            )
        reward: float | None = await call_user(get_reward)
        return reward


class _ClassGrader:
    def __init__(self, grader: Any, name: str) -> None:
        self._grader = grader
        self._name = name
        # Absent where the user's class has none, as the callers expect.
        for hook in ("check", "aclose", "take_metrics"):
            if found := getattr(grader, hook, None):
                setattr(self, hook, found)

    async def grade(self, task: Task, episode: Episode) -> Grade:
        given = await _in_words_of(self._name, self._grader.grade, task, episode)
        if not isinstance(given, Grade):
            reward = _number(given, self._name)
            return Grade(reward=reward, parts={self._name: reward})
        reward = _number(given.reward, self._name)
        if not given.parts:
            return replace(given, reward=reward, parts={self._name: reward})
        if abs(sum(given.parts.values()) - reward) > _MARGIN:
            raise ValueError(f"grader {self._name!r}: reward {reward:g} is not the sum of parts {dict(given.parts)}")
        return given


class _FunctionGrader:
    """A TRL-style reward function, called for one rollout at a time."""

    def __init__(self, function: Callable[..., Any], name: str, *, where: str) -> None:
        self._function = function
        self._name = name
        self._where = where
        self._logged: dict[str, list[float]] = defaultdict(list)
        needed = required(function)
        if unknown := [parameter for parameter in needed if parameter in _UNKNOWN]:
            raise UserError(f"{where}: {unknown[0]!r} can't be given: graders know neither tokens nor the trainer")
        if not accepted(function, dict.fromkeys(("prompts", "completions"))):
            raise UserError(f"{where}: expected a function f(prompts, completions, **columns)")
        self._columns = [parameter for parameter in needed if parameter not in _OFFERED]

    def check(self, task: Task) -> None:
        if missing := [column for column in self._columns if column not in task.item or column in _RESERVED]:
            raise UserError(f"{self._where}: task {task.task_id!r} has no key {missing[0]!r}, which the function needs")

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
        if (environment := live_environment(episode.rollout_id)) is not None:
            offered["environments"] = [environment]
        given = await _in_words_of(self._name, self._function, **accepted(self._function, offered))
        try:
            rewards = list(given)
        except TypeError:
            raise ValueError(
                f"reward function {self._name!r}: expected a list with one reward, got {type(given).__name__}"
            ) from None
        if len(rewards) != 1:
            raise ValueError(
                f"reward function {self._name!r}: expected one reward for one completion, got {len(rewards)}"
            )
        reward = _number(rewards[0], self._name)
        return Grade(reward=reward, parts={self._name: reward}, explanation="; ".join(notes))

    def take_metrics(self) -> dict[str, float]:
        """The means of what the function logged since the last call."""
        taken = {name: fmean(values) for name, values in self._logged.items()}
        self._logged.clear()
        return taken


def conversation(task: Task, episode: Episode) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompt and the completion as trl hands them to reward functions.

    A turn that could not be parsed is followed by the user message that said so; trl ends such an episode instead.
    """
    num_written = sum(turn.num_messages for turn in episode.turns)
    start = max(0, len(episode.messages) - num_written)
    prompt = [_prompt_message(message) for message in episode.messages[:start] or task.messages]
    return prompt, [_completion_message(message) for message in episode.messages[start:]]


def _prompt_message(message: Message) -> dict[str, Any]:
    return message.to_openai()


def _completion_message(message: Message) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "tool", "name": message.name, "content": message.content}
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        out["reasoning_content"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": _decoded(call.arguments)}}
            for call in message.tool_calls
        ]
    return out


def _decoded(arguments: str) -> Any:
    """Text that is no JSON stays text: the call was answered with an error, and the grader may look at it."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


async def _in_words_of(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return await call_user(function, *args, **kwargs)
    except Exception as e:
        e.add_note(f"raised by the grader {name!r}")
        raise


def _number(value: Any, name: str) -> float:
    if value is None:
        raise ValueError(f"grader {name!r} gave None: with one grader no score is left; expected a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"grader {name!r} gave {value!r}; expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"grader {name!r} gave {number}; expected a finite number")
    return number
