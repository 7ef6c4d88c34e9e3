import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file

from envs.errors import UserError
from tests.support import ROOT
from tests.support.configs import scripted_config
from tests.support.policy_worker import (
    LOSS,
    VOCABULARY,
    naive_logprobs,
    random_samples,
    run_updates,
    save_tiny_llama,
    tiny_policy,
    train,
)
from trainer.config import LoraConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from trainer.learning import adapter as lora
from trainer.learning.losses.base import k3
from trainer.learning.optimizer import learning_rate
from trainer.learning.packing.layouts import pack
from trainer.learning.packing.padded import plan
from trainer.learning.packing.rows import used_length
from trainer.learning.packing.shares import split
from trainer.learning.policy import Policy
from trainer.learning.samples import Sample
from trainer.session import new_policy

PG = LossConfig()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return policy.state_dict()["adapter"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# --- log-probabilities ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_full_logits_one_row_at_a_time(model, temperature):
    policy = tiny_policy(model, max_microbatch_tokens=64)
    run_updates(policy, 1)
    samples = random_samples(seed=7)
    for sample, logprobs in zip(samples, policy.logprobs(samples, temperature=temperature), strict=True):
        expected = naive_logprobs(policy, sample, temperature)
        torch.testing.assert_close(logprobs, expected.detach(), atol=1e-5, rtol=1e-5)


def test_the_adapter_starts_as_a_no_op_and_the_base_stays_reachable(model):
    policy = tiny_policy(model)
    samples = random_samples()

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        on, off = (policy.logprobs(samples, temperature=1.0, adapter=x) for x in (True, False))
        return torch.cat(on), torch.cat(off)

    on, base = both()
    assert torch.equal(on, base)
    run_updates(policy, 1)
    on, off = both()
    assert torch.equal(off, base) and not torch.allclose(on, base, atol=1e-3)


def test_scores_cover_every_token_but_the_first(model):
    policy = tiny_policy(model)
    rows = [[5, 6, 7, 8], [9, 10]]
    scores = policy.score(rows)
    assert [len(s) for s in scores] == [3, 1]
    logprobs = torch.log_softmax(policy.model(input_ids=torch.tensor([rows[0]])).logits[0].float(), -1)
    torch.testing.assert_close(scores[0], logprobs[:-1].gather(1, torch.tensor(rows[0][1:])[:, None])[:, 0].detach())


# --- packing ---


def test_microbatches_hold_every_row_once_and_stay_under_the_limit():
    samples = random_samples(4, 5)
    batches = pack(samples, 64, "padded")
    assert sorted(i for b in batches for i in b.row_indices) == list(range(len(samples)))
    assert len(batches) > 1 and all(b.token_ids_BT.numel() <= 64 or len(b.row_indices) == 1 for b in batches)
    for b in batches:
        targets = [
            t for i in b.row_indices for t, on in zip(samples[i].token_ids, samples[i].trainable, strict=True) if on
        ]
        assert b.targets_N.tolist() == targets


def test_a_row_longer_than_the_limit_stands_alone():
    assert plan([100, 3, 3, 3], 10) == [[0], [1, 2, 3]]


def save_long_rope(folder: Path, family: str = "Phi3"):
    """A model that turns rows of more than 32 tokens otherwise than shorter ones."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "short_mscale": 1.1, "long_mscale": 1.2}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    rest = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    # Phi3Config has a default of its own, which goes before the one in the rope's parameters.
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 32}
    config = getattr(transformers, f"{family}Config")(rope_parameters=rope, **lengths, **small, **rest)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model


def scores_beside(model, row: list[int], longest: list[int]) -> torch.Tensor:
    """The row's log-probabilities in transformers' own pass over both."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*row, *[0] * (len(longest) - len(row))], longest])).logits
    return logits.log_softmax(-1)[0, torch.arange(len(row) - 1), row[1:]]


@pytest.mark.parametrize("max_length", [32, 64])
@pytest.mark.parametrize("family", ["Phi3", "Phimoe"])
def test_a_row_is_read_alike_whatever_its_neighbours_where_the_model_turns_long_rows_otherwise(
    family, max_length, tmp_path
):
    """LongRoPE: transformers turns all rows of a pass by the longest one, vLLM by the longest there may be."""
    model = save_long_rope(tmp_path, family)
    policy = tiny_policy(tmp_path, max_length=max_length)
    short, longest = list(range(3, 23)), list(range(20, 20 + max_length))
    own = scores_beside(model, short, longest)
    for rows in ([short], [short, longest]):
        torch.testing.assert_close(policy.score(rows)[0], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("longest", [32, 64])
def test_the_longest_row_of_a_run_is_its_longest_episode(longest, tmp_path):
    model = save_long_rope(tmp_path)
    made = scripted_config(tmp_path / "run", tmp_path, rollout={"max_episode_tokens": longest, "max_turn_tokens": 8})
    prepared = SimpleNamespace(config=RunConfig.model_validate(made), model_path=tmp_path, grammar=None)
    row = list(range(3, 23))
    scores = new_policy(prepared, Accelerator(cpu=True)).score([row])[0]
    torch.testing.assert_close(scores, scores_beside(model, row, list(range(longest))), atol=1e-5, rtol=1e-5)


def test_what_follows_the_last_trainable_token_is_not_read():
    sample = random_samples(1, 1)[0]
    longer = Sample(
        token_ids=(*sample.token_ids, 5, 6),
        trainable=(*sample.trainable, False, False),
        logprobs=(*sample.logprobs, 0.0, 0.0),
        versions=(*sample.versions, -1, -1),
        advantages=(*sample.advantages, 0.0, 0.0),
        rollout_id="r",
        task_id="t",
    )
    assert used_length(longer) == used_length(sample)


def test_processes_get_about_the_same_number_of_tokens():
    lengths = [50, 40, 30, 20, 10, 10]
    parts = split(lengths, 2)
    assert sorted(i for p in parts for i in p) == list(range(6))
    assert [sum(lengths[i] for i in p) for p in parts] == [80, 80]
    assert split([7], 3) == [[0], [], []]


# --- updates ---


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_update_does_not_depend_on_the_microbatches(model, normalisation, epochs):
    loss = LossConfig(kl_coef=0.05, normalisation=normalisation)
    options = {"num_epochs": epochs, "minibatches": epochs}
    large = tiny_policy(model, max_microbatch_tokens=100_000, **options)
    small = tiny_policy(model, max_microbatch_tokens=64, **options)
    metrics = [run_updates(policy, 2, loss=loss) for policy in (large, small)]
    assert large.num_updates == small.num_updates == 2 * epochs * epochs
    assert_same(weights(large), weights(small), atol=2e-5, rtol=1e-3)
    for a, b in zip(*metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_two_processes_make_the_same_adapter_as_one(model, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "tests.support.policy_worker",
            str(model),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    single, metrics = train(model)
    assert all(torch.equal(first["adapter"][name], second["adapter"][name]) for name in first["adapter"])
    assert_same(weights(single), first["adapter"], atol=2e-5, rtol=1e-3)
    for one, two in zip(metrics, first["metrics"], strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert first["metrics"] == second["metrics"]
    assert first["drawn"] == second["drawn"], "what an estimator of one's own draws is every process's"


def test_untrainable_tokens_have_no_influence_but_as_context(model):
    def changed(sample: Sample) -> Sample:
        # The sampler's log-probability and version of context tokens are noise here.
        return Sample(
            token_ids=(*sample.token_ids, 11),
            trainable=(*sample.trainable, False),
            logprobs=(*(x if on else -9.0 for x, on in zip(sample.logprobs, sample.trainable, strict=True)), -9.0),
            versions=(*sample.versions, 3),
            advantages=(*sample.advantages, 0.0),
            rollout_id=sample.rollout_id,
            task_id=sample.task_id,
        )

    policies = [tiny_policy(model), tiny_policy(model)]
    policies[0].update(random_samples(), PG, temperature=1.0, constant_tokens=64)
    policies[1].update([changed(s) for s in random_samples()], PG, temperature=1.0, constant_tokens=64)
    a, b = map(weights, policies)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_gradient_reaches_the_base_and_the_adapter_learns_in_float32(model):
    policy = tiny_policy(model)
    before = {n: p.clone() for n, p in policy.model.named_parameters() if "lora" not in n}
    run_updates(policy, 1)
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if name in before:
            assert parameter.grad is None and torch.equal(parameter, before[name])
        else:
            assert parameter.dtype == torch.float32


def test_samples_without_advantage_cost_nothing_but_count_in_the_mean(model):
    samples = random_samples()
    assert any(s.advantage == 0 for s in samples)
    policies = [tiny_policy(model), tiny_policy(model)]
    policies[0].update(samples, PG, temperature=1.0, constant_tokens=64)
    # The same update, with the rows of no advantage forced through the model by a KL term too small to matter.
    policies[1].update(samples, LossConfig(kl_coef=1e-12), temperature=1.0, constant_tokens=64)
    assert_same(*map(weights, policies), atol=2e-5, rtol=1e-3)


def test_the_kl_term_is_measured_from_the_base_until_a_policy_is_kept_as_the_reference(model):
    # Without advantages the KL term is the whole loss.
    flat = [replace(s, advantages=(0.0,) * len(s.token_ids)) for s in random_samples()]
    policy, loss = tiny_policy(model), LossConfig(kl_coef=0.1)

    def kl() -> float:
        return policy.update(flat, loss, temperature=1.0, constant_tokens=64).metrics["kl_to_reference"]

    run_updates(policy, 3)
    base, before = policy.logprobs(flat, temperature=1.0, adapter=False), policy.logprobs(flat, temperature=1.0)
    assert kl() == pytest.approx(float(k3(torch.cat(before), torch.cat(base)).mean()), rel=1e-4)
    policy.keep_as_reference()
    kept = policy.logprobs(flat, temperature=1.0)
    assert kl() == 0, "the policy is its own reference"
    run_updates(policy, 3, loss=loss)
    moved = policy.logprobs(flat, temperature=1.0)
    assert kl() == pytest.approx(float(k3(torch.cat(moved), torch.cat(kept)).mean()), rel=1e-4)


def test_a_step_without_any_advantage_makes_no_update_and_says_so(model):
    policy = tiny_policy(model)
    run_updates(policy, 1)
    before = weights(policy)
    flat = [s for s in random_samples() if s.advantage == 0]
    metrics = policy.update(flat, PG, temperature=1.0, constant_tokens=64).metrics
    assert (metrics["skipped_updates"], policy.num_updates, policy.num_steps) == (1.0, 1, 2)
    assert all(torch.equal(before[n], t) for n, t in weights(policy).items())


def test_a_step_whose_tokens_are_all_masked_makes_no_update_and_says_so(model):
    """Momentum and decay would move the adapter though there is no gradient."""
    policy = tiny_policy(model, weight_decay=0.1)
    run_updates(policy, 1)
    before = weights(policy)
    masked = LossConfig(correction={"mean_range": [0.999, 1.001]})
    metrics = policy.update(random_samples(), masked, temperature=1.0, constant_tokens=64).metrics
    assert (metrics["mismatch_masked_share"], metrics["skipped_updates"], policy.num_updates) == (1.0, 1.0, 1)
    assert all(torch.equal(before[n], t) for n, t in weights(policy).items())


def test_a_step_without_samples_makes_no_update(model):
    policy = tiny_policy(model)
    update = policy.update([], PG, temperature=1.0, constant_tokens=64)
    assert update.metrics["grad_norm"] == 0 and update.metrics["skipped_updates"] == 0 and policy.num_updates == 0
    assert policy.num_steps == 1 and update.logprobs == []


def test_updates_raise_what_was_good_and_lower_what_was_bad(model):
    policy = tiny_policy(model, learning_rate=3e-3)
    samples = [s for s in random_samples() if s.advantage]

    def advantage_weighted() -> float:
        return sum(
            s.advantage * x.sum().item()
            for s, x in zip(samples, policy.logprobs(samples, temperature=1.0), strict=True)
        )

    before = advantage_weighted()
    policy.update(samples, LossConfig(tis_cap=None), temperature=1.0, constant_tokens=64)
    assert advantage_weighted() > before


def test_each_token_is_weighted_by_its_own_advantage(model):
    samples = [
        replace(s, advantages=tuple(float(t % 3 - 1) if on else 0.0 for t, on in enumerate(s.trainable)))
        for s in random_samples()
    ]
    policy = tiny_policy(model, max_microbatch_tokens=64)
    works = list(policy._work(samples, PG, 1.0, 64, needs_old=False))
    assert len(works) > 1
    for work in works:
        own = [a for s in work.rows for a, on in zip(s.advantages, s.trainable, strict=True) if on]
        assert work.advantages_N.tolist() == own


def test_credit_on_one_token_moves_that_token(model):
    samples = [s for s in random_samples() if s.num_trainable > 3]
    at = [max(t for t, on in enumerate(s.trainable) if on) for s in samples]
    credited = [
        replace(s, advantages=tuple(float(t == last) for t in range(len(s.token_ids))))
        for s, last in zip(samples, at, strict=True)
    ]
    policy = tiny_policy(model, learning_rate=3e-3)
    before = [x[-1].item() for x in policy.logprobs(samples, temperature=1.0)]
    policy.update(credited, LossConfig(tis_cap=None), temperature=1.0, constant_tokens=64)
    after = [x[-1].item() for x in policy.logprobs(samples, temperature=1.0)]
    assert sum(after) > sum(before)


def test_first_minibatch_is_on_policy_and_the_second_is_not(model):
    single = tiny_policy(model).update(random_samples(), PG, temperature=1.0, constant_tokens=64).metrics
    assert single["ratio_max"] == 1.0
    several = tiny_policy(model, num_epochs=2).update(random_samples(), PG, temperature=1.0, constant_tokens=64)
    assert several.metrics["ratio_max"] > 1.01


def test_gradient_checkpointing_makes_the_same_update(model):
    policies = [tiny_policy(model, gradient_checkpointing=x) for x in (False, True)]
    for policy in policies:
        run_updates(policy, 1)
    assert_same(*map(weights, policies), atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_draws_no_random_numbers_where_training_mode_would(tmp_path):
    """Routers of Phi 3.5 MoE draw the experts there."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PhimoeConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=4, **small)
    PhimoeForCausalLM(config).save_pretrained(tmp_path)
    plain, recomputed = (tiny_policy(tmp_path, gradient_checkpointing=x) for x in (False, True))
    samples = random_samples()
    for a, b in zip(*(p.logprobs(samples, temperature=1.0) for p in (plain, recomputed)), strict=True):
        assert torch.equal(a, b)


def test_the_seed_decides_the_adapter(model):
    a, b, c = (weights(tiny_policy(model, seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


# --- state ---


def test_a_resumed_run_ends_with_the_same_bytes(model, tmp_path):
    options = {"minibatches": 2, "num_epochs": 2, "schedule": "cosine", "num_steps": 5, "warmup_steps": 2}
    whole = tiny_policy(model, **options)
    run_updates(whole, 1)
    whole.keep_as_reference()
    run_updates(whole, 1, start=1)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    run_updates(whole, 2, start=2)

    resumed = tiny_policy(model, seed=0, **options)
    run_updates(resumed, 1, start=50)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run_updates(resumed, 2, start=2)
    assert (resumed.num_updates, resumed.num_steps) == (whole.num_updates, whole.num_steps) == (16, 4)
    whole.save_adapter(tmp_path / "a")
    resumed.save_adapter(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_saved_state_does_not_change_as_training_goes_on(model):
    policy = tiny_policy(model)
    run_updates(policy, 1)
    state = policy.state_dict()
    kept = {n: t.clone() for n, t in state["adapter"].items()}
    moment = state["moments"][0]["exp_avg"].clone()
    run_updates(policy, 1, start=1)
    assert all(torch.equal(kept[n], t) for n, t in state["adapter"].items())
    assert torch.equal(moment, state["moments"][0]["exp_avg"])


def test_a_checkpoint_of_another_rank_is_refused(model):
    from accelerate import Accelerator

    state = tiny_policy(model).state_dict()
    other = Policy(
        model, ModelConfig(dtype="float32", lora=LoraConfig(r=2)), OptimConfig(), Accelerator(cpu=True), seed=0
    )
    with pytest.raises(UserError, match="rank"):
        other.load_state_dict(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_are_those_of_peft_merged_in_float32_then_rounded(tmp_path, dtype, tied):
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = save_tiny_llama(tmp_path / "model", tied=tied, dtype=getattr(torch, dtype))
    config = ModelConfig(dtype=dtype, lora=LoraConfig(r=4, alpha=8))
    policy = Policy(model, config, OptimConfig(learning_rate=1e-2), Accelerator(cpu=True), seed=0)
    run_updates(policy, 2)
    base = {n: p.clone() for n, p in policy.model.named_parameters()}
    policy.save_merged(tmp_path / "merged")
    policy.save_adapter(tmp_path / "adapter")
    assert all(torch.equal(p, base[n]) for n, p in policy.model.named_parameters())

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(model / "model.safetensors")
    assert merged.keys() == original.keys()
    assert all(merged[n].dtype == original[n].dtype for n in merged)
    peft_base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = PeftModel.from_pretrained(peft_base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], original["model.layers.0.mlp.up_proj.weight"])


def test_a_saved_adapter_computes_the_same_in_peft(model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = tiny_policy(model)
    run_updates(policy, 2)
    policy.save_adapter(tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {f.name for f in tmp_path.iterdir()}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path)
    token_ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(loaded(input_ids=token_ids).logits, policy.model(input_ids=token_ids).logits)


# --- what is refused ---


def test_an_adapted_output_head_is_refused(model):
    from accelerate import Accelerator

    config = ModelConfig(dtype="float32", lora=LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UserError, match="lm_head"):
        Policy(model, config, OptimConfig(), Accelerator(cpu=True), seed=0)


def test_a_gradient_that_is_not_finite_stops_the_run(model):
    policy = tiny_policy(model)
    next(iter(lora.trainable_parameters(policy.model).values())).data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="norm"):
        policy.update(random_samples(), LOSS, temperature=1.0, constant_tokens=64)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.854, 0.146]),
    ],
)
def test_the_learning_rate_warms_up_then_follows_the_schedule(schedule, expected):
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, num_steps=6, schedule=schedule)
    assert [learning_rate(optim, step) for step in (0, 1, 2, 3, 5)] == pytest.approx(expected, abs=1e-3)
