"""Attention over a prefix tree: each position reads itself and what lies before it in its rows.

Shape suffixes: B = 1, H query heads, K heads of keys and values, T positions, D size of a head.

It is registered with transformers under `NAME`, whose models hand it the keyword `tree_reading` that their forward pass
is given, and so reaches every layer, recomputed ones (gradient checkpointing) included.

A tree is cut into nodes, stretches of positions that the same rows read. The positions of a node read the node itself,
causally, and all of each node above it. Torch's flash attention computes both parts, and what a position gets from
several nodes is put together by the normalisers: with out_i = softmax(s_i) V_i and l_i = logsumexp(s_i),

    l = log Σ_i exp(l_i),  out = Σ_i exp(l_i - l) out_i

(Milakov and Gimelshein 2018, arXiv:1805.02867). Backwards, flash attention recomputes exp(s_i - l) and needs nothing
but l and out (Dao et al. 2022, arXiv:2205.14135): given those of the whole row, each call gives its part of the
gradient.

On a CPU that is two calls a node: the node on itself, and all that follows it, which lies in one stretch, on the node.
On a GPU the kernel takes many stretches at once: one call for all nodes on themselves, then one a level of the tree,
for what lies below each of the level's nodes on that node.

*Covered:* grouped heads, values of another size than keys. *Not covered:* sliding windows, sinks, soft caps, dropout,
and on a GPU 32 bits (`trainer.learning.packing.choice` leaves models that have them to padded rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trainer.learning.packing.rows import PrefixTree

NAME = "agent_rft_prefix_tree"

Node = tuple[int, int, int]
"""(start, end, end of all that follows) of a stretch of positions that the same rows read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stretches:
    """Many stretches of positions for one call on a GPU, laid end to end."""

    positions: Tensor | None
    """int64; None: all of them, as they lie."""
    starts: Tensor
    """int32: where each begins among `positions`, and the end of the last."""
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One call of flash attention: queries that read keys."""

    queries: slice | Stretches
    keys: slice | Stretches
    is_own: bool
    """A node on itself, causally; else what follows it, on all of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeReading:
    """How a device computes the attention of one tree, prepared once for all layers."""

    calls: tuple[Call, ...]
    """Nodes on themselves first."""


def reading_of(tree: PrefixTree) -> TreeReading:
    nodes = nodes_of(tree)
    device = tree.end_T.device
    return TreeReading(calls=calls_by_node(nodes) if device.type == "cpu" else calls_by_level(nodes, device))


def nodes_of(tree: PrefixTree) -> list[Node]:
    """In the order of their positions, which is depth first."""
    depth_T, end_T = tree.depth_T.cpu(), tree.end_T.cpu()
    # A position goes on with its node where the former one is read by the same positions and is the token before it.
    begins_T = torch.ones(len(end_T), dtype=torch.bool)
    begins_T[1:] = (end_T[1:] != end_T[:-1]) | (depth_T[1:] != depth_T[:-1] + 1)
    starts = begins_T.nonzero()[:, 0].tolist()
    ends = [*starts[1:], len(end_T)]
    return [(start, end, int(end_T[start])) for start, end in zip(starts, ends, strict=True)]


def calls_by_node(nodes: Sequence[Node]) -> tuple[Call, ...]:
    own = [Call(queries=slice(start, end), keys=slice(start, end), is_own=True) for start, end, _ in nodes]
    past = [
        Call(queries=slice(end, last), keys=slice(start, end), is_own=False) for start, end, last in nodes if last > end
    ]
    return (*own, *past)


def calls_by_level(nodes: Sequence[Node], device: torch.device) -> tuple[Call, ...]:
    """What lies below the nodes of one level does not overlap, so that one call takes it all."""
    whole = _stretches([(start, end) for start, end, _ in nodes], device, as_they_lie=True)
    calls = [Call(queries=whole, keys=whole, is_own=True)]
    levels: list[list[Node]] = []
    above: list[int] = []
    for start, end, last in nodes:
        while above and above[-1] <= start:
            above.pop()
        if len(above) == len(levels):
            levels.append([])
        levels[len(above)].append((start, end, last))
        above.append(last)
    for level in levels:
        if read := [node for node in level if node[2] > node[1]]:
            below = _stretches([(end, last) for _, end, last in read], device)
            calls.append(Call(queries=below, keys=_stretches([n[:2] for n in read], device), is_own=False))
    return tuple(calls)


