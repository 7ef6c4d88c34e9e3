"""Log-probabilities of given tokens out of hidden states, without ever holding the logits of all positions.

Shape suffixes: N trainable tokens, H hidden size, V vocabulary, W words of 32 vocabulary entries,
C tokens of one chunk, T positions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from envs.errors import UserError

CHUNK_BYTES = 64 * 2**20
"""Of float32 logits held at once. Smaller chunks stay near the cache, larger ones use a matrix unit better."""
GPU_CHUNK_ROWS = 1024
"""Tokens of a chunk on a GPU, at least: every chunk reads the whole head twice, which fewer tokens would wait for."""


def chunk_rows(vocabulary_size: int, *, on_gpu: bool) -> int:
    """C, the tokens whose logits are held at once."""
    return max(GPU_CHUNK_ROWS if on_gpu else 1, CHUNK_BYTES // (4 * vocabulary_size))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """How a model makes logits of its last hidden states: scale · cap · tanh((h Wᵀ + bias) / cap).

    The order is vLLM's `LogitsProcessor`; temperature comes after all of it. Gemma 2 and 3n cap (30), Cohere and
    Granite scale, Phi 1 and 2 have a bias.
    """

    weight_VH: Tensor
    """Frozen."""
    bias_V: Tensor | None = None
    cap: float | None = None
    """Largest absolute logit before the scale; None: not capped."""
    scale: float = 1.0

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """(N, V), in float32 or better."""
        logits_NV = hidden_NH @ self.weight_VH.T
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        if self.cap is not None:
            logits_NV = logits_NV.div_(self.cap).tanh_().mul_(self.cap)
        return logits_NV.mul_(self.scale) if self.scale != 1.0 else logits_NV

    def slopes(self, logits_CV: Tensor) -> Tensor | None:
        """∂logit / ∂(h Wᵀ) by what `logits` gave, without the factor `scale`; None where it is 1 everywhere.

        For y = cap · tanh(x / cap): ∂y/∂x = 1 - tanh²(x / cap) = 1 - (y / cap)².
        """
        return None if self.cap is None else 1.0 - (logits_CV / (self.scale * self.cap)).square_()


class TokenLogprobs(torch.autograd.Function):
    """logprob_n = log softmax(z_n / temperature)[target_n] with z_n the logits of a frozen `Head`.

    Since the head takes no gradient, the only gradient is that of h. With s = ∂z / ∂(h Wᵀ), element by element:

        ∂logprob_n / ∂h_n = (s_n[target_n] · W[target_n] - (s_n · softmax(z_n / temperature)) W) / temperature

    It does not depend on what comes after, but for a factor per token. So the forward pass computes it while a chunk's
    logits are at hand and keeps (N, H) instead of (N, V); the backward pass is one multiplication. The idea of
    computing the gradient in the forward pass: Liger kernel, Hsu et al. 2024, arXiv:2410.10989.

    `allowed_NW` (int32, bit v % 32 of word v // 32) leaves only some tokens of the vocabulary to choose from: the
    softmax is over those. Where one token alone is allowed, its log-probability and the gradient are 0.

    With `wants_entropy` the second output is that of the same distribution, H_n = -Σ_v p_nv log p_nv in nats, with

        ∂H_n / ∂h_n = -(s_n · p_n · (log p_n + H_n)) W / temperature

    for one more product with W; else it is empty.

    Covered: log-softmax in float32 whatever the weights' dtype; scaled and capped logits, a bias. Not covered: a
    trainable head; targets that are not allowed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head: Head,
        targets_N: Tensor,
        temperature: float,
        allowed_NW: Tensor | None,
        needs_grad: bool,
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        weight_VH = head.weight_VH
        chunk = chunk_rows(len(weight_VH), on_gpu=weight_VH.is_cuda)
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprobs_N = torch.empty(len(targets_N), dtype=dtype, device=hidden_NH.device)
        entropy_N = torch.empty(len(targets_N) if wants_entropy else 0, dtype=dtype, device=hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH) if needs_grad else None
        entropy_grad_NH = torch.empty_like(hidden_NH) if needs_grad and wants_entropy else None
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            targets_C1 = targets_N[part, None]
            logits_CV = head.logits(hidden_NH[part])
            slopes_CV = head.slopes(logits_CV) if needs_grad else None
            if allowed_NW is not None:
                logits_CV.masked_fill_(~_unpacked(allowed_NW[part], weight_VH.shape[0]), -torch.inf)
            if temperature != 1.0:
                logits_CV /= temperature
            normaliser_C1 = torch.logsumexp(logits_CV, dim=-1, keepdim=True)
            logprobs_N[part] = (logits_CV.gather(1, targets_C1) - normaliser_C1)[:, 0]
            if grad_NH is None and not wants_entropy:
                continue
            probs_CV = logits_CV.sub_(normaliser_C1).exp_()
            if wants_entropy:
                entropy_N[part], falls_CV = _entropy(probs_CV)
            if grad_NH is None:
                continue
            if entropy_grad_NH is not None:
                falls_CV = falls_CV if slopes_CV is None else falls_CV.mul_(slopes_CV)
                falls_CH = falls_CV.to(hidden_NH.dtype) @ weight_VH
                entropy_grad_NH[part] = -falls_CH * (head.scale / temperature)
            chosen_CH = weight_VH[targets_N[part]]
            if slopes_CV is not None:
                chosen_CH = chosen_CH * slopes_CV.gather(1, targets_C1).to(chosen_CH.dtype)
                probs_CV *= slopes_CV
            grad_NH[part] = (chosen_CH - probs_CV.to(hidden_NH.dtype) @ weight_VH) * (head.scale / temperature)
        if grad_NH is not None:
            ctx.save_for_backward(grad_NH, *([] if entropy_grad_NH is None else [entropy_grad_NH]))
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        grad_NH, *entropy_grad_NH = ctx.saved_tensors
        hidden_grad_NH = grads[0][:, None] * grad_NH
        for inner_NH in entropy_grad_NH:
            hidden_grad_NH = hidden_grad_NH + grads[1][:, None] * inner_NH
        return hidden_grad_NH.to(grad_NH.dtype), None, None, None, None, None, None


def _entropy(probs_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) nats of each distribution, and (C, V) p · (log p + H); 0 where p is."""
    logs_CV = torch.xlogy(probs_CV, probs_CV)
    entropy_C = -logs_CV.sum(dim=-1)
    return entropy_C, logs_CV.addcmul_(probs_CV, entropy_C[:, None])


def token_logprobs(
    hidden_NH: Tensor, head: Head, targets_N: Tensor, temperature: float, *, allowed_NW: Tensor | None = None
) -> Tensor:
    """(N,) log-probabilities in float32 or better; differentiable in `hidden_NH`. See `TokenLogprobs`."""
    return _of_tokens(hidden_NH, head, targets_N, temperature, allowed_NW, wants_entropy=False)[0]


def token_logprobs_and_entropy(
    hidden_NH: Tensor, head: Head, targets_N: Tensor, temperature: float, *, allowed_NW: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, and the (N,) entropies of what the tokens were chosen from, in nats."""
    return _of_tokens(hidden_NH, head, targets_N, temperature, allowed_NW, wants_entropy=True)


def _of_tokens(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float,
    allowed_NW: Tensor | None,
    *,
    wants_entropy: bool,
) -> tuple[Tensor, Tensor]:
    needs_grad = torch.is_grad_enabled() and hidden_NH.requires_grad
    both: tuple[Tensor, Tensor] = TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head, targets_N, temperature, allowed_NW, needs_grad, wants_entropy
    )
    return both


