"""trl's GRPOTrainer in the tiny world: the same model and adapter, the same sampler and rewards, as many rollouts.

`python -m tests.support.tiny_trl` prints both, for docs/results/proofs.md.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.policy_worker import VOCABULARY, save_tiny_llama
from tests.support.tiny_world import GROUP_SIZE, NUM_SEEDS, NUM_STEPS, NUM_TASKS, TinyWorld, end_of, rewards_of

LEARNING_RATE = 0.01
TRLS: dict[str, dict[str, Any]] = {
    "its defaults": {},
    "its defaults, two passes": {"num_iterations": 2},
    "cispo, two passes": {"loss_type": "cispo", "num_iterations": 2},
}
"""Settings of its own, by what they are called in the table."""
OURS = ("clipped, grpo", "clipped, mt_grpo", "clipped, turn_discounted", "cispo, rloo, two updates")
"""Of the tiny world's `ALGORITHMS`."""


def rewards_of_trl(model: Path, seed: int, folder: Path, *, last_step: int = NUM_STEPS, **settings: Any) -> list[float]:
    """The mean reward of each step of a run of two turns, which may end early; `settings` are GRPOConfig's.

    Two things are not trl's own: rollouts and rewards come from the world, by `rollout_func`, and what the world
    answers is masked out, as here. The adapter begins with the weights that the policy's begins with.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import TrainerCallback

    from tests.support.policy_worker import tiny_policy

    means: list[float] = []
    trainer = _trainer(model, seed, folder, means, settings)

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = len(means) >= last_step

    trainer.add_callback(Ends())
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(tiny_policy(model).model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return means


def _trainer(model: Path, seed: int, folder: Path, means: list[float], settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    sampler = SimpleNamespace(model=None, num_updates=0)
    world = TinyWorld(sampler, num_turns=2, seed=seed)

    def rollout_func(prompts: list[str], trainer: Any) -> dict[str, Any]:
        sampler.model = trainer.model
        trainer.model.eval()
        rollouts = world.rollouts([int(prompt) for prompt in prompts])
        trainer.model.train()
        means.append(sum(r.reward for r in rollouts) / len(rollouts))
        (rows,) = zip(*(r.ledgers for r in rollouts), strict=True)
        return {
            "prompt_ids": [row.prompt_ids[:2] for row in rows],
            "completion_ids": [row.prompt_ids[2:] for row in rows],
            "env_mask": [[int(own) for own in row.trainable[2:]] for row in rows],
            "logprobs": [row.logprobs[2:] for row in rows],
            "earned": [r.reward for r in rollouts],
        }

    return GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(model),
        reward_funcs=lambda earned, **_: earned,
        rollout_func=rollout_func,
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            seed=seed,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            learning_rate=LEARNING_RATE,
            max_steps=NUM_STEPS,
            per_device_train_batch_size=NUM_TASKS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": str(task)} for task in range(NUM_TASKS)]),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )


def tiny_tokenizer() -> Any:
    """trl asks for one, and decodes what was sampled with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w3"
    )


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_llama(folder / "model")
        print("| trainer | mean reward over the run, by seed | last ten steps |\n|---|---|---|")
        arms: dict[str, Callable[[int], list[float]]] = {
            f"trl, {name}": partial(rewards_of_trl, model, folder=folder, **settings) for name, settings in TRLS.items()
        } | {name: partial(rewards_of, model, name) for name in OURS}
        for name, run in arms.items():
            runs = [run(seed) for seed in range(NUM_SEEDS)]
            means = ", ".join(f"{sum(of) / len(of):.3f}" for of in runs)
            print(f"| {name} | {means} | {', '.join(f'{end_of(of):.3f}' for of in runs)} |", flush=True)


if __name__ == "__main__":
    main()
