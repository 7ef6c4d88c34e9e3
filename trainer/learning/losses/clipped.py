"""The clipped policy-gradient loss: GRPO, DAPO, Dr. GRPO."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import LossConfig
from trainer.learning.losses.base import LossInputs, k3, token_sums


def clipped_loss(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss of one microbatch, a weighted sum over its trainable tokens.

        ρ    = exp(logprob - old_logprob)                                   ratio within the trainer
        w    = min(exp(old_logprob - sampler_logprob), tis_cap)             no gradient; 1 when tis_cap is None
        L    = Σ weight · ( -w · min(ρ·A, clip(ρ, 1 - clip_low, 1 + clip_high)·A)  +  kl_coef · ρ · k3 )
        k3   = exp(ref - logprob) - (ref - logprob) - 1

    Clipping: PPO, Schulman et al. 2017, arXiv:1707.06347; with two ranges, DAPO, Yu et al. 2025, arXiv:2503.14476.
    w is truncated importance sampling between the engine that sampled and the trainer that learns, which differ in
    kernels and precision: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    ρ in front of k3 makes the KL term's gradient that of the KL itself (DeepSeek-V3.2, arXiv:2512.02556; trl's
    `use_bias_correction_kl`): where old = current, ∇(ρ·k3) = (logprob - ref)·∇logprob.

    Matches trl 1.16 `GRPOTrainer._compute_loss` with `importance_sampling_level="token"` and
    `vllm_importance_sampling_mode="token_truncate"`. Left out on purpose: sequence-level ratios (GSPO), masking modes
    of the correction, dual clipping (delta), entropy bonus.
    """
    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    ratio_N = torch.exp(inputs.logprobs_N - inputs.old_logprobs_N.detach())
    clipped_N = torch.clamp(ratio_N, low, high)
    loss_N = -torch.minimum(ratio_N * inputs.advantages_N, clipped_N * inputs.advantages_N)
    tis_N = torch.exp((inputs.old_logprobs_N - inputs.sampler_logprobs_N).detach())
    if config.tis_cap is not None:
        loss_N = loss_N * torch.clamp(tis_N, max=config.tis_cap)
    metrics: dict[str, Tensor] = {}
    if config.kl_coef > 0:
        assert inputs.ref_logprobs_N is not None, "a KL term needs the reference's log-probabilities"
        kl_N = ratio_N * k3(inputs.logprobs_N, inputs.ref_logprobs_N)
        loss_N = loss_N + config.kl_coef * kl_N
        metrics["kl_to_reference"] = kl_N.detach().sum()
    loss = (loss_N * inputs.weights_N).sum()
    past_N = ratio_N.detach()
    metrics |= {
        "ratio": past_N.sum(),
        "ratio_max": past_N.max(),
        "clipped_low_share": ((past_N < low) & (inputs.advantages_N < 0)).float().sum(),
        "clipped_high_share": ((past_N > high) & (inputs.advantages_N > 0)).float().sum(),
    } | token_sums(inputs)
    if config.tis_cap is not None:
        metrics["tis_weight"] = torch.clamp(tis_N, max=config.tis_cap).sum()
        metrics["tis_capped_share"] = (tis_N > config.tis_cap).float().sum()
    return loss, metrics
