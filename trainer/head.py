"""Log-probabilities of given tokens out of hidden states, without ever holding the logits of all positions.

Shape suffixes: N trainable tokens, H hidden size, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Of float32 logits held at once. Smaller chunks stay near the cache, larger ones use a matrix unit better."""


class TokenLogprobs(torch.autograd.Function):
    """logprob_n = log softmax(h_n Wᵀ / temperature)[target_n] for a frozen output matrix W.

    Since W takes no gradient, the only gradient is that of h:

        ∂logprob_n / ∂h_n = (W[target_n] - softmax(h_n Wᵀ / temperature) · W) / temperature

    It does not depend on what comes after, but for a factor per token. So the forward pass computes it while a chunk's
    logits are at hand and keeps (N, H) instead of (N, V); the backward pass is one multiplication. The idea of
    computing the gradient in the forward pass: Liger kernel, Hsu et al. 2024, arXiv:2410.10989.

    Covered: log-softmax in float32 whatever the weights' dtype. Not covered: a bias, a trainable W, logits that the
    model scales or caps afterwards; `Policy` compares with the model's own logits once and refuses such a model.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float, needs_grad: bool
    ) -> Tensor:
        chunk = max(1, CHUNK_BYTES // (4 * weight_VH.shape[0]))
        logprobs_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH) if needs_grad else None
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            targets_C1 = targets_N[part, None]
            logits_CV = (hidden_NH[part] @ weight_VH.T).float()
            if temperature != 1.0:
                logits_CV /= temperature
            normaliser_C1 = torch.logsumexp(logits_CV, dim=-1, keepdim=True)
            logprobs_N[part] = (logits_CV.gather(1, targets_C1) - normaliser_C1)[:, 0]
            if grad_NH is None:
                continue
            probs_CV = logits_CV.sub_(normaliser_C1).exp_().to(hidden_NH.dtype)
            grad_NH[part] = (weight_VH[targets_N[part]] - probs_CV @ weight_VH) / temperature
        if grad_NH is not None:
            ctx.save_for_backward(grad_NH)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return (grads[0][:, None] * grad_NH).to(grad_NH.dtype), None, None, None, None


def token_logprobs(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """(N,) float32 log-probabilities; differentiable in `hidden_NH`."""
    needs_grad = torch.is_grad_enabled() and hidden_NH.requires_grad
    logprobs_N: Tensor = TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, targets_N, temperature, needs_grad
    )
    return logprobs_N