def _stretches(spans: Sequence[tuple[int, int]], device: torch.device, *, as_they_lie: bool = False) -> Stretches:
    lengths = [end - start for start, end in spans]
    positions = None if as_they_lie else torch.cat([torch.arange(start, end) for start, end in spans]).to(device)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Stretches(positions=positions, starts=starts, longest=max(lengths))


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
    size, value_size = query_BHTD.shape[-1], value_BKTD.shape[-1]
    scale = scaling if scaling is not None else size**-0.5
    widest = -(-max(size, value_size) // 8) * 8
    if size != widest or value_size != widest:
        # Flash attention wants one size, of whole eights on a GPU; zeros change no score and no sum.
        query_BHTD, key_BKTD = pad(query_BHTD, (0, widest - size)), pad(key_BKTD, (0, widest - size))
        value_BKTD = pad(value_BKTD, (0, widest - value_size))
    out_BHTD: Tensor = _TreeAttention.apply(query_BHTD, key_BKTD, value_BKTD, tree_reading.calls, scale)  # type: ignore[no-untyped-call]
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
        calls: tuple[Call, ...],
        scale: float,
    ) -> Tensor:
        dtype = torch.promote_types(query_BHTD.dtype, torch.float32)
        out_BHTD = query_BHTD.new_empty(query_BHTD.transpose(1, 2).shape, dtype=dtype)
        out_BHTD = out_BHTD.transpose(1, 2)
        normalisers_BHT = query_BHTD.new_empty(query_BHTD.shape[:3], dtype=dtype)
        query, key, value = map(_for_kernel, (query_BHTD, key_BKTD, value_BKTD))
        for call in calls:
            q, k = _index(call.queries), _index(call.keys)
            part, normalisers = _attend(query[:, :, q], key[:, :, k], value[:, :, k], call, scale)
            if call.is_own:
                out_BHTD[:, :, q], normalisers_BHT[:, :, q] = part.to(dtype), normalisers
                continue
            # out + share · (part - out), where share = exp(l_part) / (exp(l_part) + exp(l)).
            before, so_far = out_BHTD[:, :, q], normalisers_BHT[:, :, q]
            share = torch.sigmoid(normalisers - so_far)
            out_BHTD[:, :, q] = before.lerp(part.to(dtype), share[..., None])
            normalisers_BHT[:, :, q] = torch.logaddexp(so_far, normalisers)
        out_BHTD = out_BHTD.to(query_BHTD.dtype)
        ctx.save_for_backward(query_BHTD, key_BKTD, value_BKTD, out_BHTD, normalisers_BHT)
        ctx.calls, ctx.scale = calls, scale
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_BHTD, key_BKTD, value_BKTD, out_BHTD, normalisers_BHT = ctx.saved_tensors
        (grad_BHTD,) = grads
        dtype = normalisers_BHT.dtype
        query_grad, key_grad, value_grad = (
            torch.zeros_like(x, dtype=dtype) for x in (query_BHTD, key_BKTD, value_BKTD)
        )
        grad, query, key, value, out = map(_for_kernel, (grad_BHTD, query_BHTD, key_BKTD, value_BKTD, out_BHTD))
        for call in ctx.calls:
            q, k = _index(call.queries), _index(call.keys)
            of_query, of_key, of_value = _attend_backward(
                grad[:, :, q],
                query[:, :, q],
                key[:, :, k],
                value[:, :, k],
                out[:, :, q],
                normalisers_BHT[:, :, q],
                call,
                ctx.scale,
            )
            query_grad[:, :, q] += of_query
            key_grad[:, :, k] += of_key
            value_grad[:, :, k] += of_value
        gradients = (query_grad, key_grad, value_grad)
        of_q, of_k, of_v = (g.to(x.dtype) for g, x in zip(gradients, (query_BHTD, key_BKTD, value_BKTD), strict=True))
        return of_q, of_k, of_v, None, None


# ---- torch's kernels


def _index(part: slice | Stretches) -> slice | Tensor:
    """Of positions; no position stands in it twice."""
    if isinstance(part, slice):
        return part
    return slice(None) if part.positions is None else part.positions


def _for_kernel(x: Tensor) -> Tensor:
    """In 32 bits on a CPU: torch's backward pass in 16 takes up to ten times as long there for short nodes."""
    return x.float() if x.device.type == "cpu" and x.dtype.itemsize < 4 else x


def _attend(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """(1, H, T, D) and normalisers (1, H, T) of what one call reads."""
    q, k = call.queries, call.keys
    if isinstance(q, slice) or isinstance(k, slice):
        out, normalisers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, call.is_own, attn_mask=None, scale=scale
        )
        return out, normalisers
    out_THD, normalisers_HT, *_ = torch.ops.aten._flash_attention_forward(
        *map(_end_to_end, (query, key, value)), q.starts, k.starts, q.longest, k.longest, 0.0, call.is_own, False,
        scale=scale,
    )  # fmt: skip
    return out_THD.transpose(0, 1)[None], normalisers_HT[None]


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, normalisers: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The call's part of the gradients of queries, keys and values, given `out` and `normalisers` of the whole row."""
    q, k = call.queries, call.keys
    if isinstance(q, slice) or isinstance(k, slice):
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, normalisers, 0.0, call.is_own, attn_mask=None, scale=scale
        )
        return of_query, of_key, of_value
    # What draws dropout, of which there is none.
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    gradients = torch.ops.aten._flash_attention_backward(
        *map(_end_to_end, (grad, query, key, value, out)), normalisers[0].contiguous(), q.starts, k.starts,
        q.longest, k.longest, 0.0, call.is_own, seed, torch.zeros((), dtype=torch.uint64, device=query.device),
        scale=scale,
    )  # fmt: skip
    of_query, of_key, of_value = (g.transpose(0, 1)[None] for g in gradients)
    return of_query, of_key, of_value


def _end_to_end(x_BHTD: Tensor) -> Tensor:
    """(T, H, D), as the kernel of many stretches takes it."""
    return x_BHTD[0].transpose(0, 1)
