"""Estimators of advantages over a step's groups, each against a naive loop or trl's formula."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from envs.errors import UserError
from trainer.config.advantages import ADVANTAGE_SETTINGS, CustomAdvantageConfig, advantage_settings
from trainer.learning.advantages import Attempt, estimator_of, group_advantages
from trainer.learning.advantages.attempts import with_costs
from trainer.learning.advantages.registry import ESTIMATORS, check_advantage, forget, forgotten

SEEDS = range(8)
EPS = 1e-4


def attempt(reward, turns=(0.0,), tokens=None, states=None, parts=None) -> Attempt:
    n = len(turns)
    return Attempt(
        reward=reward,
        turn_rewards_T=tuple(turns),
        num_tokens_T=tuple(tokens or [1] * n),
        states_T=tuple(states or range(n)),
        parts=parts or {},
    )


def random_groups(seed: int, *, masked: bool = True) -> list[list[Attempt]]:
    """Groups of uneven sizes, rollouts of uneven numbers of turns; few states, so that some are shared."""
    rng = random.Random(seed)
    groups = []
    for _ in range(3):
        group = []
        for i in range(rng.randint(2, 6)):
            n = rng.randint(1, 4)
            turns = [rng.choice([0.0, 0.0, 0.5, -0.2]) for _ in range(n)]
            outcome = rng.choice([0.0, 0.3, 1.0])
            is_masked = masked and i > 0 and rng.random() < 0.2
            group.append(
                attempt(
                    None if is_masked else outcome + sum(turns),
                    turns,
                    [rng.randint(1, 9) for _ in range(n)],
                    [0, *[rng.randint(1, 2) for _ in range(n - 1)]],
                    {"score": outcome, "turns": sum(turns)},
                )
            )
        groups.append(group)
    return groups


def assert_equal(ours, expected) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert [x is None for x in a] == [x is None for x in b]
        for x, y in zip(a, b, strict=True):
            if x is not None:
                assert list(x) == pytest.approx(list(y), abs=1e-9)


def present(group: list[Attempt]) -> list[Attempt]:
    return [a for a in group if a.reward is not None]


def naive_normalised(value: float, values: list[float]) -> float:
    if len(set(values)) == 1:
        return 0.0
    return (value - statistics.mean(values)) / (statistics.stdev(values) + EPS)


def naive_returns(a: Attempt, gamma: float) -> list[float]:
    rewards = list(a.turn_rewards_T)
    rewards[-1] += a.reward - sum(a.turn_rewards_T)
    n = len(rewards)
    return [sum(gamma ** (j - k) * rewards[j] for j in range(k, n)) for k in range(n)]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_those_of_groups_are_the_groups_for_every_turn(name, seed):
    groups = random_groups(seed)
    expected = [
        [
            None if x is None else [x] * len(a.turn_rewards_T)
            for a, x in zip(group, group_advantages([a.reward for a in group], name).advantages, strict=True)
        ]
        for group in groups
    ]
    assert_equal(estimator_of(name)(groups), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_leaves_each_rollout_out_of_its_own_baseline(seed):
    groups = random_groups(seed)

    def of(a: Attempt, group: list[Attempt]):
        others = [b.reward for b in present(group) if b is not a]
        return [a.reward - statistics.mean(others) if others else 0.0] * len(a.turn_rewards_T)

    expected = [[None if a.reward is None else of(a, group) for a in group] for group in groups]
    assert_equal(estimator_of("rloo")(groups), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_is_that_of_trl_before_it_whitens(seed):
    rewards = [a.reward for a in random_groups(seed, masked=False)[0]]
    tensor = torch.tensor(rewards, dtype=torch.float64)
    baselines = (tensor.sum() - tensor) / (len(tensor) - 1)
    assert group_advantages(rewards, "rloo").advantages == pytest.approx((tensor - baselines).tolist(), abs=1e-9)


def naive_whitened(values, groups):
    tokens = [
        x
        for of, group in zip(values, groups, strict=True)
        for xs, a in zip(of, group, strict=True)
        if xs is not None
        for x, n in zip(xs, a.num_tokens_T, strict=True)
        for _ in range(n)
    ]
    mean, std = statistics.mean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    return [[None if xs is None else [(x - mean) / std for x in xs] for xs in of] for of in values]


@pytest.mark.parametrize("seed", SEEDS)
def test_reinforce_pp_whitens_what_is_still_to_come_over_every_token_of_the_step(seed):
    groups = random_groups(seed)
    returns = [[None if a.reward is None else naive_returns(a, 1.0) for a in group] for group in groups]
    assert_equal(estimator_of("reinforce_pp")(groups), naive_whitened(returns, groups))


@pytest.mark.parametrize("seed", SEEDS)
def test_with_a_baseline_it_takes_the_groups_mean_off_first(seed):
    groups = random_groups(seed)
    centred = [
        [
            None
            if a.reward is None
            else [a.reward - statistics.mean(b.reward for b in present(group))] * len(a.turn_rewards_T)
            for a in group
        ]
        for group in groups
    ]
    assert_equal(estimator_of("reinforce_pp_baseline")(groups), naive_whitened(centred, groups))


def test_reinforce_pp_learns_from_tied_groups_that_differ_from_one_another():
    groups = [[attempt(1.0), attempt(1.0)], [attempt(0.0), attempt(0.0)]]
    first, second = estimator_of("reinforce_pp")(groups)
    assert first[0][0] > 0 > second[0][0]
    for name in ("grpo", "reinforce_pp_baseline"):
        assert estimator_of(name)(groups) == [[(0.0,), (0.0,)], [(0.0,), (0.0,)]]


def test_a_step_whose_rewards_only_rounding_tells_apart_has_no_advantage():
    groups = [[attempt(0.1 + 0.2), attempt(0.3)], [attempt(0.3), attempt(0.1 * 3)]]
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        assert estimator_of(name)(groups) == [[(0.0,), (0.0,)], [(0.0,), (0.0,)]]


@pytest.mark.parametrize("weights", [{}, {"turns": 0.5}])
@pytest.mark.parametrize("seed", SEEDS)
def test_gdpo_is_trls_normalize_then_sum(weights, seed):
    from trl.trainer.utils import nanstd

    groups = [group[:2] for group in random_groups(seed)]
    names = ("score", "turns")
    rows = [a.parts.values() if a.reward is not None else [math.nan] * 2 for group in groups for a in group]
    # As `GRPOTrainer._generate_and_score_completions` has it, for groups of two.
    grouped = torch.tensor([list(r) for r in rows], dtype=torch.float64).view(-1, 2, 2)
    std = nanstd(grouped, dim=1, keepdim=True)
    ones = torch.tensor([weights.get(name, 1.0) for name in names], dtype=torch.float64)
    single = grouped.isnan().any(dim=1, keepdim=True).expand_as(grouped) & ~grouped.isnan()
    parts = ((grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (std + EPS)).masked_fill(single, 0.0)
    sums = (parts.view(-1, 2) * ones).nansum(dim=1)
    sums[grouped.view(-1, 2).isnan().all(dim=1)] = math.nan
    expected = ((sums - torch.nanmean(sums)) / (nanstd(sums) + EPS)).tolist()
    ours = estimator_of(ADVANTAGE_SETTINGS["gdpo"](type="gdpo", weights=weights))(groups)
    for xs, expected_x in zip([x for of in ours for x in of], expected, strict=True):
        assert math.isnan(expected_x) if xs is None else list(xs) == pytest.approx([expected_x] * len(xs), abs=1e-6)


def test_gdpo_tells_rollouts_with_the_same_sum_apart():
    group = [
        attempt(2.0, parts={"right": 2.0, "short": 0.0, "kind": 0.0}),
        attempt(2.0, parts={"right": 0.0, "short": 1.0, "kind": 1.0}),
        attempt(2.0, parts={"right": 1.0, "short": 1.0, "kind": 0.0}),
    ]
    assert estimator_of("grpo")([group]) == [[(0.0,)] * 3]
    [(first,), (second,), (third,)] = estimator_of("gdpo")([group])[0]
    assert first == pytest.approx(-1, abs=0.001) and second == pytest.approx(1, abs=0.001) and third == pytest.approx(0)


def test_parts_of_which_one_is_what_the_other_lacks_teach_gdpo_nothing():
    """Normalised they are each other's opposite; what is left of their sum is rounding."""
    group = [attempt(1.0, parts={"right": x, "wrong": 1 - x}) for x in (1.0, 0.0, 0.0, 0.3)]
    assert estimator_of("gdpo")([group]) == [[(0.0,)] * 4]
    varied = [attempt(x, parts={"right": x, "wrong": 0.1 * x * x}) for x in (0.7, 0.1, 0.3)]
    assert estimator_of("gdpo")([group, varied])[0] == [(0.0,)] * 4


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"reinforce_pp", "reinforce_pp_baseline"}))
def test_equal_rewards_have_no_advantage_beside_groups_that_vary(name):
    """Whatever is left of a rounded mean would have the group computed, and count as a gradient to Adam's momentum."""
    for seed in SEEDS:
        rng = random.Random(seed)
        tied = [attempt(0.3, parts={"a": 0.1, "b": 0.2}) for _ in range(3)]
        varied = [[attempt(x := rng.random(), parts={"a": x, "b": rng.random()}) for _ in range(5)] for _ in range(3)]
        assert estimator_of(name)([*varied, tied])[-1] == [(0.0,)] * 3


