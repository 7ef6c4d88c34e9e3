"""Each loss of the register against a naive loop over rows and tokens; what all of them share, against definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.learning import LOSS_SETTINGS, CorrectionConfig, EntropyConfig, KlConfig, LossSettings
from trainer.learning.losses.base import LossInputs, log_histogram, reduce_metrics, row_means
from trainer.learning.losses.entropy import EntropyBonus
from trainer.learning.losses.kl import kl_estimate, kl_term
from trainer.learning.losses.registry import loss_of

seeds = given(seed=st.integers(0, 2**31))
few = settings(max_examples=15, deadline=None)


def config_of(kind: str, **given: object) -> LossSettings:
    return LOSS_SETTINGS[kind](type=kind, **{"tis_cap": None} | given)


def random_inputs(seed: int, n: int = 30, num_rows: int = 4) -> LossInputs:
    """The tokens of the rows lie mixed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return torch.randn(n, generator=generator) * scale

    old = -draw().abs() - 0.5
    return LossInputs(
        logprobs_N=(old + draw(0.3)).requires_grad_(),
        old_logprobs_N=old,
        sampler_logprobs_N=old + draw(0.3),
        ref_logprobs_N=old + draw(0.2),
        advantages_N=draw(),
        weights_N=torch.rand(n, generator=generator),
        row_of_N=torch.randint(num_rows, (n,), generator=generator),
    )


def tokens(inputs: LossInputs) -> list[tuple[float, ...]]:
    """(new, old, sampler, advantage, weight) of each token."""
    columns = (inputs.logprobs_N, inputs.old_logprobs_N, inputs.sampler_logprobs_N)
    return list(zip(*(t.tolist() for t in (*columns, inputs.advantages_N, inputs.weights_N)), strict=True))


def by_row(inputs: LossInputs, of) -> list[list[float]]:
    """For each token, `of` each token of its row."""
    rows = inputs.row_of_N.tolist()
    values = [of(*token) for token in tokens(inputs)]
    return [[v for v, r in zip(values, rows, strict=True) if r == row] for row in rows]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


@seeds
@few
def test_dual_clip_equals_a_naive_loop(seed):
    inputs = random_inputs(seed)
    loss, _ = loss_of(config_of("clipped", clip_low=0.1, clip_high=0.2, delta=1.3))(inputs)
    expected = 0.0
    for new, old, _, a, weight in tokens(inputs):
        ratio = math.exp(new - old)
        expected += weight * -min(min(ratio, 1.3) * a, clip(ratio, 0.9, 1.2) * a)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@seeds
@few
def test_gspo_equals_a_naive_loop_and_its_gradient_gives_each_token_its_own_advantage(seed):
    inputs = random_inputs(seed)
    loss, _ = loss_of(config_of("gspo", clip_low=0.05, clip_high=0.1))(inputs)
    loss.backward()
    expected, slopes = 0.0, []
    logs = by_row(inputs, lambda new, old, *_: new - old)
    for (_, _, _, a, weight), row in zip(tokens(inputs), logs, strict=True):
        ratio = math.exp(mean(row))
        inside = clip(ratio, 0.95, 1.1)
        expected += weight * -min(ratio * a, inside * a)
        slopes.append(-weight * ratio * a if ratio * a <= inside * a else 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(inputs.logprobs_N.grad, torch.tensor(slopes), rtol=1e-4, atol=1e-5)


def test_with_one_advantage_a_row_gspo_has_the_gradient_of_the_rows_ratio():
    inputs = random_inputs(3)
    new = inputs.logprobs_N
    row = inputs.row_of_N
    advantages = torch.tensor([0.5, -1.0, 2.0, 0.3])[row]
    given = {"advantages_N": advantages, "weights_N": torch.ones(len(new))}
    fields = {name: getattr(inputs, name) for name in LossInputs.__slots__} | given
    loss, _ = loss_of(config_of("gspo", clip_low=0.9, clip_high=9.0))(LossInputs(**fields))
    (own,) = torch.autograd.grad(loss, new)
    ratio = torch.exp(row_means(new - inputs.old_logprobs_N, row))
    (direct,) = torch.autograd.grad(-(ratio * advantages).sum(), new)
    torch.testing.assert_close(own, direct, rtol=1e-4, atol=1e-5)


@seeds
@few
def test_cispo_equals_a_naive_loop_and_keeps_every_tokens_gradient(seed):
    inputs = random_inputs(seed)
    loss, metrics = loss_of(config_of("cispo", ratio_cap=1.2))(inputs)
    loss.backward()
    expected, slopes = 0.0, []
    for new, old, _, a, weight in tokens(inputs):
        capped = min(math.exp(new - old), 1.2)
        expected += weight * -capped * a * new
        slopes.append(-weight * capped * a)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(inputs.logprobs_N.grad, torch.tensor(slopes), rtol=1e-4, atol=1e-5)
    share = mean([float(new - old > math.log(1.2)) for new, old, *_ in tokens(inputs)])
    assert reduce_metrics([metrics])["ratio_capped_share"] == pytest.approx(share)


@seeds
@few
def test_reinforce_equals_a_naive_loop(seed):
    inputs = random_inputs(seed)
    loss, _ = loss_of(config_of("reinforce"))(inputs)
    expected = sum(weight * -a * new for new, _, _, a, weight in tokens(inputs))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["clipped", "gspo", "cispo", "reinforce"])
