"""The plain policy gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.learning import ReinforceConfig
from trainer.learning.losses.base import LossInputs, corrected
from trainer.learning.losses.clipped import ratio_sums


def reinforce_loss(inputs: LossInputs, config: ReinforceConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · correction · -A · logprob. Williams 1992. (N,) in, a scalar out.

    On policy its gradient is the clipped loss's. Nothing corrects for the updates since the step began: with several
    minibatches or epochs it is biased, and the further, the more they move the policy.
    """
    ratio_N = torch.exp((inputs.logprobs_N - inputs.old_logprobs_N).detach())
    loss_N = -inputs.advantages_N * inputs.logprobs_N
    return (corrected(loss_N, inputs) * inputs.weights_N).sum(), ratio_sums(ratio_N)
