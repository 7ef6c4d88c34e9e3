"""What the policy keeps beside its weights: the reference of the KL, and the weight of the bonus for entropy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.policy_worker import random_samples, run_updates, save_tiny_llama, tiny_policy
from trainer.config import LossConfig
from trainer.learning.checkpoint import _flat, _read
from trainer.learning.losses.kl import kl_estimate


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def resumed(policy, model: Path, tmp_path: Path):
    """Another policy in the state that a checkpoint's file holds."""
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    state = policy.state_dict()
    save_file(_flat(state), path)
    other = tiny_policy(model, seed=1)
    other.load_state_dict(_read(path, list(state["adapter"])))
    return other


def kl(policy, loss: LossConfig) -> float:
    flat = [replace(s, advantages=(0.0,) * len(s.token_ids)) for s in random_samples(seed=9)]
    return policy.update(flat, loss, temperature=1.0, constant_tokens=64).metrics["kl_to_reference"]


def test_the_reference_is_refreshed_every_so_many_steps_and_a_run_that_goes_on_has_the_same(model, tmp_path):
    loss = LossConfig(kl_coef=0.1, kl={"refresh_steps": 2})
    policy = tiny_policy(model)
    whole = [policy.update(random_samples(seed=i), loss, temperature=0.8, constant_tokens=64).metrics for i in range(3)]
    assert whole[0]["kl_to_reference"] == 0 < whole[1]["kl_to_reference"] and whole[2]["kl_to_reference"] == 0
    first = tiny_policy(model)
    for i in range(2):
        first.update(random_samples(seed=i), loss, temperature=0.8, constant_tokens=64)
    again = resumed(first, model, tmp_path)
    assert again.update(random_samples(seed=2), loss, temperature=0.8, constant_tokens=64).metrics == whole[2]
    a, b = policy.state_dict(), again.state_dict()
    assert all(torch.equal(a["adapter"][n], b["adapter"][n]) for n in a["adapter"])
    assert all(map(torch.equal, a["reference"], b["reference"]))


def test_the_base_stays_the_reference_where_the_config_says_so(model):
    policy = tiny_policy(model)
    run_updates(policy, 2)
    policy.keep_as_reference()
    assert kl(policy, LossConfig(kl_coef=0.1)) == 0
    assert kl(policy, LossConfig(kl_coef=0.1, kl={"reference": "base"})) > 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergences_are_the_estimates_at_each_trained_token(model, estimator):
    policy, samples = tiny_policy(model, max_microbatch_tokens=64), random_samples(seed=4)
    run_updates(policy, 2)
    loss = LossConfig(kl_coef=0.1, kl={"place": "reward", "estimator": estimator})
    found = policy.divergences(samples, loss, 0.7)
    new, base = (policy.logprobs(samples, temperature=0.7, adapter=on) for on in (True, False))
    for of_tokens, a, b in zip(found, new, base, strict=True):
        assert of_tokens == pytest.approx(kl_estimate(a, b, estimator).tolist(), abs=1e-5)


def test_a_bonus_for_entropy_raises_it_without_any_advantage_and_its_weight_is_in_the_checkpoint(model, tmp_path):
    samples = [replace(s, advantages=(0.0,) * len(s.token_ids)) for s in random_samples()]
    loss = LossConfig(entropy={"coef": 0.1, "floor": 99.0, "step": 0.05, "max_coef": 0.3})

    def step(policy) -> dict[str, float]:
        return policy.update(samples, loss, temperature=1.0, constant_tokens=64).metrics

    policy = tiny_policy(model)
    seen = [step(policy) for _ in range(4)]
    assert [m["entropy_coef"] for m in seen] == pytest.approx([0.0, 0.15, 0.2, 0.25])
    assert seen[0]["entropy"] == seen[1]["entropy"] < seen[2]["entropy"] < seen[3]["entropy"]
    first = tiny_policy(model)
    for _ in range(2):
        step(first)
    again = resumed(first, model, tmp_path)
    assert step(again) == seen[2] and step(again) == seen[3]


def test_above_the_floor_a_step_without_any_advantage_makes_no_update_and_is_measured(model):
    """Momentum and decay would move the adapter, and the bonus that could is not at work."""
    policy, samples = tiny_policy(model, weight_decay=0.1), random_samples()
    flat = [replace(s, advantages=(0.0,) * len(s.token_ids)) for s in samples]
    loss = LossConfig(entropy={"coef": 0.1, "floor": 0.01})
    policy.update(samples, loss, temperature=1.0, constant_tokens=64)
    before = policy.state_dict()
    metrics = policy.update(flat, loss, temperature=1.0, constant_tokens=64).metrics
    assert (metrics["skipped_updates"], metrics["entropy_coef"], policy.num_updates) == (1.0, 0.0, 1)
    assert metrics["entropy"] > 0.01
    after = policy.state_dict()
    assert all(torch.equal(before["adapter"][name], weight) for name, weight in after["adapter"].items())
    assert after["entropy"] == (pytest.approx(0.09), metrics["entropy"])


def test_entropy_is_measured_where_it_has_no_weight_and_rows_without_advantage_then_cost_nothing(model):
    samples = random_samples()
    plain, measured = tiny_policy(model), tiny_policy(model)
    without = plain.update(samples, LossConfig(), temperature=1.0, constant_tokens=64).metrics
    told = measured.update(samples, LossConfig(entropy={}), temperature=1.0, constant_tokens=64).metrics
    assert "entropy" not in without and told["entropy"] > 0 == told["entropy_coef"]
    a, b = plain.state_dict()["adapter"], measured.state_dict()["adapter"]
    assert all(torch.equal(a[name], b[name]) for name in a)
