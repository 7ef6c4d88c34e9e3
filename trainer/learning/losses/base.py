"""What every loss is given and what its metrics are. Pure: tensors in, loss and metrics out.

Shape suffixes: N trainable tokens of one microbatch, R rollouts of one optimizer update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


def of_rows(values_N: Tensor, row_of_N: Tensor) -> Tensor:
    """(N,) the sum of the values of each token's row, in float64. The rows' tokens need not lie together."""
    num_rows = int(row_of_N.max()) + 1 if len(row_of_N) else 0
    # Of float32 a GPU would sum in any order, and a run that goes on would differ from one that was never interrupted.
    sums_R = torch.zeros(num_rows, dtype=torch.float64, device=values_N.device)
    return sums_R.index_add(0, row_of_N, values_N.double())[row_of_N]


def row_means(values_N: Tensor, row_of_N: Tensor) -> Tensor:
    """(N,) the mean of the values over each token's row, as float32."""
    return (of_rows(values_N, row_of_N) / of_rows(torch.ones_like(values_N), row_of_N)).to(values_N.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The trainable tokens of one microbatch; float32 tensors of shape (N,).

    Gradient flows through `logprobs_N` only. The loss of a microbatch is a sum over its tokens, each times its
    weight, so that the sum over microbatches and processes is the loss of one large batch (invariant 6). Rows without
    an advantage are not among them where nothing else gives them a gradient. All of a row's tokens are in one
    microbatch; the rows of a rollout need not be.
    """

    logprobs_N: Tensor
    """Under the policy that learns, at the sampler's temperature."""
    old_logprobs_N: Tensor
    """Under the policy before the step's first update; equal to `logprobs_N` where the step makes one update."""
    sampler_logprobs_N: Tensor
    """As the engine said when it sampled them."""
    ref_logprobs_N: Tensor | None
    """Under the reference, see `loss.kl`; None where no KL term stands in the loss."""
    advantages_N: Tensor
    weights_N: Tensor
    """See `token_weights`."""
    row_of_N: Tensor
    """int64: which row of the microbatch the token belongs to, counted from 0; a rollout without forks is one row."""
    staleness_N: Tensor | None = None
    """int64: how many updates before the step's first the token was sampled; None where that is not known."""
    correction_N: Tensor | None = None
    """What the token's policy gradient is multiplied by, for how far sampler and trainer differ: see `correction`.
    Without a gradient; None where nothing is corrected."""


Loss = Callable[[LossInputs], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a microbatch and its metrics: sums over its tokens. See `reduce_metrics` for the names that are not."""


def corrected(loss_N: Tensor, inputs: LossInputs) -> Tensor:
    return loss_N if inputs.correction_N is None else loss_N * inputs.correction_N


HISTOGRAM = "_histogram"
_LOG_RANGE, _LOG_WIDTH = 4.0, 0.01
"""Ratios are counted by their logarithm, from -4 to 4; what lies beyond counts in the outermost bins."""
_QUANTILES = {"p95": 0.95, "p99": 0.99}
_FRESH = "/staleness_0"
SQUARES, EFFECTIVE = "weight_square", "effective_samples"


def log_histogram(logs_N: Tensor) -> Tensor:
    """Counts of logarithms of ratios; of a metric that ends in `_histogram`."""
    num_bins = round(2 * _LOG_RANGE / _LOG_WIDTH)
    bins_N = ((logs_N + _LOG_RANGE) / _LOG_WIDTH).long().clamp(0, num_bins - 1)
    return torch.bincount(bins_N, minlength=num_bins).double()


def token_sums(inputs: LossInputs) -> dict[str, Tensor]:
    """What is told of every loss: the number of tokens, by which sums become means, and how far sampler and trainer
    differ, at each staleness too.

    The sampler drew the tokens, so KL(sampler ‖ trainer) is the divergence that its tokens can estimate.
    """
    mismatch_N = (inputs.old_logprobs_N - inputs.sampler_logprobs_N).detach()
    kl_N = k3(torch.zeros_like(mismatch_N), mismatch_N)
    sums = {
        "num_tokens": torch.tensor(float(len(mismatch_N)), device=mismatch_N.device),
        "mismatch_kl": kl_N.sum(),
        "mismatch_abs": mismatch_N.abs().sum(),
        "mismatch_abs_max": mismatch_N.abs().max(),
        "mismatch_ratio_histogram": log_histogram(mismatch_N),
    }
    if inputs.staleness_N is not None:
        for staleness in sorted(set(inputs.staleness_N.tolist())):
            is_its_own_N = inputs.staleness_N == staleness
            sums[f"num_tokens/staleness_{staleness}"] = is_its_own_N.sum()
            sums[f"mismatch_kl/staleness_{staleness}"] = kl_N[is_its_own_N].sum()
            sums[f"mismatch_abs/staleness_{staleness}"] = mismatch_N[is_its_own_N].abs().sum()
    return sums


def reduce_metrics(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of microbatches or processes together, whatever the number of each.

    NAME               a sum over tokens: its mean a token
    NAME_max           a maximum
    NAME/PART          a sum over some of the tokens: its mean over those, which num_tokens/PART counts, or over all
                       where nothing does; not told of staleness_0 where that is all of them
    NAME_histogram     counts by `log_histogram`: NAME_p95 and NAME_p99, ratios, to 1 %
    weight_square      beside `tis_weight`: `effective_samples`, (Σ w)² / (N Σ w²), the share of the tokens that the
                       weighted ones are worth (Kish 1965); 0 where all weights are
    """
    totals: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            new = torch.as_tensor(value).detach().cpu().double()
            old = totals.get(name)
            totals[name] = new if old is None else torch.maximum(old, new) if name.endswith("_max") else old + new
    if totals.get(f"num_tokens{_FRESH}") == totals.get("num_tokens"):
        totals = {name: total for name, total in totals.items() if not name.endswith(_FRESH)}
    metrics: dict[str, float] = {}
    for name, total in totals.items():
        if name.endswith(HISTOGRAM):
            metrics |= _quantiles(name.removesuffix(HISTOGRAM), total)
        elif name.endswith("_max") or name.partition("/")[0] == "num_tokens":
            metrics[name] = float(total)
        else:
            of_all = totals.get("num_tokens", 0.0)
            count = totals.get("/".join(["num_tokens", *name.split("/")[1:]]), of_all)
            metrics[name] = float(total) / max(float(count), 1.0)
    if SQUARES in metrics:
        square = metrics.pop(SQUARES)
        metrics[EFFECTIVE] = metrics["tis_weight"] ** 2 / square if square else 0.0
    num_tokens = metrics.pop("num_tokens", 0.0)
    return metrics | {"num_tokens": num_tokens}


def _quantiles(name: str, counts: Tensor) -> dict[str, float]:
    """The ratio in the middle of the bin in which each quantile lies."""
    if not counts.sum():
        return {}
    below = counts.cumsum(0)
    places = {q: int((below < share * below[-1]).sum()) for q, share in _QUANTILES.items()}
    return {f"{name}_{q}": math.exp((place + 0.5) * _LOG_WIDTH - _LOG_RANGE) for q, place in places.items()}
