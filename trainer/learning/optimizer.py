"""The optimizer's updates: gradients of all processes summed by hand, clipped, and AdamW.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.config import OptimConfig


class Optimizer:
    """AdamW over a few parameters in float32, the same on every process."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        accelerator: Accelerator,
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        self._parameters = list(parameters)
        self._accelerator = accelerator
        self._max_grad_norm = max_grad_norm
        self._adamw = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)

    def set_learning_rate(self, rate: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = rate

    def step(self, scale: float) -> float:
        """One update from the gradients of all processes, out of which `scale` is taken; their norm before clipping.

        None is made where the norm is 0: momentum and decay would move the parameters without any evidence.
        Collective. Raises `FloatingPointError` where the norm is not finite; nothing is changed then.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat: Tensor = torch.cat([g.flatten() for g in gradients]) / scale
        flat = self._accelerator.reduce(flat, reduction="sum")
        norm = float(flat.norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        if not norm:
            self._adamw.zero_grad()
            return norm
        sizes = [p.numel() for p in self._parameters]
        flat *= min(1.0, self._max_grad_norm / (norm + 1e-6))
        for parameter, gradient in zip(self._parameters, torch.split(flat, sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self._adamw.step()
        self._adamw.zero_grad()
        return norm

    def moments(self) -> list[dict[str, Tensor]]:
        """Copies on the CPU of what AdamW keeps of each parameter; empty before its first update."""
        return [
            {key: value.detach().cpu().clone() for key, value in self._adamw.state[p].items()} for p in self._parameters
        ]

    def load_moments(self, moments: Sequence[dict[str, Any]]) -> None:
        for parameter, of_parameter in zip(self._parameters, moments, strict=True):
            # A fused AdamW keeps its step counter, too, on the parameter's device.
            self._adamw.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in of_parameter.items()
            }


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Of the 0-based training step: a linear warm-up to the peak, then the schedule, reaching 0 at `num_steps`."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    remaining = max(0.0, 1.0 - (step - optim.warmup_steps) / max(1, optim.num_steps - optim.warmup_steps))
    if optim.schedule == "cosine":
        remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
    return optim.learning_rate * remaining
