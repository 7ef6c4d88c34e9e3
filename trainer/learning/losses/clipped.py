"""The clipped policy-gradient loss: PPO, GRPO, DAPO, Dr. GRPO."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import LossConfig
from trainer.learning.losses.base import LossInputs, corrected


def clipped_loss(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss of one microbatch, a weighted sum over its trainable tokens.

        ρ    = exp(logprob - old_logprob)                                   ratio within the trainer
        L    = Σ weight · correction · -min(min(ρ, delta)·A, clip(ρ, 1 - clip_low, 1 + clip_high)·A)

    Clipping: PPO, Schulman et al. 2017, arXiv:1707.06347; with two ranges, DAPO, Yu et al. 2025, arXiv:2503.14476.
    `delta` bounds what a negative advantage can do to a token that has become likelier, which the clip does not: dual
    clip, Ye et al. 2020, arXiv:1912.09729, as INTELLECT-2 has it, arXiv:2505.07291. None: no bound.
    `correction` is `inputs.correction_N`, see `trainer.learning.losses.correction`.

    Matches trl 1.16 `GRPOTrainer._compute_loss` with `importance_sampling_level="token"`. The KL term and the entropy
    bonus are every loss's, see `registry.loss_of`.
    """
    ratio_N = torch.exp(inputs.logprobs_N - inputs.old_logprobs_N.detach())
    return clipped_by(ratio_N, inputs, low=config.clip_low, high=config.clip_high, delta=config.delta)


def clipped_by(
    ratio_N: Tensor, inputs: LossInputs, *, low: float, high: float, delta: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above of any ratio, token's or sequence's, and its metrics."""
    clipped_N = torch.clamp(ratio_N, 1.0 - low, 1.0 + high)
    bounded_N = ratio_N if delta is None else torch.clamp(ratio_N, max=delta)
    loss_N = -torch.minimum(bounded_N * inputs.advantages_N, clipped_N * inputs.advantages_N)
    past_N = ratio_N.detach()
    metrics = ratio_sums(past_N) | {
        "clipped_low_share": ((past_N < 1.0 - low) & (inputs.advantages_N < 0)).float().sum(),
        "clipped_high_share": ((past_N > 1.0 + high) & (inputs.advantages_N > 0)).float().sum(),
    }
    if delta is not None:
        metrics["dual_clipped_share"] = ((past_N > delta) & (inputs.advantages_N < 0)).float().sum()
    return (corrected(loss_N, inputs) * inputs.weights_N).sum(), metrics


def ratio_sums(ratio_N: Tensor) -> dict[str, Tensor]:
    """What is told of the ratio of policy to old policy, by every loss that has one."""
    return {"ratio": ratio_N.detach().sum(), "ratio_max": ratio_N.detach().max()}
