"""Gated feed-forward layers that keep half as much for the backward pass.

down(act(gate(x)) · up(x)): autograd keeps gate, up, act(gate) and, for the adapter on `down`, the product, each as wide
as the layer, which is most of what a training token takes. The last two are made of the first two again, element by
element, when the backward pass wants them. Same operations, same bits.

*Not covered:* layers that are fused otherwise (`gate_up_proj`, experts); they stay as they are. Under gradient
checkpointing nothing is kept anyway, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def keep_less(decoder: nn.Module) -> int:
    """Change the gated layers of `decoder` in place, those whose own forward pass gives the same; how many."""
    num_changed = 0
    for module in decoder.modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")) and _is_same(module):
            module.forward = MethodType(_forward, module)
            num_changed += 1
    return num_changed


def _is_same(module: Any) -> bool:
    weight = module.down_proj.weight
    try:
        with torch.no_grad():
            x_1H = torch.linspace(-2, 2, len(weight), dtype=weight.dtype, device=weight.device)[None]
            return torch.equal(module(x_1H), _forward(module, x_1H))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # It is called in another way, or its layers are of other shapes.
        return False


def _forward(self: Any, x: Tensor) -> Tensor:
    gate, up, act = self.gate_proj(x), self.up_proj(x), self.act_fn
    product: Tensor = _Product.apply(gate, up, act)  # type: ignore[no-untyped-call]
    place, size = product.data_ptr(), product.numel()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == place and kept.numel() == size else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            again: Tensor = act(gate) * up
        return again.view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        down: Tensor = self.down_proj(product)
    return down


class _Product(torch.autograd.Function):
    """act(gate) · up, of which only gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        [of_gate] = torch.autograd.grad(activated, gate, grad * up)
        return of_gate, grad * activated.detach(), None
