"""Figures of a run's evaluation, as a sweep reads them."""

from __future__ import annotations

import pytest

from trainer.sweeps.figures import figure

GRADED = {"eval/rollouts": 4.0, "eval/masked_rollouts": 1.0, "eval/reward": 0.5}


@pytest.mark.parametrize(
    "name",
    [
        "stop/max_turns",
        "masked_by/world",
        "grader_error/other",
        "tool/search/calls",
        "tool/search/errors",
        "user_turns",
    ],
)
def test_a_count_of_what_did_not_happen_is_zero_where_anything_was_graded(name: str) -> None:
    key = f"eval/{name}"
    assert figure(GRADED, key) == 0
    assert figure({**GRADED, key: 0.25}, key) == 0.25
    assert figure({"eval/rollouts": 4.0, "eval/masked_rollouts": 4.0}, key) is None


@pytest.mark.parametrize("name", ["correct", "part/style", "score/a", "tool/search/latency_s", "watch/score"])
def test_a_mean_of_what_is_not_there_is_none(name: str) -> None:
    assert figure(GRADED, f"eval/{name}") is None
