"""A tiny policy for tests, and one process of a multi-process update.

That is `-m tests.support.policy_worker MODEL OUT [critic]` under torchrun.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from trainer.config import LoraConfig, LossConfig, ModelConfig, OptimConfig
from trainer.config.advantages import CriticConfig, CustomAdvantageConfig, GaeConfig
from trainer.learning.advantages import Attempt, estimator_of
from trainer.learning.advantages.base import Advantages, Groups
from trainer.learning.samples import Sample, sample_of
from trainer.types import Ledger

VOCABULARY = 97
LOSS = LossConfig(kl_coef=0.05, normalisation="sequence")
PPO = LossConfig(advantage=GaeConfig(critic=CriticConfig(learning_rate=1e-2)))


def save_tiny_llama(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A random Llama of two layers, large enough in its weights for log-probabilities to vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def tiny_policy(
    model: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    critic: CriticConfig | None = None,
    max_length: int = 1,
    **optim: object,
):
    from accelerate import Accelerator

    from trainer.learning.policy import Policy

    config = ModelConfig(dtype=dtype, lora=LoraConfig(r=4, alpha=8), gradient_checkpointing=gradient_checkpointing)
    settings = OptimConfig(**({"learning_rate": 1e-2} | optim))
    return Policy(model, config, settings, Accelerator(cpu=True), seed, critic=critic, max_length=max_length)


def naive_logprobs(policy, sample: Sample, temperature: float) -> torch.Tensor:
    """Of the trainable tokens, by the model's own logits of all positions and plain autograd."""
    logits = policy.model(input_ids=torch.tensor([sample.token_ids])).logits[0] / temperature
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return torch.stack([logprobs[t - 1, sample.token_ids[t]] for t, on in enumerate(sample.trainable) if on])


def random_samples(num_groups: int = 3, group_size: int = 4, *, seed: int = 0) -> list[Sample]:
    """Multi-turn rows of uneven lengths; every third rollout has a forked second row."""
    rng = random.Random(seed)
    samples = []
    for i in range(num_groups * group_size):
        rows = 2 if i % 3 == 0 else 1
        advantage = rng.choice([-1.3, -0.4, 0.0, 0.7, 1.5])
        for _ in range(rows):
            ledger = Ledger()
            ledger.append_context(rng.choices(range(3, VOCABULARY), k=rng.randint(2, 9)))
            for _turn in range(rng.randint(1, 3)):
                n = rng.randint(1, 8)
                tokens = rng.choices(range(3, VOCABULARY), k=n)
                ledger.append_sampled(tokens, [-rng.uniform(1, 8) for _ in range(n)], 0)
                ledger.append_context(rng.choices(range(3, VOCABULARY), k=rng.randint(0, 4)))
            samples.append(sample_of(ledger, advantage=advantage, rollout_id=f"r{i}", task_id=f"t{i // group_size}"))
    return samples


def run_updates(policy, num_steps: int, *, loss: LossConfig = LOSS, start: int = 0) -> list[dict[str, float]]:
    return [
        policy.update(random_samples(seed=start + i), loss, temperature=0.8, constant_tokens=64).metrics
        for i in range(num_steps)
    ]


def returned(samples: list[Sample], values: list[list[float]]) -> list[Sample]:
    """With returns that a critic can learn: 1 after tokens with an even number, else -1."""

    def spread(sample: Sample, own: list[float]) -> tuple[float, ...]:
        numbers = iter(own)
        return tuple(next(numbers) if on else 0.0 for on in sample.trainable)

    targets = [[1.0 if token % 2 == 0 else -1.0 for token in tokens_before(sample)] for sample in samples]
    return [
        replace(s, values=spread(s, v), returns=spread(s, r)) for s, v, r in zip(samples, values, targets, strict=True)
    ]


def tokens_before(sample: Sample) -> list[int]:
    """The token before each trainable one."""
    return [sample.token_ids[place - 1] for place, on in enumerate(sample.trainable) if on]


def train_critic(model: Path):
    policy, samples = tiny_policy(model, critic=PPO.gae.critic), random_samples()
    policy.update(returned(samples, policy.values(samples)), PPO, temperature=1.0, constant_tokens=64)
    return policy


def train(model: Path):
    """What every process of the multi-process test does."""
    policy = tiny_policy(model, minibatches=2, num_epochs=2)
    metrics = run_updates(policy, 2)
    # One rollout for two processes: one of them has nothing to do.
    policy.update(random_samples(1, 1, seed=5)[:1], LOSS, temperature=0.8, constant_tokens=64)
    return policy, metrics


def draws(groups: Groups) -> Advantages:
    """An estimator of one's own that rolls dice."""
    return [[(random.random(),) for _ in group] for group in groups]


def drawn_advantages() -> Advantages:
    one = Attempt(reward=1.0, turn_rewards_T=(0.0,), num_tokens_T=(1,), states_T=(0,))
    return estimator_of(CustomAdvantageConfig(type="custom", target=f"{__package__}.policy_worker:draws"))([[one] * 3])


def main() -> None:
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    if sys.argv[3:] == ["critic"]:
        policy = train_critic(model)
        state = {"critic": policy.state_dict()["critic"]["weights"]}
    else:
        policy, metrics = train(model)
        state = {"adapter": policy.state_dict()["adapter"], "metrics": metrics, "drawn": drawn_advantages()}
    torch.save(state, out / f"rank{policy.accelerator.process_index}.pt")
    policy.accelerator.end_training()


if __name__ == "__main__":
    main()
