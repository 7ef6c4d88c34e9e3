"""The losses, by the `type` that a config names: one line each; and the user's own."""

from __future__ import annotations

import functools
import json
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from envs.errors import UserError
from envs.user_code import load_target, looked_at, make, required
from trainer.config.learning import CustomLossConfig, LossSettings
from trainer.learning.losses.base import Loss, LossInputs, token_sums

LOSSES = {
    "clipped": "clipped:clipped_loss",
}
"""Where each stands below this folder; called with the inputs and its settings."""


def loss_of(config: LossSettings) -> Loss:
    """The loss that the config names. Raises `UserError` for one of the user's own that does not work."""
    if isinstance(config, CustomLossConfig):
        return _custom(config.target, json.dumps(config.kwargs, sort_keys=True, default=str), config.kl_coef > 0)
    function = resolve_name(f"trainer.learning.losses.{LOSSES[config.type]}")
    return lambda inputs: function(inputs, config)


@functools.lru_cache(maxsize=16)
def _custom(name: str, kwargs: str, has_reference: bool) -> Loss:
    """Made once, so that a loss may keep what it learns of earlier updates."""
    key = "loss.target"
    where = f"{key} {name!r}"
    target = load_target(name, key=key)
    with looked_at(where):
        if isinstance(target, type) or kwargs != "{}":
            target = make(target, json.loads(kwargs), where=where)
    if not callable(target) or len(needed := required(target)) != 1:
        takes = f"one that takes {', '.join(needed) or 'nothing'}" if callable(target) else type(target).__name__
        raise UserError(f"{where}: expected a function of one argument, a LossInputs; got {takes}")

    def loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = _checked(target(inputs), where)
        return value, token_sums(inputs) | metrics

    with looked_at(where):
        loss(_example(has_reference=has_reference))
    return loss


def _checked(answer: Any, where: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss alone has no metrics."""
    value, metrics = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        raise UserError(f"{where}: expected a tensor without axes, with a gradient to logprobs_N; got {_told(value)}")
    if not isinstance(metrics, dict) or not all(isinstance(m, Tensor | float | int) for m in metrics.values()):
        raise UserError(f"{where}: expected a dict of sums over tokens for metrics; got {_told(metrics)}")
    return value, {str(name): torch.as_tensor(metric).detach() for name, metric in metrics.items()}


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"one of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}"
    return type(value).__name__


def _example(*, has_reference: bool) -> LossInputs:
    """Four tokens of two rows, with which a loss is tried before the run."""
    logprobs_N = torch.tensor([-0.5, -1.0, -0.1, -2.0])
    return LossInputs(
        logprobs_N=logprobs_N.clone().requires_grad_(),
        old_logprobs_N=logprobs_N,
        sampler_logprobs_N=logprobs_N - 0.01,
        ref_logprobs_N=logprobs_N - 0.1 if has_reference else None,
        advantages_N=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        weights_N=torch.full((4,), 0.25),
        row_of_N=torch.tensor([0, 0, 1, 1]),
    )
