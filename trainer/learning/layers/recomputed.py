"""Layers that keep nothing for the backward pass but their input, and compute the rest again: gradient checkpointing.

Chen et al. 2016, arXiv:1604.06174. transformers does it in training mode alone, where some models draw random numbers
(the routers of Phi 3.5 MoE, and of Mixtral with jitter; dropout that is no module, as in StarCoder 2), so that two
passes over the same tokens differ. Here the model stays in evaluation mode.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from envs.errors import UserError


def keep_inputs(decoder: nn.Module) -> None:
    """Change the layers of `decoder` in place. Raises `UserError` where it has none that transformers would recompute.

    *Not covered:* layers that draw random numbers in evaluation mode, too; none is known.
    """
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model.gradient_checkpointing: transformers has none for {type(decoder).__name__}; leave it out"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
