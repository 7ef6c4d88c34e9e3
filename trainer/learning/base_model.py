"""The frozen base under the adapter, read of its checkpoint whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from envs.errors import UserError
from trainer.config import ModelConfig
from trainer.models.family import model_class_of, weights_dtype


def load_base(model_path: Path, config: ModelConfig, device: torch.device) -> Any:
    """In transformers' own class of it. Raises `UserError` for weights that are damaged or not whole."""
    model_class, _ = model_class_of(model_path)
    try:
        base, told = model_class.from_pretrained(
            model_path,
            trust_remote_code=False,
            dtype=getattr(torch, weights_dtype(config, on_cpu=device.type == "cpu")),
            device_map={"": device} if device.type != "cpu" else None,
            attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, SafetensorError) as e:
        raise UserError(f"model.name: the weights in {model_path} can't be read: {' '.join(str(e).split())}") from e
    # transformers would make these up.
    if wrong := sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"model.name: the weights in {model_path} are not whole, or not those of its config.json: "
            f"{', '.join(wrong[:3])}{more} missing or of another shape"
        )
    return base