@seeds
@few
def test_on_policy_every_loss_has_the_gradient_of_reinforce(kind, seed):
    inputs = random_inputs(seed)
    fields = {name: getattr(inputs, name) for name in LossInputs.__slots__}
    fields["old_logprobs_N"] = inputs.logprobs_N.detach()
    loss, metrics = loss_of(config_of(kind))(LossInputs(**fields))
    loss.backward()
    torch.testing.assert_close(inputs.logprobs_N.grad, -inputs.advantages_N * inputs.weights_N)
    assert reduce_metrics([metrics])["ratio"] == pytest.approx(1.0)


# --- what corrects for the sampler ---

CORRECTIONS = {
    "token, truncated": (1.1, {}),
    "sequence, truncated": (1.1, {"level": "sequence"}),
    "token, masked": (1.3, {"ratio_range": (0.8, 1.3)}),
    "masked alone": (None, {"ratio_range": (0.8, 1.3)}),
    "by geometric mean": (None, {"mean_range": (0.97, 1.05)}),
    "by outlier": (None, {"outlier_range": (0.6, 1.8)}),
    "all": (1.1, {"ratio_range": (0.8, 1.3), "mean_range": (0.9, 1.1), "outlier_range": (0.5, 2.0)}),
}


def naive_weights(inputs: LossInputs, cap: float | None, config: CorrectionConfig) -> list[float]:
    weights = []
    for (_, old, sampler, *_), row in zip(tokens(inputs), by_row(inputs, lambda _, o, s, *__: o - s), strict=True):
        ratio = math.exp(old - sampler)
        weight = 1.0
        if cap is not None:
            weight = min(ratio if config.level == "token" else math.exp(sum(row)), cap)
        if config.ratio_range and not config.ratio_range[0] <= ratio <= config.ratio_range[1]:
            weight = 0.0
        if config.mean_range and not config.mean_range[0] <= math.exp(mean(row)) <= config.mean_range[1]:
            weight = 0.0
        if config.outlier_range:
            low, high = config.outlier_range
            weight *= all(low <= math.exp(x) <= high for x in row)
        weights.append(weight)
    return weights


@pytest.mark.parametrize("kind", ["clipped", "gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("case", CORRECTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_correction_multiplies_each_tokens_gradient_by_its_naive_weight(kind, case, seed):
    cap, given = CORRECTIONS[case]
    inputs = random_inputs(seed)
    plain, _ = loss_of(config_of(kind))(inputs)
    (plain_grad,) = torch.autograd.grad(plain, inputs.logprobs_N)
    config = config_of(kind, tis_cap=cap, correction=given)
    loss, metrics = loss_of(config)(inputs)
    (grad,) = torch.autograd.grad(loss, inputs.logprobs_N)
    weights = torch.tensor(naive_weights(inputs, cap, config.correction))
    torch.testing.assert_close(grad, plain_grad * weights, rtol=1e-4, atol=1e-5)
    means = reduce_metrics([metrics])
    assert means["tis_weight"] == pytest.approx(weights.mean().item(), rel=1e-4)
    effective = weights.sum() ** 2 / (len(weights) * weights.square().sum()) if weights.any() else weights.sum()
    if cap is not None or given:
        assert means["effective_samples"] == pytest.approx(effective.item(), rel=1e-4)
    assert ("mismatch_masked_share" in means) == any("range" in name for name in given)


def test_where_sampler_and_trainer_agree_nothing_is_masked_and_every_sample_counts():
    inputs = random_inputs(0)
    fields = {name: getattr(inputs, name) for name in LossInputs.__slots__}
    fields["sampler_logprobs_N"] = inputs.old_logprobs_N
    narrow = {"ratio_range": (1.0, 1.0), "mean_range": (1.0, 1.0), "outlier_range": (1.0, 1.0)}
    _, metrics = loss_of(config_of("clipped", tis_cap=1.0, correction=narrow))(LossInputs(**fields))
    means = reduce_metrics([metrics])
    assert (means["mismatch_masked_share"], means["effective_samples"], means["tis_weight"]) == (0.0, 1.0, 1.0)


def test_where_all_is_masked_no_sample_counts():
    inputs = random_inputs(0)
    fields = {name: getattr(inputs, name) for name in LossInputs.__slots__}
    fields["sampler_logprobs_N"] = inputs.old_logprobs_N - 1.0
    _, metrics = loss_of(config_of("clipped", correction={"ratio_range": (0.9, 1.1)}))(LossInputs(**fields))
    means = reduce_metrics([metrics])
    assert (means["mismatch_masked_share"], means["effective_samples"], means["tis_weight"]) == (1.0, 0.0, 0.0)


# --- KL ---


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_on_policy_the_expected_gradient_of_each_term_is_that_of_the_kl_itself(estimator):
    logits = torch.tensor([0.3, -0.7, 1.1], requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.2, 0.4, 0.1]), 0)
    logprobs = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    old = logprobs.detach()
    zeros = torch.zeros(3)
    inputs = LossInputs(
        logprobs_N=logprobs,
        old_logprobs_N=old,
        sampler_logprobs_N=old,
        ref_logprobs_N=ref,
        advantages_N=zeros,
        weights_N=zeros,
        row_of_N=zeros.long(),
    )
    # Each outcome once, weighted by how often the policy draws it.
    (grad,) = torch.autograd.grad((old.exp() * kl_term(inputs, estimator)).sum(), logits)
    torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_unbiased_estimates_average_to_the_divergence(estimator):
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    expected = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), expected)


