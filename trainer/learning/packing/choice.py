"""Whether a model's rows are laid out as a prefix tree.

The rule, from the model's config: every layer attends, and to all that lies before, by the attention that transformers
lets be exchanged. Sliding windows and chunks, layers that carry a state along (linear attention, beside convolutions),
soft-capped scores and sinks are left to padded rows, and so is an `attn_implementation` that was asked for by name,
other than sdpa. What a config does not tell (positions of its own making, say) shows in a proof: rows of a few tokens
have the same hidden states and gradients in both layouts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.learning.packing.attention import NAME
from trainer.learning.packing.layouts import pack
from trainer.learning.packing.rows import FixedRow, Microbatch

_TOLERANCES = {
    torch.float32: {"hidden states": 1e-3, "gradients": 1e-2},
    torch.bfloat16: {"hidden states": 0.05, "gradients": 0.3},
    torch.float16: {"hidden states": 0.05, "gradients": 0.3},
}
"""Relative (Euclidean norm), by the base's dtype. Rounding makes some 1e-6 in float32, and up to 0.024 (hidden states)
and 0.055 (gradients) in bfloat16 in tiny models of 13 families; where tokens read those of other rows, or stand at
other places, hidden states differ by 0.09 to 0.75."""


def why_padded(model: Any, config: ModelConfig) -> str:
    """What keeps the rows of `model` (PEFT's) from being a tree by the rule above; empty: nothing."""
    base = model.get_base_model()
    text, decoder = base.config.get_text_config(), base.get_decoder()
    if config.attn_implementation not in ("auto", "sdpa"):
        return f"model.attn_implementation is {config.attn_implementation}"
    if not (type(base)._supports_sdpa and type(decoder)._can_set_attn_implementation()):
        return f"the attention of {type(base).__name__} can't be exchanged"
    others = {*(getattr(text, "layer_types", None) or ())} - {"full_attention"}
    if others:
        return f"the model has layers of {', '.join(sorted(others))}"
    if any(isinstance(module, nn.Conv1d) for module in decoder.modules()):
        return "the model has layers that carry a state along"
    if getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None):
        return f"the model attends to a sliding window of {text.sliding_window} tokens"
    if getattr(text, "attn_logit_softcapping", None):
        return "the model caps its attention's scores"
    return ""


def why_unproved(model: Any, hidden_states: Any) -> str:
    """In what the layouts differ on a few tokens, as `hidden_states(model, microbatch)` gives them; empty: in nothing.

    The model's attention is the tree's from here on, where nothing differs.
    """
    embeddings = model.get_base_model().get_input_embeddings().weight
    if embeddings.is_cuda and embeddings.dtype not in (torch.bfloat16, torch.float16):
        return f"the flash attention of a GPU takes 16 bits, and the model is in {str(embeddings.dtype)[6:]}"
    vocabulary_size = embeddings.shape[0]
    # Frequent tokens: the first ones are often untrained, and so are the last; what follows an embedding of next to
    # nothing is rounding blown up.
    frequent = vocabulary_size // 16
    rows = [
        FixedRow(token_ids=[(frequent + t) % vocabulary_size for t in (*range(n), *range(start, start + 24))])
        for n, start in ((40, 50), (40, 80), (20, 110), (0, 140))
    ]
    plain = _read(model, hidden_states, pack(rows, 10_000, "padded"))
    before = use_attention(model, NAME)
    try:
        tree = _read(model, hidden_states, pack(rows, 10_000, "tree"))
    except Exception as e:  # whatever a kernel raises of a size or a card that it was not made for
        use_attention(model, before)
        return f"its attention over a tree can't be computed here: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    tolerances = _TOLERANCES[embeddings.dtype]
    differs = [what for what in plain if not _difference(tree[what], plain[what]) <= tolerances[what]]
    if differs:
        use_attention(model, before)
        return f"its {' and '.join(differs)} over a tree are not those of padded rows"
    return ""


def use_attention(model: Any, name: str) -> str:
    """Let the layers of the text decoder attend as transformers' `name` does; the former one's name."""
    config = model.get_base_model().get_decoder().config
    before: str = config._attn_implementation
    config._attn_implementation = name
    return before


def _read(model: Any, hidden_states: Any, microbatches: list[Microbatch]) -> dict[str, Tensor]:
    """Hidden states at trainable positions, row after row, and the gradient of their sum."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    [microbatch] = microbatches
    microbatch = microbatch.to(parameters[0].device)
    with torch.enable_grad():
        hidden_NH = hidden_states(model, microbatch).flatten(0, 1)[microbatch.positions_N].float()
        parts = torch.split(hidden_NH, list(microbatch.num_trainable_B))
        order = sorted(range(len(parts)), key=lambda b: microbatch.row_indices[b])
        hidden_NH = torch.cat([parts[b] for b in order])
        # The sum of normalised states hardly changes with anything; weights make it.
        weights_NH = torch.linspace(-1, 1, hidden_NH.numel(), device=hidden_NH.device).view_as(hidden_NH)
        gradients = torch.autograd.grad((hidden_NH * weights_NH).sum(), parameters, allow_unused=True)
    return {
        "hidden states": hidden_NH.detach(),
        "gradients": torch.cat([g.flatten().float() for g in gradients if g is not None]),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
