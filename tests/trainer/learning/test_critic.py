"""PPO's critic: advantages against a naive double sum, values and their loss against plain autograd, exact resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import OPTConfig, OPTForCausalLM

from envs.errors import UserError
from envs.types import Episode, StopReason, Task
from graders.types import Grade
from tests.support import ROOT
from tests.support.configs import scripted_config
from tests.support.policy_worker import (
    PPO,
    random_samples,
    returned,
    save_tiny_llama,
    tiny_policy,
    tokens_before,
    train_critic,
)
from tests.support.scripted_run import run
from trainer.config import LossConfig, RunConfig
from trainer.config.advantages import CriticConfig, GaeConfig
from trainer.learning import adapter as lora
from trainer.learning.advantages.base import Attempt
from trainer.learning.advantages.gae import gae, token_rewards, whitened, with_critics_advantages
from trainer.learning.critic import value_loss
from trainer.learning.policy import Policy
from trainer.learning.samples import Sample, rollout_samples
from trainer.types import Ledger, Rollout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def with_critic(model: Path, **critic_or_optim: object) -> Policy:
    critic = {k: v for k, v in critic_or_optim.items() if k in CriticConfig.model_fields}
    optim = {k: v for k, v in critic_or_optim.items() if k not in critic}
    return tiny_policy(model, critic=CriticConfig(**({"learning_rate": 1e-2} | critic)), **optim)


def update(policy: Policy, samples: list[Sample], loss: LossConfig = PPO):
    return policy.update(samples, loss, temperature=1.0, constant_tokens=64)


# --- advantages


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=12),
    st.floats(-1, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_the_discounted_sum_of_surprises(pairs, last_value, gamma, lam):
    rewards, values = [r for r, _ in pairs], [v for _, v in pairs]
    following = [*values[1:], last_value]
    surprises = [r + gamma * then - v for r, then, v in zip(rewards, following, values, strict=True)]
    naive = [
        sum((gamma * lam) ** (j - i) * surprises[j] for j in range(i, len(surprises))) for i in range(len(surprises))
    ]
    assert gae(rewards, values, last_value=last_value, gamma=gamma, lam=lam) == pytest.approx(naive, abs=1e-9)


def test_with_lambda_one_and_no_discount_it_is_the_return_less_the_value():
    found = gae([0.0, 0.5, 0.0, 1.0], [0.3, 0.1, 0.9, 0.2], last_value=0.0, gamma=1.0, lam=1.0)
    assert found == pytest.approx([1.5 - 0.3, 1.5 - 0.1, 1.0 - 0.9, 1.0 - 0.2])


def test_rewards_stand_at_the_last_token_of_their_turn_and_the_outcome_at_the_end():
    attempt = Attempt(reward=1.0, turn_rewards_T=(0.25, 0.0, -0.5), num_tokens_T=(2, 1, 2), states_T=("a", "b", "c"))
    assert token_rewards(attempt, [0, 0, 1, 2, 2]) == [0.0, 0.25, 0.0, 0.0, -0.5 + 1.25]
    silent = Attempt(reward=0.0, turn_rewards_T=(0.0, 0.5), num_tokens_T=(2, 0), states_T=("a", "b"))
    assert token_rewards(silent, [0, 0]) == [0.0, 0.5 - 0.5]


def test_whitened_advantages_have_mean_0_and_spread_1_over_all_tokens():
    white = whitened([[1.0, 2.0], [4.0]])
    flat = torch.tensor([x for of in white for x in of])
    assert flat.mean().item() == pytest.approx(0, abs=1e-6) and flat.std().item() == pytest.approx(1, abs=1e-3)
    assert whitened([[3.0, 3.0], [3.0]]) == [[0.0, 0.0], [0.0]]


def played(stop: StopReason, *, reward: float | None = 1.0) -> Rollout:
    """Two turns in two rows, as under a template that rewrites what stands before."""
    first, second = Ledger(), Ledger()
    first.append_context([5, 6])
    first.append_sampled([7, 8], [-1.0, -1.0], 3, turn=0)
    second.append_context([5, 9, 10])
    second.append_sampled([11, 12, 13], [-1.0, -1.0, -1.0], 3, turn=1)
    episode = Episode(rollout_id="r", task_id="t", messages=(), turns=(), stop_reason=stop)
    grade = None if reward is None else Grade(reward=reward, parts={"score": reward})
    return Rollout(episode=episode, task=Task(task_id="t", messages=()), ledgers=(first, second), grade=grade)


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("stop", [StopReason.ANSWERED, StopReason.MAX_TURNS])
def test_time_runs_over_a_rollouts_rows_and_a_cut_episode_may_go_on_in_the_critics_eyes(stop, bootstrap):
    rollout = played(stop)
    rows = rollout_samples(rollout.ledgers, advantage=0.0, rollout_id="r", task_id="t")
    attempt = Attempt(reward=1.0, turn_rewards_T=(0.0, 0.0), num_tokens_T=(2, 3), states_T=("a", "b"))
    config = GaeConfig(lam=0.5, gamma=0.9, whiten=False, bootstrap=bootstrap)
    asked: list[Sample] = []

    def values_of(samples):
        asked.extend(samples)
        return [[0.1 * t for t in tokens_before(s)] for s in samples]

    found = with_critics_advantages([rows], [attempt], [rollout], config, values_of, max_tokens=99)
    cut = bootstrap and stop is StopReason.MAX_TURNS
    assert len(asked) == 2 + cut
    values = [0.6, 0.7, 1.0, 1.1, 1.2]
    if cut:
        assert asked[-1].token_ids[:-1] == tuple(rollout.ledgers[-1].prompt_ids), "with what followed the last turn"
    expected = gae([0, 0, 0, 0, 1.0], values, last_value=1.3 if cut else 0.0, gamma=0.9, lam=0.5)
    assert [x for s in found for x in s.trained(s.advantages)] == pytest.approx(expected)
    assert [x for s in found for x in s.trained(s.values)] == pytest.approx(values)
    returns = [x for s in found for x in s.trained(s.returns)]
    assert returns == pytest.approx([a + v for a, v in zip(expected, values, strict=True)])


def test_no_value_is_asked_for_behind_more_tokens_than_an_episode_may_have(tmp_path):
    """The output that ended the episode is no training row: the model may have no places for it."""
    rollout = played(StopReason.MAX_EPISODE_TOKENS)
    rollout.ledgers[-1].append_context([14] * 200)
    rows = rollout_samples(rollout.ledgers, advantage=0.0, rollout_id="r", task_id="t")
    attempt = Attempt(reward=1.0, turn_rewards_T=(0.0, 0.0), num_tokens_T=(2, 3), states_T=("a", "b"))
    small = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1, "dropout": 0.0}
    config = OPTConfig(vocab_size=97, max_position_embeddings=128, num_attention_heads=2, pad_token_id=0, **small)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    values_of = with_critic(tmp_path, max_length=128).values
    settings = GaeConfig(bootstrap=True)
    found = with_critics_advantages([rows], [attempt], [rollout], settings, values_of, max_tokens=128)
    assert [s.num_trainable for s in found] == [2, 3]


def test_a_masked_rollout_gives_no_rows_and_counts_in_no_mean():
    rollouts = [played(StopReason.ANSWERED), played(StopReason.WORLD_FAULT, reward=None)]
    rows = [rollout_samples(rollouts[0].ledgers, advantage=0.0, rollout_id="r", task_id="t"), []]
    attempts = [
        Attempt(reward=r, turn_rewards_T=(0.0, 0.0), num_tokens_T=(2, 3), states_T=("a", "b")) for r in (1, None)
    ]
    found = with_critics_advantages(
        rows, attempts, rollouts, GaeConfig(), lambda s: [[0.0] * x.num_trainable for x in s], max_tokens=99
    )
    assert len(found) == 2 and math.fsum(x for s in found for x in s.trained(s.advantages)) == pytest.approx(
        0, abs=1e-6
    )


# --- the critic


def test_a_value_is_that_of_the_state_before_the_token_by_the_critics_own_adapter(model):
    policy, samples = with_critic(model), random_samples()
    assert policy.values(samples) == [[0.0] * s.num_trainable for s in samples], "it begins at 0"
    update(policy, returned(samples, policy.values(samples)))
    found = policy.values(samples)
    head = policy.critic._head
    with lora.as_adapter(policy.model, "critic"), torch.no_grad():
        for sample, values in list(zip(samples, found, strict=True))[:4]:
            states = policy.model.get_base_model().get_decoder()(torch.tensor([sample.token_ids])).last_hidden_state[0]
            naive = [float(head(states[t - 1])) for t, on in enumerate(sample.trainable) if on]
            assert values == pytest.approx(naive, abs=1e-5) and any(values)


def test_it_learns_what_it_is_told_and_leaves_the_policys_log_probabilities_to_the_policy(model):
    policy, samples = with_critic(model, warmup_steps=40), random_samples()
    logprobs = policy.logprobs(samples, temperature=1.0)
    errors = []
    for _ in range(40):
        told = returned(samples, policy.values(samples))
        errors.append(update(policy, told).metrics["critic_error"])
    assert errors[0] == pytest.approx(1.0) and errors[-1] < 0.4 * errors[0]
    assert policy.num_updates == 0, "the critic alone was trained"
    for one, other in zip(logprobs, policy.logprobs(samples, temperature=1.0), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_its_adapter_learns_on_after_the_base_was_asked(model):
    """As every run asks it, for the canary; PEFT's own way to the base freezes all adapters but the policy's."""
    asked, other, samples = with_critic(model), with_critic(model), random_samples()
    base = asked.logprobs(samples, temperature=1.0, adapter=False)
    for _ in range(3):
        for policy in (asked, other):
            update(policy, returned(samples, policy.values(samples)))
    for one, two in zip(asked.critic.parameters, other.critic.parameters, strict=True):
        assert torch.equal(one, two) and one.any()
    for then, now in zip(base, asked.logprobs(samples, temperature=1.0, adapter=False), strict=True):
        torch.testing.assert_close(then, now, rtol=0, atol=0)


def test_where_all_advantages_are_0_the_critic_learns_and_the_policy_stays(model):
    """Its moments and the decay of weights would move it: the rule is that of every loss."""
    policy, samples = with_critic(model, weight_decay=0.1), random_samples()
    update(policy, returned(samples, policy.values(samples)))
    before, values = policy.state_dict()["adapter"], policy.values(samples)
    flat = [replace(s, advantages=(0.0,) * len(s.token_ids)) for s in samples]
    metrics = update(policy, returned(flat, values)).metrics
    assert (metrics["skipped_updates"], policy.num_updates) == (1.0, 1) and metrics["critic_grad_norm"] > 0
    after = policy.state_dict()["adapter"]
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert policy.values(samples) != values
    # No gradient of the flat step is left for the next.
    other = with_critic(model, weight_decay=0.1)
    other.load_state_dict(policy.state_dict())
    for one in (policy, other):
        update(one, returned(samples, values))
    again = other.state_dict()["adapter"]
    assert all(torch.equal(again[name], weight) for name, weight in policy.state_dict()["adapter"].items())


def test_the_policy_beside_a_critic_is_the_policy_without(model):
    samples = [replace(s, advantages=tuple(0.5 * a for a in s.advantages)) for s in random_samples()]
    alone, beside = tiny_policy(model), with_critic(model)
    update(alone, samples, LossConfig())
    update(beside, returned(samples, beside.values(samples)))
    one, other = alone.state_dict()["adapter"], beside.state_dict()["adapter"]
    assert one.keys() == other.keys(), "an exported adapter holds nothing of the critic's"
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_loss_is_ppos_clipped_square(clip):
    values, old, returns = torch.tensor([0.5, 0.5, 0.1]), torch.tensor([0.0, 0.4, 0.1]), torch.tensor([1.0, 1.0, 0.0])
    near = [0.2, 0.5, 0.1]
    worst = [max((v - r) ** 2, (n - r) ** 2) for v, n, r in zip(values, near, returns, strict=True)]
    expected = [(v - r) ** 2 for v, r in zip(values, returns, strict=True)] if clip is None else worst
    assert value_loss(values, old, returns, clip).tolist() == pytest.approx([float(x) / 2 for x in expected])


def test_cutting_the_work_otherwise_changes_neither_policy_nor_critic(model):
    states = []
    for size in (64, 100_000):
        policy = with_critic(model, max_microbatch_tokens=size, num_epochs=2, minibatches=2)
        samples = random_samples()
        update(policy, returned(samples, policy.values(samples)))
        states.append(policy.state_dict())
    for one, other in zip(*(s["critic"]["weights"] for s in states), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_a_checkpoint_goes_on_with_the_critic_exactly(model, tmp_path):
    from safetensors.torch import save_file

    from trainer.learning.checkpoint import _check_shapes, _flat, _read

    samples = random_samples()

    def step(policy: Policy) -> None:
        update(policy, returned(samples, policy.values(samples)))

    whole = with_critic(model, warmup_steps=1)
    step(whole)
    save_file(_flat(whole.state_dict()), tmp_path / "state.safetensors")
    again = with_critic(model, warmup_steps=1)
    state = _read(tmp_path / "state.safetensors", list(whole.state_dict()["adapter"]))
    _check_shapes(state, list(whole.state_dict()["adapter"].values()))
    again.load_state_dict(state)
    for policy in (whole, again):
        step(policy)
        step(policy)
    one, other = whole.state_dict(), again.state_dict()
    assert one["num_updates"] == other["num_updates"] == 2
    assert all(torch.equal(a, b) for a, b in zip(one["critic"]["weights"], other["critic"]["weights"], strict=True))
    assert all(torch.equal(one["adapter"][name], other["adapter"][name]) for name in one["adapter"])


def test_a_critic_larger_than_the_policy_is_read_from_its_checkpoint(model, tmp_path, monkeypatch):
    from trainer.learning import checkpoint

    monkeypatch.setattr(checkpoint, "_MOST_OVERHEAD_BYTES", 2**16)
    large, again = with_critic(model, r=128), with_critic(model, r=128)
    update(large, returned(random_samples(), large.values(random_samples())))
    (folder := tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    checkpoint.save_file(checkpoint._flat(large.state_dict()), folder / checkpoint.STATE)
    checkpoint.load_checkpoint(again, folder)
    pairs = zip(large.critic.parameters, again.critic.parameters, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UserError, match="bytes, where this model's state takes"):
        checkpoint.load_checkpoint(tiny_policy(model), folder)


def test_two_processes_make_the_same_critic_as_one(model, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.support.policy_worker"]
    done = subprocess.run(
        [sys.executable, *command, str(model), str(tmp_path), "critic"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt")["critic"] for rank in (0, 1))
    single = train_critic(model)
    for one, a, b in zip(single.state_dict()["critic"]["weights"], first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(one, a, atol=2e-5, rtol=1e-3)


# --- settings


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"output_dir": "x", "grader": {"type": "numeric"}, **sections})


def test_a_group_of_one_goes_with_what_compares_it_with_more_than_its_group():
    own = {"type": "custom", "target": "mine.py:mine"}
    for advantage in ("gae", "reinforce_pp", own):
        config(rollout={"group_size": 1}, loss={"advantage": advantage})
    for advantage in ("grpo", "rloo", "reinforce_pp_baseline", "gigpo"):
        with pytest.raises(ValidationError, match=rf"rollout\.group_size: expected 2 or more .* {advantage}, which"):
            config(rollout={"group_size": 1}, loss={"advantage": advantage})


def test_a_critic_that_warms_up_to_the_end_is_refused():
    critic = {"type": "gae", "critic": {"warmup_steps": 5}}
    assert config(loss={"advantage": critic}, optim={"num_steps": 6}).loss.gae.critic.warmup_steps == 5
    with pytest.raises(ValidationError, match=r"warmup_steps: 5 of optim\.num_steps = 5 .* never learn"):
        config(loss={"advantage": critic}, optim={"num_steps": 5})


def test_a_critic_that_is_right_makes_no_advantages_of_its_noise():
    noise = [[1e-6, -2e-6, 1e-6], [0.0]]
    assert max(abs(x) for of in whitened(noise) for x in of) < 0.05


# --- a run


def test_a_run_with_a_critic_goes_on_exactly_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    """One after another, each in two processes' lives and in one: PPO over real episodes, without groups."""

    def run_to(name: str, num_steps: int) -> Path:
        sections = scripted_config(
            tmp_path / name,
            tiny_model,
            loss={"advantage": {"type": "gae", "critic": {"warmup_steps": 1}}},
            optim={"num_steps": num_steps, "num_epochs": 2},
            rollout={"group_size": 1, "tasks_per_step": 3},
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(sections))
        run(path)
        return tmp_path / name

    run_to("twice", 2)
    once, twice = run_to("once", 3), run_to("twice", 3)
    file = "adapter/adapter_model.safetensors"
    assert (once / file).read_bytes() == (twice / file).read_bytes()
    steps = [json.loads(line) for line in (once / "metrics.jsonl").read_text().splitlines()]
    trained = [step for step in steps if "loss/critic_error" in step]
    assert len(trained) == 3 and all("groups/tied_share" not in step for step in trained)
    assert "loss/ratio" not in trained[0] and trained[1]["loss/ratio"] > 0, "the first step trains the critic alone"
    assert trained[0]["loss/critic_value"] != trained[2]["loss/critic_value"]
