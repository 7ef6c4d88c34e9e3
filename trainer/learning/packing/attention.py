"""Attention over a prefix tree: each position reads itself and what lies before it in its rows.

Shape suffixes: B = 1, H query heads, K heads of keys and values, T positions, D size of a head.

It is registered with transformers under `NAME`, whose models hand it the keyword `tree_reading` that their forward pass
is given, and so reaches every layer, recomputed ones (gradient checkpointing) included.

On a CPU it is torch's flash attention, two calls a node (a stretch of positions that the same rows read): the node's
positions among themselves, and all that follow it, which lie in one stretch, on the node. What a position gets from
several nodes is put together by the normalisers: with out_i = softmax(s_i) V_i and l_i = logsumexp(s_i),

    l = log Σ_i exp(l_i),  out = Σ_i exp(l_i - l) out_i

(Milakov and Gimelshein 2018, arXiv:1805.02867). Backwards, flash attention recomputes exp(s_i - l) and needs nothing
but l and out (Dao et al. 2022, arXiv:2205.14135): given those of the whole row, each call gives its part of the
gradient.

On a GPU it is FlexAttention (Dong et al. 2024, arXiv:2412.05496) under a block mask of the same rule.

*Covered:* grouped heads, values of another size than keys. *Not covered:* sliding windows, sinks, soft caps, dropout
(`trainer.learning.packing.choice` leaves models that have them to padded rows); FlexAttention has no backward pass on
a CPU, so that here only its mask is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trainer.learning.packing.rows import PrefixTree

NAME = "agent_rft_prefix_tree"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeReading:
    """How a device computes the attention of one tree, prepared once for all layers."""

    nodes: tuple[tuple[int, int, int], ...] = ()
    """(start, end, end of all that follows) of each node, in the order of positions; on a CPU."""
    block_mask: BlockMask | None = None
    """On a GPU."""


def reading_of(tree: PrefixTree) -> TreeReading:
    if tree.end_T.device.type == "cpu":
        return TreeReading(nodes=nodes_of(tree))
    num_positions = len(tree.end_T)
    mask = create_block_mask(
        mask_of(tree), None, None, num_positions, num_positions, device=str(tree.end_T.device), _compile=True
    )
    return TreeReading(block_mask=mask)


def mask_of(tree: PrefixTree) -> Callable[[Any, Any, Any, Any], Any]:
    """FlexAttention's `mask_mod`: whether position q reads position k."""
    end_T = tree.end_T

    def reads(_batch: Any, _head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q < end_T[k])

    return reads


def nodes_of(tree: PrefixTree) -> tuple[tuple[int, int, int], ...]:
    """See `TreeReading.nodes`."""
    depth_T, end_T = tree.depth_T, tree.end_T
    # A position goes on with its node where the former one is read by the same positions and is the token before it.
    begins_T = torch.ones(len(end_T), dtype=torch.bool)
    begins_T[1:] = (end_T[1:] != end_T[:-1]) | (depth_T[1:] != depth_T[:-1] + 1)
    starts = begins_T.nonzero()[:, 0].tolist()
    ends = [*starts[1:], len(end_T)]
    return tuple((start, end, int(end_T[start])) for start, end in zip(starts, ends, strict=True))


def attention_of_tree(
    module: Any,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    tree_reading: TreeReading | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, T, H, D), as transformers' attention interface has it; plain causal attention where there is no tree."""
    if tree_reading is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHTD, key_BKTD, value_BKTD, attention_mask, scaling=scaling, **kwargs
        )
        return plain
    if tree_reading.block_mask is not None:
        out_BTHD: Tensor
        out_BTHD, _ = flex_attention_forward(
            module, query_BHTD, key_BKTD, value_BKTD, tree_reading.block_mask, scaling=scaling, **kwargs
        )
        return out_BTHD, None
    size, value_size = query_BHTD.shape[-1], value_BKTD.shape[-1]
    scale = scaling if scaling is not None else size**-0.5
    if size != value_size:
        # Flash attention wants one size; zeros change no score and no sum.
        widest = max(size, value_size)
        query_BHTD, key_BKTD = pad(query_BHTD, (0, widest - size)), pad(key_BKTD, (0, widest - size))
        value_BKTD = pad(value_BKTD, (0, widest - value_size))
    out_BHTD: Tensor = _TreeAttention.apply(query_BHTD, key_BKTD, value_BKTD, tree_reading.nodes, scale)  # type: ignore[no-untyped-call]
    return out_BHTD[..., :value_size].transpose(1, 2), None


