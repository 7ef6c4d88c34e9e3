"""The estimators, by the `type` that a config names: one line each; and the user's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

from envs.errors import UserError
from envs.tools import MOST_REWARD
from envs.user_code import load_target, looked_at, make, raised_by
from trainer import processes
from trainer.config.advantages import (
    AdvantageName,
    AdvantageSettings,
    CustomAdvantageConfig,
    GaeConfig,
    advantage_settings,
)
from trainer.learning.advantages.base import Advantages, Attempt, Estimator, Groups

ESTIMATORS = {
    "grpo": "group:grpo",
    "dr_grpo": "group:dr_grpo",
    "rloo": "group:rloo",
    "reinforce_pp": "batch:reinforce_pp",
    "reinforce_pp_baseline": "batch:reinforce_pp_baseline",
    "gdpo": "parts:gdpo",
    "mt_grpo": "turns:mt_grpo",
    "gigpo": "turns:gigpo",
    "turn_discounted": "turns:turn_discounted",
}
"""Where each stands below this folder; called with the step's groups and its settings."""


_MADE: dict[str, Estimator] = {}
"""The user's own that is at work, by its settings."""


def estimator_of(advantage: AdvantageName | AdvantageSettings) -> Estimator:
    """The estimator that the config names. Raises `UserError` for a target that can't be had."""
    config = advantage_settings(advantage)
    assert not isinstance(config, GaeConfig), "a critic's advantages are made of tokens, see `trainer.learning.critic`"
    if isinstance(config, CustomAdvantageConfig):
        # Made once: it may keep what it learns of earlier steps.
        key = config.model_dump_json()
        if key not in _MADE:
            _MADE.clear()
            _MADE[key] = _custom(config)
        own = _MADE[key]
        # One that draws random numbers would give every process others.
        return lambda groups: processes.from_main(lambda: own(groups))
    function = resolve_name(f"trainer.learning.advantages.{ESTIMATORS[config.type]}")
    return lambda groups: function(groups, config)


def forget() -> None:
    """A run begins: what the user's own has kept of another one is not its."""
    _MADE.clear()


def forgotten(advantage: AdvantageName | AdvantageSettings) -> list[str]:
    """What a run that goes on has to say of its estimator, as `trainer.learning.losses.registry.forgotten`."""
    config = advantage_settings(advantage)
    if not isinstance(config, CustomAdvantageConfig):
        return []
    if inspect.isfunction(load_target(config.target, key="loss.advantage.target")):
        return []
    return [f"{_where(config)}: is made anew; what it has kept of the steps before is in no checkpoint"]


def check_advantage(advantage: AdvantageName | AdvantageSettings) -> None:
    """Try the user's own on a step of two groups. Raises `UserError` where it does not work."""
    if isinstance(advantage, CustomAdvantageConfig):
        with looked_at(_where(advantage)):
            _custom(advantage)(_EXAMPLE)


def _where(config: CustomAdvantageConfig) -> str:
    return f"loss.advantage.target {config.target!r}"


def _custom(config: CustomAdvantageConfig) -> Estimator:
    where = _where(config)
    target = load_target(config.target, key="loss.advantage.target")
    with looked_at(where):
        if isinstance(target, type) or config.kwargs:
            target = make(target, copy.deepcopy(config.kwargs), where=where)
    if not callable(target):
        raise UserError(f"{where}: expected a function of a step's groups; got {type(target).__name__}")

    def estimator(groups: Groups) -> Advantages:
        # Tuples: sorted in place, advantages would be given to others.
        with raised_by(where):
            answer = target([tuple(group) for group in groups])
        if not _has_length(answer, len(groups)):
            raise UserError(f"{where}: expected a list of {len(groups)} groups; got {_told(answer)}")
        return [_of_group(given, group, where) for given, group in zip(answer, groups, strict=True)]

    return estimator


def _of_group(given: Any, group: Sequence[Attempt], where: str) -> list[tuple[float, ...] | None]:
    if not _has_length(given, len(group)):
        raise UserError(f"{where}: expected a list of {len(group)} advantages for a group; got {_told(given)}")
    return [None if a.reward is None else _of_attempt(x, a, where) for x, a in zip(given, group, strict=True)]


def _of_attempt(given: Any, attempt: Attempt, where: str) -> tuple[float, ...]:
    """A number is for every turn."""
    turns = attempt.everywhere(given) if isinstance(given, int | float) else given
    if not _has_length(turns, len(attempt.turn_rewards_T)):
        one_a_turn = f"{len(attempt.turn_rewards_T)}, one a turn"
        raise UserError(f"{where}: expected a number, or {one_a_turn}, for a rollout; got {_told(given)}")
    if not all(isinstance(x, int | float) and abs(x) <= MOST_REWARD for x in turns):
        raise UserError(f"{where}: expected finite numbers up to {MOST_REWARD:g} in size; got {list(turns)}")
    return tuple(map(float, turns))


def _has_length(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length


def _told(value: Any) -> str:
    return f"one of {len(value)}" if isinstance(value, list | tuple) else repr(value)[:100]


_EXAMPLE: Groups = [
    [
        Attempt(
            reward=reward,
            turn_rewards_T=(0.0, 0.25),
            num_tokens_T=(3, 5),
            states_T=("asked", f"told {i}"),
            parts={"score": 0.0 if reward is None else reward},
        )
        for i, reward in enumerate(rewards)
    ]
    for rewards in ((1.0, 0.0, None), (1.0, 1.0, 1.0))
]
