"""Parallel coordinates and one figure against another: what is drawn lies inside, what is written is text."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.written_runs import HOSTILE
from trainer.sweeps.config import SweepConfig
from trainer.sweeps.pictures import Dot, Line, parallel_coordinates, scatter

CHOICE = HOSTILE.replace("\0", "")
"""No setting holds a NUL."""
SPACE: dict[str, Any] = {
    "optim.learning_rate": {"type": "log_range", "low": 1e-5, "high": 1e-2, "num": 3},
    "rollout.group_size": {"type": "range", "low": 2, "high": 64},
    "model.lora.target_modules": [["q_proj"], None, CHOICE, 8, True],
}


def drawn(values: list[float], point: dict[str, Any]) -> str:
    space = SweepConfig.model_validate({"base": "a", "output_dir": "b", "space": SPACE}).space
    names = {key: key.rpartition(".")[2] for key in space}
    lines = [Line(name=f"trial {i}", point=point, value=v, is_over=i > 0) for i, v in enumerate(values)]
    picture = parallel_coordinates(HOSTILE, space, names, lines, unit="eval/x", percent=False, best="trial 1")
    return str(picture)


def numbers(picture: str) -> list[tuple[float, float]]:
    pairs = [pair for line in re.findall(r'points="([^"]+)"', picture) for pair in line.split()]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [-3.0, 0.0, 1e6], [1e-9, 2e-9]])
@pytest.mark.parametrize("module", [["q_proj"], None, CHOICE, 8, True])
def test_every_line_lies_between_the_axes(values: list[float], module: object) -> None:
    points = {"optim.learning_rate": 1e-2, "rollout.group_size": 2, "model.lora.target_modules": module}
    picture = drawn(values, points)
    assert all(90 <= x <= 990 and 34 <= y <= 302 for x, y in numbers(picture))
    assert picture.count("<polyline") == len(values) and picture.count("stroke-dasharray") == 1
    assert "<script" not in picture and "onerror='" not in picture


def test_without_a_trial_there_is_no_picture() -> None:
    assert drawn([], {}) == ""
    assert scatter("a", [], x_unit="x", y_unit="y") == ""
    assert scatter("a", [Dot(label="1", hover="", xs=[], ys=[1.0])], x_unit="x", y_unit="y") == ""


def test_dots_of_one_place_share_a_label_and_seeds_are_bars() -> None:
    alike = [Dot(label=label, hover=HOSTILE, xs=[3.0], ys=[0.5]) for label in ("10", "9")]
    apart = Dot(label="2", hover="", xs=[1.0, 2.0], ys=[0.25, 0.75], colour=0)
    picture = str(scatter("a", [*alike, apart], x_unit="calls", y_unit="reward", y_percent=True))
    assert ">9, 10</text>" in picture and ">2</text>" in picture and picture.count('<line class="s0"') == 2
    assert "<script" not in picture
