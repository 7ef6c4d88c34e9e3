"""REINFORCE weighted by the capped ratio: CISPO."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.learning import CispoConfig
from trainer.learning.losses.base import LossInputs, corrected
from trainer.learning.losses.clipped import ratio_sums


def cispo_loss(inputs: LossInputs, config: CispoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · correction · -sg[min(ρ, ratio_cap)] · A · logprob, with ρ = exp(logprob - old_logprob).

    MiniMax-M1, Chen et al. 2025, arXiv:2506.13585, without its lower bound, as there; trl 1.16's `loss_type="cispo"`
    with `epsilon_high` as the cap. Where the clipped loss takes the gradient of a token away, this bounds its weight.
    (N,) in, a scalar out.
    """
    ratio_N = torch.exp((inputs.logprobs_N - inputs.old_logprobs_N).detach())
    loss_N = -torch.clamp(ratio_N, max=config.ratio_cap) * inputs.advantages_N * inputs.logprobs_N
    capped = {"ratio_capped_share": (ratio_N > config.ratio_cap).float().sum()}
    return (corrected(loss_N, inputs) * inputs.weights_N).sum(), ratio_sums(ratio_N) | capped
