"""trl's update of the same rows, for training_throughput.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.learning.samples import Sample
    from trainer.prepare import Prepared


def trl_pass(prepared: Prepared, policy: Any, samples: Sequence[Sample], *, rows_a_batch: int) -> Callable[[], object]:
    """One update of trl's GRPOTrainer (loss dapo, no KL term) in batches of `rows_a_batch`.

    The model is PEFT's, of the same base, rank and dtype, under the policy's adapter as it is now. Prints loss and
    gradient norm beside the policy's on the same rows, before anything is changed: the same work. Timed are
    `_compute_loss`, backward, clip and AdamW; trl's own second pass for old log-probabilities is not.
    """
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config, device = prepared.config, policy.accelerator.device
    trainer = _trainer(prepared, policy)
    is_16_bit = bool(trainer.args.bf16)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.to(device)
    model.train()
    set_peft_model_state_dict(model, get_peft_model_state_dict(policy.model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-9, fused=True)
    num_trained = sum(s.num_trainable for s in samples)
    batches = [
        _inputs(samples[i : i + rows_a_batch], num_trained, device) for i in range(0, len(samples), rows_a_batch)
    ]
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_16_bit)
    told: list[str] = []

    def run() -> None:
        loss = 0.0
        for inputs in batches:
            with autocast:
                part = trainer._compute_loss(model, inputs)
            part.backward()
            loss += float(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if not told:
            told.append(f"trl, batches of {rows_a_batch}: gradient norm {float(norm):.5f}, loss {loss:.6f}")
            print(told[0], flush=True)

    return run


def _trainer(prepared: Any, policy: Any) -> Any:
    """trl's, with the policy's base, rank and dtype, and otherwise its own defaults."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    config, device = prepared.config, policy.accelerator.device
    base = AutoModelForCausalLM.from_pretrained(prepared.model_path, dtype=policy.reader.head.weight_VH.dtype)
    lora = config.model.lora
    return GRPOTrainer(
        model=base,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(config.output_dir),
            use_cpu=device.type == "cpu",
            bf16=base.dtype == torch.bfloat16,
            report_to="none",
            per_device_train_batch_size=2,
            num_generations=2,
            gradient_checkpointing=False,
            temperature=config.rollout.temperature,
            max_grad_norm=config.optim.max_grad_norm,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]),
        processing_class=AutoTokenizer.from_pretrained(prepared.model_path),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, target_modules="all-linear"),
    )


def _inputs(samples: Sequence[Sample], num_trained: int, device: Any) -> dict[str, Any]:
    """As trl's `_generate_and_score_completions` leaves them: prompts padded on the left, completions on the right."""
    import torch

    firsts = [s.trainable.index(True) for s in samples]
    prompts = [list(s.token_ids[:first]) for s, first in zip(samples, firsts, strict=True)]
    completions = [list(s.token_ids[first:]) for s, first in zip(samples, firsts, strict=True)]
    own = [list(s.trainable[first:]) for s, first in zip(samples, firsts, strict=True)]
    longest, most = max(map(len, prompts)), max(map(len, completions))

    def tensor(rows: Sequence[Sequence[int]], *, width: int, left: bool = False) -> Any:
        padded = [([0] * (width - len(r)) + [*r]) if left else ([*r] + [0] * (width - len(r))) for r in rows]
        return torch.tensor(padded, dtype=torch.long, device=device)

    return {
        "prompt_ids": tensor(prompts, width=longest, left=True),
        "prompt_mask": tensor([[1] * len(p) for p in prompts], width=longest, left=True),
        "completion_ids": tensor(completions, width=most),
        "completion_mask": tensor([[1] * len(c) for c in completions], width=most),
        "tool_mask": tensor(own, width=most),
        "advantages": torch.tensor([s.advantage for s in samples], device=device),
        "num_items_in_batch": torch.tensor(float(num_trained), device=device),
    }