def test_a_group_to_which_no_turn_gave_anything_is_tied_where_gdpo_weighs_nothing_else():
    config = ADVANTAGE_SETTINGS["gdpo"](type="gdpo", weights={"right": 0.0})
    given = [attempt(1.0 + x, parts={"right": 1.0, "turn_rewards": x}) for x in (0.0, 0.5)]
    unrewarded = [attempt(x, parts={"right": x}) for x in (1.0, 0.0)]
    tied, varied = estimator_of(config)([unrewarded, given])
    assert tied == [(0.0,), (0.0,)] and varied[0][0] < 0 < varied[1][0]


def test_gdpo_refuses_parts_that_differ_within_a_group_and_weights_of_none():
    with pytest.raises(UserError, match="of one rollout's reward are right and of another short"):
        estimator_of("gdpo")([[attempt(1.0, parts={"right": 1.0}), attempt(0.0, parts={"short": 1.0})]])
    with pytest.raises(UserError, match="the reward has no parts"):
        estimator_of("gdpo")([[attempt(1.0), attempt(0.0)]])
    nothing = ADVANTAGE_SETTINGS["gdpo"](type="gdpo", weights={"right": 0.0, "turn_rewards": 0.0})
    with pytest.raises(UserError, match="those of right, turn_rewards, which are all parts of the reward, are 0"):
        estimator_of(nothing)([[attempt(1.0, parts={"right": 1.0}), attempt(0.0, parts={"right": 0.0})]])
    config = ADVANTAGE_SETTINGS["gdpo"](type="gdpo", weights={"rigth": 1.0})
    with pytest.raises(UserError, match="'rigth' is no part of the reward; it has right"):
        estimator_of(config)([[attempt(1.0, parts={"right": 1.0})]])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_mt_grpo_compares_each_turns_return_with_the_groups_same_turn(gamma, seed):
    groups = random_groups(seed)

    def of(a: Attempt, group: list[Attempt]) -> list[float]:
        return [
            naive_normalised(
                naive_returns(a, gamma)[k],
                [naive_returns(b, gamma)[k] for b in present(group) if len(b.turn_rewards_T) > k],
            )
            for k in range(len(a.turn_rewards_T))
        ]

    expected = [[None if a.reward is None else of(a, group) for a in group] for group in groups]
    assert_equal(estimator_of(ADVANTAGE_SETTINGS["mt_grpo"](gamma=gamma))(groups), expected)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_gigpo_compares_turns_that_began_in_the_same_state(weight, seed):
    groups = random_groups(seed)

    def of(a: Attempt, episode: float, group: list[Attempt]) -> list[float]:
        return [
            episode
            + weight
            * naive_normalised(
                naive_returns(a, 0.95)[k],
                [
                    value
                    for b in present(group)
                    for value, other in zip(naive_returns(b, 0.95), b.states_T, strict=True)
                    if other == state
                ],
            )
            for k, state in enumerate(a.states_T)
        ]

    expected = [
        [
            None if x is None else of(a, x, group)
            for a, x in zip(group, group_advantages([a.reward for a in group], "grpo").advantages, strict=True)
        ]
        for group in groups
    ]
    assert_equal(estimator_of(ADVANTAGE_SETTINGS["gigpo"](weight=weight))(groups), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_turn_discounted_adds_the_turns_rewards_to_the_outcomes_advantage(seed):
    groups = random_groups(seed)

    def process(a: Attempt) -> list[float]:
        n = len(a.turn_rewards_T)
        return [sum(0.5 ** (j - k) * a.turn_rewards_T[j] for j in range(k, n)) for k in range(n)]

    expected = []
    for group in groups:
        outcomes = [None if a.reward is None else a.reward - math.fsum(a.turn_rewards_T) for a in group]
        all_turns = [x for a in present(group) for x in process(a)]
        expected.append(
            [
                None if x is None else [x + naive_normalised(value, all_turns) for value in process(a)]
                for a, x in zip(group, group_advantages(outcomes, "grpo").advantages, strict=True)
            ]
        )
    assert_equal(estimator_of(ADVANTAGE_SETTINGS["turn_discounted"](gamma=0.5))(groups), expected)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_masked_rollouts_have_none_and_a_step_of_equal_rewards_has_zeros(name):
    group = [attempt(0.5, parts={"score": 0.5}), attempt(None), attempt(0.5, parts={"score": 0.5})]
    assert estimator_of(name)([group, group]) == [[(0.0,), None, (0.0,)]] * 2
    assert estimator_of(name)([[attempt(None)]]) == [[None]]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_rollout_without_turns_has_no_advantages_and_does_no_harm(name):
    group = [attempt(0.0, turns=(), parts={"score": 0.0}), attempt(1.0, parts={"score": 1.0})]
    [[first, second]] = estimator_of(name)([group])
    assert first == () and len(second) == 1


def test_every_estimator_of_the_config_is_in_the_register_and_may_be_named_alone():
    # A critic gives its own to each token.
    assert ESTIMATORS.keys() | {"custom", "gae"} == ADVANTAGE_SETTINGS.keys()
    for name in ESTIMATORS:
        assert advantage_settings(name).type == name


def test_what_the_kl_costs_is_taken_off_the_turn_the_reward_and_a_part_of_its_own():
    charged = with_costs(attempt(1.0, turns=(0.5, 0.0), parts={"score": 1.0}), [0.1, 0.2])
    assert charged.reward == pytest.approx(0.7) and charged.turn_rewards_T == pytest.approx((0.4, -0.2))
    assert charged.parts == {"score": 1.0, "kl": pytest.approx(-0.3)}
    assert charged.outcome == pytest.approx(0.5)


# --- the user's own ---

OWN = """
def centred(groups):
    return [[None if a.reward is None else a.reward - 0.5 for a in group] for group in groups]

class Scaled:
    def __init__(self, by): self.by = by
    def __call__(self, groups):
        return [[None if a.reward is None else [self.by * a.reward] * len(a.turn_rewards_T) for a in g] for g in groups]

def one_group(groups): return [centred(groups)[0]]
def one_short(groups): return [group[:1] for group in centred(groups)]
def one_turn(groups): return [[[0.0] for a in group] for group in groups]
def endless(groups): return [[float("inf") for a in group] for group in groups]
def enormous(groups): return [[1e25 for a in group] for group in groups]
def fails(groups): return groups[0][0].rewards
three = 3
"""


def custom(folder: Path, name: str, **kwargs: object):
    file = folder / "my_advantages.py"
    file.write_text(OWN)
    return ADVANTAGE_SETTINGS["custom"](type="custom", target=f"{file}:{name}", kwargs=kwargs)


def test_a_users_own_estimator_gives_a_number_a_rollout_or_one_a_turn(tmp_path):
    groups = [[attempt(1.0, turns=(0.0, 0.0)), attempt(None), attempt(0.0)]]
    check_advantage(custom(tmp_path, "centred"))
    assert estimator_of(custom(tmp_path, "centred"))(groups) == [[(0.5, 0.5), None, (-0.5,)]]
    assert estimator_of(custom(tmp_path, "Scaled", by=2.0))(groups) == [[(2.0, 2.0), None, (0.0,)]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_group", "expected a list of 2 groups; got one of 1"),
        ("one_short", "expected a list of 3 advantages for a group; got one of 1"),
        ("one_turn", "expected a number, or 2, one a turn, for a rollout; got one of 1"),
        ("endless", "expected finite numbers"),
        ("enormous", r"expected finite numbers up to 1e\+12 in size; got \[1e\+25"),
        ("fails", "raised AttributeError"),
        ("three", "expected a function of a step's groups; got int"),
        ("four", "has no 'four'"),
    ],
)
def test_one_that_does_not_work_is_refused_at_its_trial(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        check_advantage(custom(tmp_path, name))


def test_ones_own_estimator_is_made_once_and_can_not_shuffle_its_groups(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "class Counts:\n"
        "    num_steps = 0\n"
        "    def __call__(self, groups):\n"
        "        self.num_steps += 1\n"
        "        return [[float(self.num_steps)] * len(group) for group in groups]\n"
        "def sorts(groups):\n"
        "    groups[0].sort(key=lambda attempt: attempt.reward)\n"
    )
    counts = CustomAdvantageConfig(type="custom", target=f"{file}:Counts")
    groups = [[attempt(1.0), attempt(0.0)]]
    assert [estimator_of(counts)(groups)[0][0][0] for _ in range(3)] == [1.0, 2.0, 3.0]
    forget()
    assert estimator_of(counts)(groups)[0][0][0] == 1.0, "another run's"
    assert "own.py:Counts': is made anew; what it has kept of the steps before is in no chec" in forgotten(counts)[0]
    assert forgotten("grpo") == [] == forgotten(CustomAdvantageConfig(type="custom", target=f"{file}:sorts"))
    with pytest.raises(AttributeError) as error:
        estimator_of(CustomAdvantageConfig(type="custom", target=f"{file}:sorts"))(groups)
    assert "own.py:sorts" in "".join(error.value.__notes__)