@pytest.mark.parametrize("kind", ["clipped", "gspo", "cispo", "reinforce"])
def test_every_loss_has_the_same_kl_term_and_none_where_the_kl_stands_in_the_reward(kind):
    inputs = random_inputs(1)
    plain, _ = loss_of(config_of(kind))(inputs)
    for estimator in ("k1", "k2", "k3"):
        kl = KlConfig(estimator=estimator)
        with_kl, metrics = loss_of(config_of(kind, kl_coef=0.5, kl=kl))(inputs)
        term = 0.5 * (kl_term(inputs, estimator) * inputs.weights_N).sum()
        torch.testing.assert_close(with_kl, plain + term)
        assert "kl_to_reference" in metrics
    in_reward, metrics = loss_of(config_of(kind, kl_coef=0.5, kl=KlConfig(place="reward")))(inputs)
    assert in_reward.item() == plain.item() and "kl_to_reference" not in metrics


# --- entropy ---


def test_the_entropys_weight_rises_below_the_floor_and_falls_above_it_between_its_bounds():
    bonus = EntropyBonus(EntropyConfig(coef=0.01, floor=0.5, step=0.01, max_coef=0.025))
    seen = []
    for entropy in (0.7, 0.4, 0.4, 0.3, 0.6, 0.6, 0.6, 0.2):
        seen.append(bonus.applied)
        bonus.learn(entropy)
    assert seen == pytest.approx([0.0, 0.0, 0.01, 0.02, 0.025, 0.0, 0.0, 0.0])
    assert bonus.applied == pytest.approx(0.01)


def test_without_a_floor_the_weight_stays():
    bonus = EntropyBonus(EntropyConfig(coef=0.3))
    bonus.learn(9.0)
    term = bonus.term(torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.5]))
    assert term.item() == pytest.approx(-0.3 * 1.25)


# --- metrics of microbatches and processes together ---


@seeds
@few
def test_quantiles_and_means_of_a_part_do_not_depend_on_how_the_tokens_are_cut(seed):
    generator = torch.Generator().manual_seed(seed)
    logs = torch.randn(500, generator=generator) * 0.5
    parts = [{"num_tokens": torch.tensor(float(len(x))), "r_histogram": log_histogram(x)} for x in logs.split(77)]
    whole = [{"num_tokens": torch.tensor(500.0), "r_histogram": log_histogram(logs)}]
    reduced = reduce_metrics(parts)
    assert reduced == reduce_metrics(whole)
    for name, share in (("r_p95", 0.95), ("r_p99", 0.99)):
        exact = logs.sort().values[math.ceil(share * 500) - 1].exp().item()
        assert reduced[name] == pytest.approx(exact, rel=0.011)


def test_ratios_beyond_the_histogram_count_in_its_outermost_bins():
    counts = log_histogram(torch.tensor([-99.0, 99.0, 99.0]))
    assert counts[0] == 1 and counts[-1] == 2 and counts.sum() == 3


def test_the_mismatch_is_told_by_staleness_where_tokens_differ_in_it():
    inputs = random_inputs(0)
    n = len(inputs.logprobs_N)
    fields = {name: getattr(inputs, name) for name in LossInputs.__slots__}
    loss = loss_of(config_of("clipped"))
    _, fresh = loss(LossInputs(**fields | {"staleness_N": torch.zeros(n, dtype=torch.int64)}))
    assert not [name for name in reduce_metrics([fresh]) if "staleness" in name]
    # The first half has no stale token: what is told of the fresh ones counts them all the same.
    staleness = torch.cat((torch.zeros(10, dtype=torch.int64), torch.arange(n - 10) % 3))
    halves = []
    for part in (slice(0, 10), slice(10, n)):
        cut = {name: None if t is None else t[part] for name, t in (fields | {"staleness_N": staleness}).items()}
        halves.append(loss(LossInputs(**cut))[1])
    means = reduce_metrics(halves)
    diff = inputs.old_logprobs_N - inputs.sampler_logprobs_N
    kl = diff.exp() - diff - 1
    for k in range(3):
        assert means[f"mismatch_kl/staleness_{k}"] == pytest.approx(kl[staleness == k].mean().item(), rel=1e-4)
        assert means[f"mismatch_abs/staleness_{k}"] == pytest.approx(diff[staleness == k].abs().mean().item(), rel=1e-4)
        assert means[f"num_tokens/staleness_{k}"] == (staleness == k).sum().item()
