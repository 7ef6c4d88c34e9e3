"""What every loss is given and what its metrics are. Pure: tensors in, loss and metrics out.

Shape suffixes: N trainable tokens of one microbatch, R rollouts of one optimizer update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The trainable tokens of one microbatch; float32 tensors of shape (N,), row after row.

    Gradient flows through `logprobs_N` only. The loss of a microbatch is a sum over its tokens, each times its
    weight, so that the sum over microbatches and processes is the loss of one large batch (invariant 6). Rows without
    an advantage are not among them where `loss.kl_coef` is 0.
    """

    logprobs_N: Tensor
    """Under the policy that learns, at the sampler's temperature."""
    old_logprobs_N: Tensor
    """Under the policy before the step's first update; equal to `logprobs_N` where the step makes one update."""
    sampler_logprobs_N: Tensor
    """As the engine said when it sampled them."""
    ref_logprobs_N: Tensor | None
    """Under the policy before the first step; None where `loss.kl_coef` is 0."""
    advantages_N: Tensor
    weights_N: Tensor
    """See `token_weights`."""
    row_of_N: Tensor
    """int64: which row of the microbatch the token belongs to, counted from 0; a rollout without forks is one row."""


Loss = Callable[[LossInputs], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a microbatch and its metrics: sums over its tokens (names ending in `_max`: maxima), see `token_sums`."""


def token_sums(inputs: LossInputs) -> dict[str, Tensor]:
    """What every loss tells: the number of tokens, by which sums become means, and how far sampler and trainer differ.

    The sampler drew the tokens, so KL(sampler ‖ trainer) is the divergence that its tokens can estimate.
    """
    mismatch_N = (inputs.old_logprobs_N - inputs.sampler_logprobs_N).detach()
    return {
        "num_tokens": torch.tensor(float(len(mismatch_N)), device=mismatch_N.device),
        "mismatch_kl": k3(torch.zeros_like(mismatch_N), mismatch_N).sum(),
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
