"""A space as points: what a grid holds, which configs show whether all of it can be meant. Pure.

A point is the value of each key, `{"optim.learning_rate": 1e-4, ...}`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from envs.errors import UserError
from trainer.sweeps.config import Axis, ChoicesConfig, LogRangeConfig, label_of

Point = Mapping[str, Any]

_MOST_POINTS = 10_000


def grid_points(space: Mapping[str, Axis]) -> list[Point]:
    """Every combination, the last key's values changing first. Raises `UserError` where that is one, or too many."""
    values = {key: values_of(axis) for key, axis in space.items()}
    num = math.prod(map(len, values.values()))
    if not 2 <= num <= _MOST_POINTS:
        expected = "2 or more, as one has nothing to compare with" if num < 2 else f"at most {_MOST_POINTS:,}"
        raise UserError(f"space: a grid of {num:,} trials; expected {expected}")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def values_of(axis: Axis) -> list[Any]:
    """What a grid takes of an axis. Raises `UserError` where they are too many."""
    if isinstance(axis, ChoicesConfig):
        return axis.values
    whole = isinstance(axis.low, int) and isinstance(axis.high, int)
    if axis.num is None:
        if axis.high - axis.low >= _MOST_POINTS:
            raise UserError(f"space: {axis.low:,} to {axis.high:,} are too many values of a grid; give it num")
        return list(range(int(axis.low), int(axis.high) + 1))
    steps = [i / (axis.num - 1) for i in range(axis.num)]
    if isinstance(axis, LogRangeConfig):
        values = [axis.low * (axis.high / axis.low) ** step for step in steps]
    else:
        values = [axis.low + (axis.high - axis.low) * step for step in steps]
    if whole:
        return list(dict.fromkeys(round(value) for value in values))
    # Rounding's last digits would stand in every table.
    short = [float(axis.low), *(float(f"{value:.6g}") for value in values[1:-1]), float(axis.high)]
    return short if sorted(set(short)) == short else list(dict.fromkeys(values))


def corner_points(space: Mapping[str, Axis]) -> Iterator[Point]:
    """Few points in which every choice and every bound stands at least once."""
    ends = {k: axis.values if isinstance(axis, ChoicesConfig) else [axis.low, axis.high] for k, axis in space.items()}
    for i in range(max(map(len, ends.values()))):
        yield {key: values[i % len(values)] for key, values in ends.items()}


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """`KEY=VALUE` as scripts/train.py takes them."""
    return [f"{key}={_as_yaml(value)}" for key, value in settings.items()]


def _as_yaml(value: Any) -> str:
    """JSON, which YAML reads as the same value."""
    return json.dumps(value, ensure_ascii=False)


def in_words(point: Point) -> str:
    """`optim.learning_rate=0.0001 rollout.group_size=8`."""
    return " ".join(f"{key}={shown(value)}" for key, value in point.items())


def shown(value: Any) -> str:
    """A value as people read it: a drawn number has more digits than tell anything."""
    return f"{value:.4g}" if isinstance(value, float) else label_of(value)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last word, or by as many as tell it from the others."""
    short = {}
    for key in keys:
        words = key.split(".")
        for n in range(1, len(words) + 1):
            short[key] = ".".join(words[-n:])
            if sum(other.endswith(f".{short[key]}") or other == short[key] for other in keys) == 1:
                break
    return short