def _unpacked(allowed_CW: Tensor, vocabulary_size: int) -> Tensor:
    """(C, V) booleans."""
    bits_32 = torch.arange(32, dtype=torch.int32, device=allowed_CW.device)
    return ((allowed_CW[:, :, None] >> bits_32) & 1).bool().flatten(1)[:, :vocabulary_size]


_TOLERANCE = 0.01
"""Of a position's logits, relative (Euclidean norm). A few roundings to bfloat16 stay under 0.3 %; the known scales and
caps change much more."""


def read_head(base: Any, hidden_1TH: Tensor, token_ids_1T: Tensor) -> Head:
    """The head of the transformers causal LM `base`, proved by the model's own logits.

    `hidden_1TH` is what the trainer takes for the last hidden states of `token_ids_1T`. What the config says of scales
    and caps makes a few candidates (Granite divides by the `logits_scaling` by which HyperCLOVA X multiplies); the
    closest is taken. For the proof each position's hidden states are scaled up on their way into the model's head, so
    that its logits are of the order of 1 to 256: a cap does not show in the small logits of a young model.

    Raises `UserError` when none gives the model's logits: it does something else there, of which the trainer's
    log-probabilities would differ from the engine's without any sign.
    """
    module = base.get_output_embeddings()
    with torch.no_grad():
        plain_TV = Head(weight_VH=module.weight).logits(hidden_1TH[0])
        wanted_T = 2.0 ** (torch.arange(len(plain_TV), device=plain_TV.device) % 9)
        # Powers of two, so that nothing is rounded. The bound keeps float16 from overflowing.
        factors_T = (wanted_T / plain_TV.abs().amax(dim=1)).log2().round().clamp(max=12).exp2()
        factors_T1 = factors_T[:, None].to(hidden_1TH.dtype)
        hook = module.register_forward_pre_hook(lambda _, args: (args[0] * factors_T1,))
        try:
            expected_TV = base(input_ids=token_ids_1T, use_cache=False).logits[0].float()
        finally:
            hook.remove()
        errors = {
            head: _relative_error(head.logits(hidden_1TH[0] * factors_T1).float(), expected_TV)
            for head in _candidates(base, module)
        }
    head, error = min(errors.items(), key=lambda pair: pair[1])
    if not error <= _TOLERANCE:
        raise UserError(
            f"model.name: {type(base).__name__} makes its logits in a way that the trainer's log-probabilities do not "
            "support; expected an output matrix, and of scales, soft caps and biases those that the config names "
            f"({', '.join((*_SCALES, *_CAPS))})"
        )
    return head


_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_CAPS = ("final_logit_softcapping",)


def _candidates(base: Any, module: Any) -> list[Head]:
    config = base.config.get_text_config()

    def told(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(v) for v in values if isinstance(v, int | float) and v > 0]

    scales = [1.0, *(x for scale in told(_SCALES) for x in (scale, 1.0 / scale))]
    return [
        Head(weight_VH=module.weight, bias_V=getattr(module, "bias", None), cap=cap, scale=scale)
        for scale, cap in itertools.product(scales, [None, *told(_CAPS)])
    ]


def _relative_error(logits_TV: Tensor, expected_TV: Tensor) -> float:
    """The worst position's."""
    return float(((logits_TV - expected_TV).norm(dim=1) / expected_TV.norm(dim=1)).max().nan_to_num(nan=float("inf")))
