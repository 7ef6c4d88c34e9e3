"""What corrects for the engine's log-probabilities not being the trainer's. Pure; the same for every loss."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.learning import CorrectionConfig
from trainer.learning.losses.base import LossInputs, of_rows, row_means


def correction(
    inputs: LossInputs, config: CorrectionConfig, cap: float | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(N,) the weight of each token's policy gradient, without a gradient, and its metrics; None for none.

        r_n   = exp(old_logprob - sampler_logprob)                     trainer to sampler
        w_n   = min(r_n, cap)                                          level token; 1 where cap is None
                min(Π of the row's r, cap)                             level sequence
        0 instead, where
                r_n is outside ratio_range                             the token
                the geometric mean of the row's r is outside mean_range, or any of them outside outlier_range: the row

    Truncation: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; of sequences,
    and masks of rows by geometric mean and by outlier: Liu et al. 2025, "When speed kills stability"; of tokens:
    IcePop, Ling team 2025, arXiv:2510.18855, whose weights within the range are r_n, so that its cap is the range's
    end. trl 1.16: `vllm_importance_sampling_mode` token_truncate, sequence_truncate, token_mask. Ranges include their
    ends. Masked tokens still count in the loss's denominators, as those without an advantage do.

    *Not covered*: rows of one rollout are sequences of their own; the first row's mismatch is not carried over to what
    the second one holds as context.
    """
    log_ratio_N = (inputs.old_logprobs_N - inputs.sampler_logprobs_N).detach()
    weight_N, metrics = torch.ones_like(log_ratio_N), {}
    if cap is not None:
        of_N = log_ratio_N if config.level == "token" else of_rows(log_ratio_N, inputs.row_of_N).to(log_ratio_N.dtype)
        full_N = torch.exp(of_N)
        weight_N = torch.clamp(full_N, max=cap)
        metrics["tis_capped_share"] = (full_N > cap).float().sum()
    masked_N = _masked(log_ratio_N, inputs.row_of_N, config)
    if masked_N is not None:
        weight_N = weight_N.masked_fill(masked_N, 0.0)
        metrics["mismatch_masked_share"] = masked_N.float().sum()
    if not metrics:
        return None, {}
    return weight_N, metrics | {"tis_weight": weight_N.sum(), "weight_square": weight_N.square().sum()}


def _masked(log_ratio_N: Tensor, row_of_N: Tensor, config: CorrectionConfig) -> Tensor | None:
    masked_N = None
    for bounds, logs_N, by_row in (
        (config.ratio_range, log_ratio_N, False),
        (config.mean_range, log_ratio_N if config.mean_range is None else row_means(log_ratio_N, row_of_N), False),
        (config.outlier_range, log_ratio_N, True),
    ):
        if bounds is not None:
            ratio_N = torch.exp(logs_N)
            outside_N = (ratio_N < bounds[0]) | (ratio_N > bounds[1])
            if by_row:
                outside_N = of_rows(outside_N.float(), row_of_N) > 0
            masked_N = outside_N if masked_N is None else masked_N | outside_N
    return masked_N
