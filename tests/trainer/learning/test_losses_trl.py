"""The loss against trl's GRPOTrainer: real trainer, same model, same tokens; values and gradients."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.support.policy_worker import VOCABULARY, save_tiny_llama, tiny_policy
from tests.support.tiny_trl import rewards_of_trl, tiny_tokenizer
from tests.support.tiny_world import rewards_of
from trainer.config.learning import LOSS_SETTINGS
from trainer.learning.adapter import trainable_parameters
from trainer.learning.advantages import group_advantages
from trainer.learning.samples import sample_of
from trainer.types import Ledger

GROUP_SIZE, NUM_GROUPS, MAX_COMPLETION, TEMPERATURE = 4, 2, 24, 0.8

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def episodes(seed: int) -> list[dict]:
    """Prompts, multi-turn completions with tool results in them, sampler log-probabilities and rewards."""
    rng = random.Random(seed)
    out = []
    for group in range(NUM_GROUPS):
        prompt = rng.choices(range(4, VOCABULARY), k=3 + 2 * group)
        for _ in range(GROUP_SIZE):
            tokens, mask = [], []
            for turn in range(rng.randint(1, 3)):
                spans = [(1, rng.randint(1, 5))] if turn == 0 else [(0, rng.randint(1, 3)), (1, rng.randint(1, 4))]
                for sampled, n in spans:
                    tokens += rng.choices(range(4, VOCABULARY), k=n)
                    mask += [sampled] * n
            out.append(
                {
                    "prompt_ids": prompt,
                    "completion_ids": tokens,
                    "env_mask": mask,
                    "noise": [rng.gauss(0, 0.5) for _ in tokens],
                    "reward": rng.choice([0.0, 0.25, 0.5, 1.0]),
                }
            )
    return out


def ledger_of(episode: dict, logprobs: list[float]) -> Ledger:
    ledger = Ledger()
    ledger.append_context(episode["prompt_ids"])
    for token, sampled, logprob in zip(episode["completion_ids"], episode["env_mask"], logprobs, strict=True):
        if sampled:
            ledger.append_sampled([token], [logprob], 0)
        else:
            ledger.append_context([token])
    return ledger


def trl_trainer(policy, data: list[dict], tmp_path: Path, **settings):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tis_cap, tis_mode = settings.pop("tis_cap"), settings.pop("tis_mode", "token_truncate")
    settings.setdefault("vllm_importance_sampling_clip_min", None if tis_cap else 0.0)

    def rollouts(prompts, trainer):
        return {
            "prompt_ids": [e["prompt_ids"] for e in data],
            "completion_ids": [e["completion_ids"] for e in data],
            "logprobs": [e["logprobs"] for e in data],
            "env_mask": [e["env_mask"] for e in data],
        }

    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=len(data),
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_COMPLETION,
        gradient_checkpointing=False,
        # Two passes over the batch, so that trl keeps the log-probabilities from before the update.
        num_iterations=2,
        temperature=TEMPERATURE,
        vllm_importance_sampling_mode=tis_mode,
        vllm_importance_sampling_clip_max=tis_cap,
        vllm_importance_sampling_correction=tis_cap is not None,
        **settings,
    )
    trainer = GRPOTrainer(
        model=policy.model,
        reward_funcs=lambda completions, **_: [e["reward"] for e in data],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w5 w6"}] * len(data)),
        processing_class=tiny_tokenizer(),
        rollout_func=rollouts,
    )
    # What a vLLM server would have given comes from `rollouts`; without this line trl would connect to one.
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    trainer.current_gradient_accumulation_steps = 1
    if "ref" in policy.model.peft_config:
        # Given an adapter, trl takes its copy as reference; without that copy it takes the base, as for a new adapter.
        policy.model.delete_adapter("ref")
    return trainer


def gradients(model, loss: torch.Tensor) -> torch.Tensor:
    parameters = list(trainable_parameters(model).values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def move_adapter(model, *, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


DEFAULTS = {
    "normalisation": "token",
    "advantage": "grpo",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "kl_coef": 0.0,
    "tis_cap": None,
}
CASES = {
    "dapo": {},
    "bnpo": {"trl_loss": "bnpo"},
    "grpo": {"normalisation": "sequence"},
    "dr_grpo": {"normalisation": "constant", "advantage": "dr_grpo"},
    "uneven clip range": {"clip_low": 0.05, "clip_high": 0.02},
    "kl to the reference": {"kl_coef": 0.3},
    "truncated importance sampling": {"tis_cap": 1.2},
    "all of it, dapo": {"clip_low": 0.1, "clip_high": 0.28, "kl_coef": 0.1, "tis_cap": 2.0},
    "all of it, grpo": {"clip_high": 0.05, "kl_coef": 0.1, "tis_cap": 1.1, "normalisation": "sequence"},
    "all of it, dr_grpo": {
        "clip_low": 0.05,
        "kl_coef": 0.1,
        "tis_cap": 1.1,
        "normalisation": "constant",
        "advantage": "dr_grpo",
    },
    "dual clip": {"delta": 1.25, "clip_high": 0.1},
    "gspo": {
        "type": "gspo",
        "normalisation": "sequence",
        "clip_low": 0.01,
        "clip_high": 0.01,
        "trl": {"importance_sampling_level": "sequence"},
    },
    "cispo": {"type": "cispo", "ratio_cap": 1.05, "trl_loss": "cispo", "trl": {"epsilon_high": 1.05}},
    "cispo with kl and correction": {
        "type": "cispo",
        "ratio_cap": 1.05,
        "kl_coef": 0.1,
        "tis_cap": 1.1,
        "trl_loss": "cispo",
        "trl": {"epsilon_high": 1.05},
    },
    "sequence truncation": {
        "tis_cap": 1.2,
        "correction": {"level": "sequence"},
        "trl": {"tis_mode": "sequence_truncate"},
    },
    "token mask": {
        "tis_cap": 1.5,
        "correction": {"ratio_range": (0.7, 1.5)},
        "trl": {"tis_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.7},
    },
    "entropy bonus": {"entropy": {"coef": 0.3}, "trl": {"entropy_coef": 0.3}},
    "entropy bonus and kl": {"entropy": {"coef": 0.3}, "kl_coef": 0.1, "trl": {"entropy_coef": 0.3}},
}
CLIPS = {
    "clipped": lambda config: {
        "epsilon": config.clip_low,
        "epsilon_high": config.clip_high,
        "delta": config.delta,
    },
    "gspo": lambda config: {"epsilon": config.clip_low, "epsilon_high": config.clip_high},
}
TRL_LOSS = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient_are_those_of_trl(case, model, tmp_path):
    settings = dict(CASES[case])
    trl_loss, trl_settings = settings.pop("trl_loss", None), settings.pop("trl", {})
    kind = settings.pop("type", "clipped")
    known = LOSS_SETTINGS[kind].model_fields
    config = LOSS_SETTINGS[kind](type=kind, **{k: v for k, v in (DEFAULTS | settings).items() if k in known})
    policy = tiny_policy(model)
    move_adapter(policy.model, seed=1, scale=0.1)
    data = episodes(seed=3)
    for episode, exact in zip(
        data,
        policy.logprobs(
            [sample_of(ledger_of(e, [0.0] * len(e["noise"])), advantage=0.0, rollout_id="", task_id="") for e in data],
            temperature=TEMPERATURE,
        ),
        strict=True,
    ):
        sampled = iter(exact.tolist())
        episode["logprobs"] = [
            next(sampled) + noise if mask else 0.0
            for mask, noise in zip(episode["env_mask"], episode["noise"], strict=True)
        ]

    trainer = trl_trainer(
        policy,
        data,
        tmp_path,
        loss_type=trl_loss or TRL_LOSS[config.normalisation],
        scale_rewards="group" if config.advantage == "grpo" else "none",
        beta=config.kl_coef,
        tis_cap=config.tis_cap,
        **CLIPS.get(config.type, lambda config: {})(config) | trl_settings,
    )
    policy.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "w5 w6"}] * len(data))

    rewards = [[e["reward"] for e in data[i : i + GROUP_SIZE]] for i in range(0, len(data), GROUP_SIZE)]
    advantages = [a for group in rewards for a in group_advantages(group, config.advantage).advantages]
    torch.testing.assert_close(torch.tensor(advantages), inputs["advantages"], atol=1e-5, rtol=1e-5)
    samples = [
        sample_of(ledger_of(e, e["logprobs"]), advantage=a, rollout_id=str(i), task_id="t")
        for i, (e, a) in enumerate(zip(data, advantages, strict=True))
    ]
    [work] = policy._work(samples, config, TEMPERATURE, MAX_COMPLETION, needs_old=True)

    # The policy moves on, as it does between two minibatches, so that ratio and clip have something to do.
    move_adapter(policy.model, seed=2, scale=0.05)
    expected = trainer._compute_loss(policy.model, inputs)
    loss, metrics, _ = policy._value(work, policy._made(config), TEMPERATURE)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(policy.model, loss), gradients(policy.model, expected), atol=1e-5, rtol=1e-4)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    num_tokens = metrics["num_tokens"].item()
    if config.type == "clipped":
        assert metrics["clipped_low_share"] + metrics["clipped_high_share"] > 0
        for side in ("low", "high"):
            share = metrics[f"clipped_{side}_share"].item() / num_tokens
            assert logged[f"clip_ratio/{side}_mean"] == pytest.approx(share, abs=1e-6)
    if config.type == "cispo":
        assert metrics["ratio_capped_share"] > 0
    if config.kl_coef:
        assert logged["kl"] == pytest.approx(metrics["kl_to_reference"].item() / num_tokens, rel=1e-4)
    if config.entropy is not None:
        assert logged["entropy"] == pytest.approx(metrics["entropy"].item() / num_tokens, rel=1e-4)
    if config.tis_cap and config.correction.level == "token":
        assert metrics["tis_capped_share"] > 0
        mean = logged["sampling/importance_sampling_ratio/mean"]
        assert mean == pytest.approx(metrics["tis_weight"].item() / num_tokens, rel=1e-4)


def test_a_whole_run_of_grpo_is_trls_step_for_step(model, tmp_path, one_thread):
    """The same model, adapter, sampler and rewards: the updates are trl's, so both sample the same rollouts."""
    trls = rewards_of_trl(model, 0, tmp_path, last_step=6)
    assert len(trls) == 6 and len(set(trls)) > 3
    assert rewards_of(model, "clipped, grpo", 0, last_step=6) == trls
