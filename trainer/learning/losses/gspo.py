"""The clipped loss by sequence: GSPO."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.learning import GspoConfig
from trainer.learning.losses.base import LossInputs, row_means
from trainer.learning.losses.clipped import clipped_by


def gspo_loss(inputs: LossInputs, config: GspoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · correction · -min(s·A, clip(s, 1 - clip_low, 1 + clip_high)·A), with s the same for all of a row.

        s_row = exp(mean over the row's tokens of (logprob - old_logprob))
        s_n   = sg[s_row] · logprob_n's own ratio to itself, exp(logprob_n - sg[logprob_n])

    Group Sequence Policy Optimization, Zheng et al. 2025, arXiv:2507.18071; s_n is its token form, whose
    value is s_row and whose gradient gives each token its own advantage. Where a row's advantages and weights are the
    same, it is the gradient of s_row itself, and the loss is trl 1.16's with `importance_sampling_level="sequence"`.
    (N,) in, a scalar out.

    A sequence is a *row*: a rollout that its template forked is several.
    """
    logprobs_N = inputs.logprobs_N
    past_N = (logprobs_N - inputs.old_logprobs_N).detach()
    ratio_N = torch.exp(row_means(past_N, inputs.row_of_N)) * torch.exp(logprobs_N - logprobs_N.detach())
    return clipped_by(ratio_N, inputs, low=config.clip_low, high=config.clip_high)
