"""Losses, advantages and what they weigh: settings that can't be meant or have no effect are told with their keys."""

from __future__ import annotations

from typing import Any

import pytest

from envs.errors import UserError
from trainer.config import validate_config

MINIMAL = {"output_dir": "runs/x", "grader": {"type": "numeric"}}
TOOL_CALLS = {"tool_calls": {"slope": 0.1, "floor": -0.1}}


def gdpo(**weights: float) -> dict[str, Any]:
    return {"type": "gdpo", "weights": weights}


def named(name: str) -> dict[str, Any]:
    return {"type": "custom", "target": "mine.py:Mine", "name": name, "pass_threshold": 1.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": {"advantage": "grop"}}, "target: my_file.py:name}; did you mean 'grpo'? (got 'grop')"),
        ({"loss": {"advantage": "custom"}}, "loss.advantage: expected one of 'grpo', "),
        ({"loss": {"advantage": None}}, "loss.advantage: expected one of 'grpo', "),
        ({"loss": {"type": "grpo"}}, "loss: grpo is no loss but how advantages are made: set loss.advantage to grpo"),
        ({"loss": "rloo"}, "loss: rloo is no loss but how advantages are made: set loss.advantage to rloo"),
        ({"loss": {"type": "ppo"}}, "loss: ppo is no loss but how advantages are made: set loss.advantage to gae"),
        ({"loss": "clipped"}, "loss: expected settings, such as {type: clipped, ...}"),
        ({"loss": {"entropy": {"coef": 0.1, "step": 0.1}}}, "loss.entropy: step: has no effect without a floor"),
        ({"loss": {"entropy": {"coef": 0.1, "max_coef": 2}}}, "loss.entropy: max_coef: has no effect without a floor"),
        ({"loss": {"entropy": {"coef": 2, "floor": 1}}}, "loss.entropy: coef: 2 is above max_coef, 1"),
        ({"loss": {"entropy": {"floor": 1, "max_coef": 0}}}, "loss.entropy: max_coef: 0 leaves no bonus"),
        ({"loss": {"entropy": {"coef": 1e300}}}, "loss.entropy.coef: Input should be less than or equal to 1000000"),
        ({"loss": {"kl_coef": 1e300}}, "loss.kl_coef: Input should be less than or equal to 1000000"),
        ({"loss": {"advantage": {"type": "gigpo", "weight": 1e300}}}, "loss.advantage.weight: Input should be less"),
        (
            {"loss": {"kl_coef": 0.1, "kl": {"refresh_steps": 9}}, "optim": {"num_steps": 9}},
            "loss.kl.refresh_steps: 9 has no effect in a run of optim.num_steps = 9",
        ),
        ({"loss": {"advantage": gdpo(numeric=0)}}, "those of numeric, which are all parts of the reward, are 0"),
        ({"loss": {"advantage": gdpo(nummeric=1)}}, "'nummeric' is no part of the reward; it has numeric; did you"),
        ({"loss": {"advantage": gdpo(turn_rewards=1)}}, "'turn_rewards' is no part of the reward; it has numeric"),
        ({"loss": {"advantage": gdpo(kl=1)}}, "'kl' is no part of the reward; it has numeric"),
        ({"loss": {"advantage": gdpo(numeric=-1e300)}}, "loss.advantage.weights.numeric: Input should be greater"),
        ({"grader": named("kl")}, "grader.name: 'kl' is a part of the reward of the trainer's own (turn_rewards, kl)"),
        ({"grader": named("turn_rewards")}, "grader.name: 'turn_rewards' is a part of the reward of the trainer's own"),
        ({"grader": named("tool_calls"), "penalties": TOOL_CALLS}, "grader.name: 'tool_calls' is a part of the"),
        ({"rollout": {"replacement_rounds": 2}}, "rollout.replacement_rounds: has no effect while rollout.tied_"),
        ({"data": {"train": "x", "eval": None}}, "data.eval: expected the path of a JSONL file, or a data set"),
        ({"output_dir": "a\0b"}, "output_dir: holds a NUL character"),
        ({"output_dir": "a\ud83d\ude00"}, "output_dir: holds half of a surrogate pair"),
        ({"data": {"train": "a\0", "eval": "b"}}, "data.train: holds a NUL character"),
        ({"grader": "a\0.json"}, "grader file a.json: embedded null byte"),
    ],
)
def test_what_is_wrong_or_without_effect_is_named_with_its_key(changes, expected):
    with pytest.raises(UserError) as caught:
        validate_config(MINIMAL | changes, source="c.yaml")
    assert expected in str(caught.value)


def test_weights_of_parts_that_there_are_load_and_those_of_the_users_own_grader_are_known_later():
    for weights, sections in (
        ({"numeric": 2.0, "tool_calls": 0.0}, {"penalties": TOOL_CALLS}),
        ({"kl": 0.5}, {}),
        ({"right": 0.5}, {"grader": named("mine")}),
    ):
        loss = {"advantage": gdpo(**weights), "kl_coef": 0.1, "kl": {"place": "reward", "estimator": "k1"}}
        assert validate_config(MINIMAL | sections | {"loss": loss}, source="").loss.advantage.weights == weights
