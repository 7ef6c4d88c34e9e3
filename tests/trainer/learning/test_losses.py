import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import LossConfig
from trainer.learning.losses.base import LossInputs, k3, reduce_metrics, token_weights
from trainer.learning.losses.registry import loss_of

SETTINGS = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.1, "tis_cap": 1.5}


def random_batch(seed: int, n: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return torch.randn(n, generator=generator) * scale

    old = -draw().abs() - 0.5
    return {
        "logprobs_N": (old + draw(0.3)).requires_grad_(),
        "old_logprobs_N": old,
        "sampler_logprobs_N": old + draw(0.4),
        "ref_logprobs_N": old + draw(0.2),
        "advantages_N": draw(),
        "weights_N": torch.rand(n, generator=generator),
    }


def policy_loss(*, clip_low, clip_high, kl_coef, tis_cap, **tensors):
    inputs = LossInputs(row_of_N=torch.zeros(len(tensors["logprobs_N"]), dtype=torch.int64), **tensors)
    config = LossConfig(clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef, tis_cap=tis_cap)
    return loss_of(config)(inputs)


def naive_loss(batch: dict[str, torch.Tensor], *, clip_low, clip_high, kl_coef, tis_cap) -> float:
    total = 0.0
    for new, old, sampler, ref, advantage, weight in zip(*(t.tolist() for t in batch.values()), strict=True):
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        value = -min(ratio * advantage, clipped * advantage)
        if tis_cap is not None:
            value *= min(math.exp(old - sampler), tis_cap)
        if kl_coef:
            value += kl_coef * ratio * (math.exp(ref - new) - (ref - new) - 1)
        total += weight * value
    return total


@pytest.mark.parametrize("tis_cap", [None, 1.5])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_the_loss_equals_a_naive_loop(kl_coef, tis_cap, seed):
    batch, options = random_batch(seed), SETTINGS | {"kl_coef": kl_coef, "tis_cap": tis_cap}
    loss, _ = policy_loss(**batch, **options)
    assert loss.item() == pytest.approx(naive_loss(batch, **options), rel=1e-4, abs=1e-4)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_without_advantage_and_kl_nothing_is_learnt(seed):
    batch = random_batch(seed)
    batch["advantages_N"] = torch.zeros_like(batch["advantages_N"])
    loss, _ = policy_loss(**batch, **SETTINGS | {"kl_coef": 0.0})
    loss.backward()
    assert not batch["logprobs_N"].grad.any()


def test_on_policy_the_gradient_is_reinforce():
    batch = random_batch(0)
    batch["old_logprobs_N"] = batch["logprobs_N"].detach()
    loss, metrics = policy_loss(**batch, **SETTINGS | {"kl_coef": 0.0, "tis_cap": None})
    loss.backward()
    torch.testing.assert_close(batch["logprobs_N"].grad, -batch["advantages_N"] * batch["weights_N"])
    assert reduce_metrics([metrics])["ratio"] == 1.0


def test_on_policy_the_kl_gradient_is_that_of_the_kl_itself():
    batch = random_batch(1)
    batch["advantages_N"] = torch.zeros_like(batch["advantages_N"])
    batch["old_logprobs_N"] = batch["logprobs_N"].detach()
    loss, _ = policy_loss(**batch, **SETTINGS)
    loss.backward()
    expected = 0.1 * batch["weights_N"] * (batch["logprobs_N"].detach() - batch["ref_logprobs_N"])
    torch.testing.assert_close(batch["logprobs_N"].grad, expected)


def test_beyond_the_clip_range_the_gradient_stops_only_where_it_would_go_further():
    old = torch.zeros(4)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    loss, metrics = policy_loss(
        logprobs_N=new,
        old_logprobs_N=old,
        sampler_logprobs_N=old,
        ref_logprobs_N=None,
        advantages_N=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        weights_N=torch.ones(4),
        **SETTINGS | {"kl_coef": 0.0},
    )
    loss.backward()
    assert (new.grad != 0).tolist() == [False, True, True, False]
    means = reduce_metrics([metrics])
    assert (means["clipped_high_share"], means["clipped_low_share"]) == (0.25, 0.25)


def test_the_truncated_weight_is_capped_and_takes_no_gradient():
    batch = random_batch(2)
    batch["old_logprobs_N"] = batch["logprobs_N"].detach()
    plain, _ = policy_loss(**batch, **SETTINGS | {"kl_coef": 0.0, "tis_cap": None})
    (plain_grad,) = torch.autograd.grad(plain, batch["logprobs_N"])
    loss, metrics = policy_loss(**batch, **SETTINGS | {"kl_coef": 0.0})
    (grad,) = torch.autograd.grad(loss, batch["logprobs_N"])
    weight = (batch["old_logprobs_N"] - batch["sampler_logprobs_N"]).exp()
    torch.testing.assert_close(grad, plain_grad * weight.clamp(max=1.5))
    means = reduce_metrics([metrics])
    assert means["tis_capped_share"] == pytest.approx((weight > 1.5).float().mean().item())
    assert means["tis_weight"] == pytest.approx(weight.clamp(max=1.5).mean().item())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10))
def test_weights_equal_the_definition_of_each_normalisation(num_tokens):
    values = [[(r * 7 + t) % 5 - 2.0 for t in range(n)] for r, n in enumerate(num_tokens)]

    def weighted(**kwargs) -> float:
        return sum(w * sum(v) for w, v in zip(token_weights(num_tokens, **kwargs), values, strict=True))

    flat = [x for v in values for x in v]
    means = [sum(v) / len(v) for v in values]
    assert weighted(normalisation="token") == pytest.approx(sum(flat) / len(flat), abs=1e-9)
    assert weighted(normalisation="sequence") == pytest.approx(sum(means) / len(means), abs=1e-9)
    constant = weighted(normalisation="constant", constant_tokens=64)
    assert constant == pytest.approx(sum(flat) / (len(values) * 64), abs=1e-9)


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 39))
@settings(max_examples=20)
def test_loss_and_metrics_of_a_batch_are_those_of_its_parts(seed, cut):
    batch = random_batch(seed)
    whole_loss, whole = policy_loss(**batch, **SETTINGS)
    halves = [
        policy_loss(**{k: t[part] for k, t in batch.items()}, **SETTINGS) for part in (slice(cut), slice(cut, None))
    ]
    assert sum(loss.item() for loss, _ in halves) == pytest.approx(whole_loss.item(), rel=1e-4, abs=1e-4)
    assert reduce_metrics([m for _, m in halves]) == pytest.approx(reduce_metrics([whole]), rel=1e-4, abs=1e-6)


@given(seed=st.integers(0, 2**31))
def test_k3_is_never_negative_and_zero_for_equal_distributions(seed):
    batch = random_batch(seed)
    new = batch["logprobs_N"].detach()
    assert (k3(new, batch["old_logprobs_N"]) >= -1e-6).all()
    assert not k3(new, new).any()


def test_k3_averages_to_the_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    expected = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close((p * k3(p.log(), q.log())).sum(), expected)


def test_metrics_of_no_work_are_empty():
    assert reduce_metrics([]) == {"num_tokens": 0.0}
