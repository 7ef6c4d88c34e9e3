"""The KL divergence to a reference: its estimates, as a term of a loss and as a cost. Pure."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trainer.learning.losses.base import LossInputs, k3

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs_N: Tensor, ref_logprobs_N: Tensor, estimator: Estimator) -> Tensor:
    """(N,) estimates of KL(policy ‖ reference) from tokens that the policy sampled, with d = logprob - ref_logprob.

        k1 = d                    unbiased, of both signs
        k2 = d² / 2               biased, never negative
        k3 = exp(-d) + d - 1      unbiased, never negative

    Schulman 2020, "Approximating KL divergence".
    """
    diff_N = logprobs_N - ref_logprobs_N
    match estimator:
        case "k1":
            return diff_N
        case "k2":
            return diff_N.square() / 2
        case "k3":
            return k3(logprobs_N, ref_logprobs_N)


def kl_term(inputs: LossInputs, estimator: Estimator) -> Tensor:
    """(N,) what `kl_coef` weighs in a loss: an estimate in the form that has the KL's own gradient on policy.

        k1, k3      ρ · estimate, with ρ = exp(logprob - old_logprob)
        k2          the estimate

    An estimate's gradient alone is not that of what it estimates: the tokens, too, come of the policy. Where old =
    current, ∇(ρ·k3) = ∇k2 = d·∇logprob, and ∇(ρ·k1) = (d + 1)·∇logprob, whose expectation is the same. DeepSeek-V3.2,
    arXiv:2512.02556 (trl's `use_bias_correction_kl`, for k3); Liu et al. 2025, arXiv:2510.01555.
    """
    assert inputs.ref_logprobs_N is not None, "a KL term needs the reference's log-probabilities"
    estimate_N = kl_estimate(inputs.logprobs_N, inputs.ref_logprobs_N, estimator)
    if estimator == "k2":
        return estimate_N
    return torch.exp(inputs.logprobs_N - inputs.old_logprobs_N.detach()) * estimate_N
