import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from trainer.learning.advantages import STD_EPS, group_advantages
from trainer.learning.advantages.base import normalised

REWARDS = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
GROUPS = st.lists(st.one_of(st.none(), REWARDS), min_size=1, max_size=12)
MODES = ("grpo", "dr_grpo")


@given(GROUPS)
def test_advantages_equal_a_naive_loop(rewards):
    present = [r for r in rewards if r is not None]
    assume(len(set(present)) > 1)
    mean, std = statistics.mean(present), statistics.stdev(present)
    for r, grpo, centred in zip(
        rewards,
        group_advantages(rewards, "grpo").advantages,
        group_advantages(rewards, "dr_grpo").advantages,
        strict=True,
    ):
        if r is None:
            assert grpo is None and centred is None
        else:
            assert math.isclose(grpo, (r - mean) / (std + STD_EPS), abs_tol=1e-9)
            assert math.isclose(centred, r - mean, abs_tol=1e-9)


@given(GROUPS, st.sampled_from(MODES))
def test_advantages_sum_to_zero(rewards, mode):
    advantages = [a for a in group_advantages(rewards, mode).advantages if a is not None]
    assert abs(math.fsum(advantages)) < 1e-8


@given(GROUPS, st.floats(-5, 5), st.sampled_from(MODES))
def test_a_bonus_for_everyone_changes_nothing(rewards, bonus, mode):
    before = group_advantages(rewards, mode)
    assume(not before.tied)
    after = group_advantages([None if r is None else r + bonus for r in rewards], mode)
    assert [a or 0.0 for a in after.advantages] == pytest.approx([a or 0.0 for a in before.advantages], abs=1e-6)


@given(GROUPS, st.floats(0.5, 20))
def test_the_scale_of_rewards_divides_out_in_grpo_and_stays_in_dr_grpo(rewards, factor):
    before = group_advantages(rewards, "dr_grpo")
    assume(before.std > 0.1)
    scaled = [None if r is None else r * factor for r in rewards]
    pairs = list(
        zip(group_advantages(scaled, "grpo").advantages, group_advantages(rewards, "grpo").advantages, strict=True)
    )
    assert [a or 0.0 for a, _ in pairs] == pytest.approx([b or 0.0 for _, b in pairs], rel=3e-3, abs=1e-9)
    centred = [a or 0.0 for a in group_advantages(scaled, "dr_grpo").advantages]
    assert centred == pytest.approx([(a or 0.0) * factor for a in before.advantages], abs=1e-9)


@given(st.lists(st.none(), max_size=3), REWARDS, st.integers(1, 9), st.sampled_from(MODES))
def test_equal_rewards_give_exact_zeros_and_are_flagged(masked, reward, n, mode):
    group = group_advantages([*masked, *[reward] * n], mode)
    assert group.tied and group.std == 0.0
    assert group.advantages == (*masked, *[0.0] * n)


@pytest.mark.parametrize("mode", ["grpo", "dr_grpo", "rloo"])
def test_rewards_that_only_rounding_tells_apart_are_tied(mode):
    for rewards in ([0.1 + 0.2, 0.3, None, 0.3], [0.1 + 0.2 - 0.3, 0.0], [1e6 + 0.1 + 0.2, 1e6 + 0.3]):
        group = group_advantages(rewards, mode)
        assert group.tied and group.std == 0.0 and not any(group.advantages)
    assert normalised([0.1 + 0.2, 0.3]) == [0.0, 0.0]
    assert not group_advantages([0.3, 0.3 + 1e-9], mode).tied


def test_a_wholly_masked_group_is_tied_and_has_no_advantage():
    group = group_advantages([None, None], "grpo")
    assert group.tied and math.isnan(group.mean) and group.advantages == (None, None)


def test_a_masked_rollout_does_not_move_the_others():
    assert (
        group_advantages([1.0, None, 0.0, 0.5], "grpo").advantages[0]
        == group_advantages([1.0, 0.0, 0.5], "grpo").advantages[0]
    )


@given(GROUPS)
def test_mean_and_std_are_those_of_trl(rewards):
    from trl.trainer.utils import nanstd

    group = group_advantages(rewards, "grpo")
    assume(not group.tied)
    tensor = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64)
    assert group.mean == pytest.approx(torch.nanmean(tensor).item(), abs=1e-9)
    assert group.std == pytest.approx(nanstd(tensor).item(), rel=1e-6)


def test_a_reward_that_is_not_a_number_is_refused():
    with pytest.raises(AssertionError, match="finite"):
        group_advantages([1.0, math.nan], "grpo")
