"""Rotary frequencies that are the same for every row, as the engine has them.

transformers takes LongRoPE's (Phi 3, 3.5 MoE, 4 mini) by the longest row of each pass: the long ones for all where one
is longer than the length that the model was first trained at, so that a row's log-probabilities would depend on its
neighbours. vLLM takes the long ones where any sequence may be so long (`max_model_len`). Here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def hold_frequencies(decoder: nn.Module, max_length: int) -> None:
    """Let `decoder` turn all that it reads as it turns the longest row there may be, of `max_length` tokens."""
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        if "longrope" in (kinds.values() if isinstance(kinds, dict) else [kinds]):
            module.forward = partial(_beside_the_last, module.forward, max_length - 1)


def _beside_the_last(
    forward: Callable[..., tuple[Tensor, Tensor]], last: int, x: Tensor, position_ids: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, looked up together with that of the longest row's last token."""
    last_1 = position_ids.new_full((*position_ids.shape[:-1], 1), last)
    cos, sin = forward(x, position_ids=torch.cat((position_ids, last_1), dim=-1), **options)
    return cos[..., :-1, :], sin[..., :-1, :]