AttentionInterface.register(NAME, attention_of_tree)
# Where the model is called without a tree, it is called as one with torch's own attention.
AttentionMaskInterface.register(NAME, sdpa_mask)


class _TreeAttention(torch.autograd.Function):
    """See the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        nodes: tuple[tuple[int, int, int], ...],
        scale: float,
    ) -> Tensor:
        dtype = torch.promote_types(query_BHTD.dtype, torch.float32)
        out_BTHD = query_BHTD.new_empty(query_BHTD.transpose(1, 2).shape, dtype=dtype)
        out_BHTD = out_BTHD.transpose(1, 2)
        normalisers_BHT = query_BHTD.new_empty(query_BHTD.shape[:3], dtype=dtype)
        for queries, keys, is_own in _calls(nodes):
            part, normalisers = _flash(
                query_BHTD[:, :, queries],
                key_BKTD[:, :, keys],
                value_BKTD[:, :, keys],
                0.0,
                is_own,
                attn_mask=None,
                scale=scale,
            )
            if is_own:
                out_BHTD[:, :, queries], normalisers_BHT[:, :, queries] = part, normalisers
                continue
            # out + share · (part - out), where share = exp(l_part) / (exp(l_part) + exp(l)).
            share = torch.sigmoid(normalisers - normalisers_BHT[:, :, queries])
            out_BHTD[:, :, queries].lerp_(part.to(dtype), share[..., None])
            normalisers_BHT[:, :, queries] = torch.logaddexp(normalisers_BHT[:, :, queries], normalisers)
        out_BHTD = out_BHTD.to(query_BHTD.dtype)
        ctx.save_for_backward(query_BHTD, key_BKTD, value_BKTD, out_BHTD, normalisers_BHT)
        ctx.nodes, ctx.scale = nodes, scale
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_BHTD, key_BKTD, value_BKTD, out_BHTD, normalisers_BHT = ctx.saved_tensors
        (grad_BHTD,) = grads
        dtype = normalisers_BHT.dtype
        query_grad, key_grad, value_grad = (
            torch.zeros_like(x, dtype=dtype) for x in (query_BHTD, key_BKTD, value_BKTD)
        )
        for queries, keys, is_own in _calls(ctx.nodes):
            of_query, of_key, of_value = _flash_backward(
                grad_BHTD[:, :, queries],
                query_BHTD[:, :, queries],
                key_BKTD[:, :, keys],
                value_BKTD[:, :, keys],
                out_BHTD[:, :, queries],
                normalisers_BHT[:, :, queries],
                0.0,
                is_own,
                attn_mask=None,
                scale=ctx.scale,
            )
            query_grad[:, :, queries] += of_query
            key_grad[:, :, keys] += of_key
            value_grad[:, :, keys] += of_value
        gradients = (query_grad, key_grad, value_grad)
        of_q, of_k, of_v = (g.to(x.dtype) for g, x in zip(gradients, (query_BHTD, key_BKTD, value_BKTD), strict=True))
        return of_q, of_k, of_v, None, None


def _calls(nodes: tuple[tuple[int, int, int], ...]) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, whether causal) of each call: every node on itself first, then what follows it on it."""
    own = [(slice(start, end), slice(start, end), True) for start, end, _ in nodes]
    past = [(slice(end, last), slice(start, end), False) for start, end, last in nodes if last > end]
    return own + past
