"""`rollout.tied_groups`: groups that teach nothing are kept, left out, or replaced by fresh tasks in the same step."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from envs.types import Message, Task
from tests.trainer.rollouts.test_to_samples import config, rollout
from trainer.config import RunConfig
from trainer.rollouts.collect import to_samples, with_fresh_groups
from trainer.tasks.load import fresh_tasks
from trainer.types import Rollout


def with_rule(rule: str, **sections: object) -> RunConfig:
    base = config(2, **sections)
    of = base.rollout.model_copy(update={"tied_groups": rule, "tasks_per_step": 2, "replacement_rounds": 2})
    return base.model_copy(update={"rollout": of})


BY_GROUP = ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gdpo", "mt_grpo", "gigpo", "turn_discounted"]
REWARDS = [1.0, 1.0, 0.0, 1.0, 0.5, 0.5, None, None]
"""Four groups of two, the second of which teaches."""


def rollouts_of(rewards: Sequence[float | None]) -> list[Rollout]:
    """The longer the later, so that a step's mean over tokens is not that of its groups."""
    return [rollout(i, reward, [[5] * (1 + i)]) for i, reward in enumerate(rewards)]


@pytest.mark.parametrize("advantage", BY_GROUP)
@pytest.mark.parametrize(("rule", "samples"), [("keep", 6), ("skip", 2), ("replace", 2)])
def test_what_becomes_of_groups_without_an_advantage(advantage, rule, samples):
    made, metrics = to_samples(rollouts_of(REWARDS), with_rule(rule, advantage=advantage))
    assert len(made) == samples
    assert metrics["groups/tied_share"] == 0.75
    assert metrics["groups/reward_std"] == pytest.approx(0.5**0.5 / 3), "of the three groups that have rewards"
    assert metrics.get("groups/skipped") == (None if rule == "keep" else 3.0)
    assert metrics.get("groups/replacements") == (2.0 if rule == "replace" else None)


@pytest.mark.parametrize("advantage", BY_GROUP)
@pytest.mark.parametrize("rule", ["skip", "replace"])
def test_groups_that_are_left_out_count_in_no_mean_or_spread_of_the_step(advantage, rule):
    """Many zeros beside it would make the group that teaches stand out the more."""
    alone, _ = to_samples(rollouts_of([1.0, 0.0]), with_rule(rule, advantage=advantage))
    among, _ = to_samples(rollouts_of([1.0, 0.0, *[0.5] * 8]), with_rule(rule, advantage=advantage))
    assert [s.advantages for s in among] == [s.advantages for s in alone]


def test_a_kl_taken_off_the_reward_unties_no_group():
    in_reward = {"kl_coef": 0.5, "kl": {"place": "reward", "estimator": "k1"}}

    def divergences(samples, loss, temperature):
        return [[float(i)] * len(s.trained(s.token_ids)) for i, s in enumerate(samples)]

    made, metrics = to_samples(
        rollouts_of(REWARDS), with_rule("skip", **in_reward), SimpleNamespace(divergences=divergences)
    )
    assert len(made) == 2 and metrics["groups/skipped"] == 3


def test_an_estimator_of_your_own_is_asked_once_a_step_and_tells_itself_which_groups_are_tied(tmp_path):
    (tmp_path / "counted.py").write_text(
        "class Counted:\n"
        "    steps = 0\n"
        "    def __init__(self, scale): self.scale = scale\n"
        "    def __call__(self, groups):\n"
        "        self.steps += 1\n"
        "        return [[self.steps * self.scale * (i == 2) for _ in group] for i, group in enumerate(groups)]\n"
    )
    own = {"type": "custom", "target": f"{tmp_path}/counted.py:Counted", "kwargs": {"scale": 2.0}}
    for step in (1, 2):
        made, metrics = to_samples(rollouts_of(REWARDS), with_rule("skip", advantage=own))
        assert metrics["groups/tied_share"] == 0.75
        assert {x for s in made for x in s.trained(s.advantages)} == {2.0 * step} and len(made) == 2


def test_fresh_groups_are_asked_for_until_the_step_is_full_or_the_rounds_are_used_up():
    tied, teaching = rollouts_of([1.0, 1.0]), rollouts_of([0.0, 1.0])
    asked: list[tuple[int, int]] = []

    def more_of(kinds):
        left = iter(kinds)

        def more(first, count):
            asked.append((first, count))
            return [r for _ in range(count) for r in next(left)]

        return more

    def become(rule, kinds):
        asked.clear()
        return len(with_fresh_groups(tied * 2, with_rule(rule), more_of(kinds))) // 2

    assert become("skip", []) == 2 and asked == []
    assert become("replace", [teaching, teaching]) == 4 and asked == [(2, 2)]
    assert become("replace", [tied, teaching, teaching]) == 5 and asked == [(2, 2), (4, 1)]
    assert become("replace", [tied, teaching, tied]) == 5 and asked == [(2, 2), (4, 1)]
    assert with_fresh_groups(teaching * 2, with_rule("replace"), more_of([])) == teaching * 2


def test_fresh_tasks_are_others_than_the_steps_own_and_a_function_of_seed_and_step():
    tasks = [Task(task_id=str(i), messages=(Message(role="user", content="?"),)) for i in range(6)]
    fresh = fresh_tasks(tasks, tasks[:2], seed=1, step=3, count=9)
    assert fresh[:3] == fresh_tasks(tasks, tasks[:2], seed=1, step=3, count=3)
    assert sorted(t.task_id for t in fresh[:4]) == ["2", "3", "4", "5"] and fresh[4:8] == fresh[:4]
    others = [fresh_tasks(tasks, tasks[:2], seed=seed, step=step, count=4) for seed, step in ((1, 4), (2, 3))]
    assert fresh[:4] not in others
    assert fresh_tasks(tasks[:2], tasks[:2], seed=1, step=3, count=1)[0] in tasks[:2]
