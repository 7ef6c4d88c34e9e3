"""The policy-gradient loss. Pure: tensors in, loss and metrics out.

Shape suffixes: N trainable tokens of one microbatch, R rollouts of one optimizer update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Normalisation = Literal["token", "sequence", "constant"]


def token_weights(
    num_tokens_R: Sequence[int], normalisation: Normalisation, *, constant_tokens: int | None = None
) -> list[float]:
    """What one trainable token of each rollout weighs in the loss of one optimizer update; returns R weights.

        token      1 / Σ_r n_r       every token the same; trl "dapo" (and "bnpo" for one microbatch)
                                     DAPO, Yu et al. 2025, arXiv:2503.14476
        sequence   1 / (R · n_r)     every rollout the same, so a token of a long one counts less; trl "grpo"
                                     DeepSeekMath, Shao et al. 2024, arXiv:2402.03300
        constant   1 / (R · L)       L = `constant_tokens`, no length bias; trl "dr_grpo" (L: max_completion_length)
                                     Dr. GRPO, Liu et al. 2025, arXiv:2503.20783

    n_r = `num_tokens_R[r]` counts the trainable tokens of rollout r over all its rows, and R counts the rollouts of
    the *whole* update: all processes and microbatches. The loss of a microbatch is a plain weighted sum, so the sum
    over microbatches and processes is the loss of one large batch, however it was cut.
    """
    assert all(n > 0 for n in num_tokens_R), "a rollout without trainable tokens has no place in the loss"
    num_rollouts = len(num_tokens_R)
    match normalisation:
        case "token":
            return [1.0 / sum(num_tokens_R)] * num_rollouts
        case "sequence":
            return [1.0 / (num_rollouts * n) for n in num_tokens_R]
        case "constant":
            assert constant_tokens, "normalisation `constant` needs the constant"
            return [1.0 / (num_rollouts * constant_tokens)] * num_rollouts


def k3(logprobs_N: Tensor, other_logprobs_N: Tensor) -> Tensor:
    """Per-token estimate of KL(p ‖ q) from tokens sampled from p: exp(q - p) - (q - p) - 1, never negative.

    Schulman 2020, "Approximating KL divergence" (estimator k3). `logprobs_N` are p's, `other_logprobs_N` q's.
    """
    diff_N = other_logprobs_N - logprobs_N
    return torch.exp(diff_N) - diff_N - 1.0


def policy_loss(
    *,
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    sampler_logprobs_N: Tensor,
    ref_logprobs_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    tis_cap: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
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

    With one update per step pass `old_logprobs_N = logprobs_N.detach()`: ρ is 1 and its gradient the plain one.
    All arguments have shape (N,) and float32; gradient flows through `logprobs_N` only. `weights_N` comes from
    `token_weights`. `ref_logprobs_N` is needed when kl_coef > 0.

    Matches trl 1.16 `GRPOTrainer._compute_loss` with `importance_sampling_level="token"` and
    `vllm_importance_sampling_mode="token_truncate"`. Left out on purpose: sequence-level ratios (GSPO), masking modes
    of the correction, dual clipping (delta), entropy bonus.

    Metrics are sums over tokens (names ending in `_max`: maxima), for `reduce_metrics`.
    """
    log_ratio_N = logprobs_N - old_logprobs_N.detach()
    ratio_N = torch.exp(log_ratio_N)
    clipped_N = torch.clamp(ratio_N, 1.0 - clip_low, 1.0 + clip_high)
    loss_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    mismatch_N = (old_logprobs_N - sampler_logprobs_N).detach()
    tis_N = torch.exp(mismatch_N)
    if tis_cap is not None:
        loss_N = loss_N * torch.clamp(tis_N, max=tis_cap)
    metrics: dict[str, Tensor] = {}
    if kl_coef > 0:
        assert ref_logprobs_N is not None, "a KL term needs the reference's log-probabilities"
        kl_N = ratio_N * k3(logprobs_N, ref_logprobs_N)
        loss_N = loss_N + kl_coef * kl_N
        metrics["kl_to_reference"] = kl_N.detach().sum()
    loss = (loss_N * weights_N).sum()
    metrics |= _token_sums(ratio_N.detach(), mismatch_N, advantages_N, clip_low, clip_high)
    if tis_cap is not None:
        metrics["tis_weight"] = torch.clamp(tis_N, max=tis_cap).sum()
        metrics["tis_capped_share"] = (tis_N > tis_cap).float().sum()
    return loss, metrics


def _token_sums(
    ratio_N: Tensor, mismatch_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    # The sampler drew the tokens, so KL(sampler ‖ trainer) is the divergence that its tokens can estimate.
    zeros_N = torch.zeros_like(mismatch_N)
    return {
        "num_tokens": torch.tensor(float(len(ratio_N)), device=ratio_N.device),
        "ratio": ratio_N.sum(),
        "ratio_max": ratio_N.max(),
        "clipped_low_share": ((ratio_N < 1.0 - clip_low) & (advantages_N < 0)).float().sum(),
        "clipped_high_share": ((ratio_N > 1.0 + clip_high) & (advantages_N > 0)).float().sum(),
        "mismatch_kl": k3(zeros_N, mismatch_N).sum(),
        "mismatch_abs": mismatch_N.abs().sum(),
        "mismatch_abs_max": mismatch_N.abs().max(),
    }


def reduce_metrics(parts: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Means per token (maxima for names ending in `_max`) over the metrics of microbatches or processes."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    totals: dict[str, float] = {}
    for name in names:
        values = [float(part[name]) for part in parts if name in part]
        totals[name] = max(values) if name.endswith("_max") else sum(values)
    num_tokens = totals.pop("num_tokens", 0.0)
    means = {k: v if k.endswith("_max") else v / max(num_tokens, 1.0) for k, v in totals.items()}
    return means | {"num_tokens": num_tokens}
