"""The adapter that a run begins with, where it is one that another run or another trainer has made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from envs.errors import UserError
from trainer.config import RunConfig
from trainer.runs.manifest import adapter_of, checkpoints

_WEIGHTS = "adapter_model.safetensors"
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "bias": ("none",),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layers_to_transform": ([],),
}
"""What else PEFT's adapters may be, by key, with what this trainer's are; null means the same."""


def beginning_with(config: RunConfig, adapter: Path | None) -> RunConfig:
    """The same with the weights of this adapter, and no warm start on top; with none as the base is."""
    lora = config.model.lora.model_copy(update={"start_from": adapter})
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": lora}), "warmstart": None})


def start_adapter(config: RunConfig) -> Path | None:
    """The folder of the adapter that `model.lora.start_from` names; None without, and where a run goes on already.

    *Covered*: that it is there, is a plain LoRA, and has the config's rank and scale. *Not covered*: whether its base
    is the run's; its shapes are compared as it is loaded. Raises `UserError`.
    """
    lora = config.model.lora
    if lora.start_from is None or checkpoints(config.output_dir):
        return None
    folder = lora.start_from
    key = f"model.lora.start_from {folder}"
    if not (folder / _WEIGHTS).is_file():
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{key}: is neither the folder of a run nor of an adapter ({_WEIGHTS})")
        folder = adapter_of(folder)
    try:
        told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha = int(told["r"]), float(told["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{key}: {folder / 'adapter_config.json'}: is no adapter's config: {e!r}") from e
    for name, of_adapter, own in (("r", rank, lora.r), ("alpha", alpha, lora.alpha)):
        if of_adapter != own:
            raise UserError(f"{key}: its {name} is {of_adapter:g}; set model.lora.{name} to it (now {own:g})")
    for name, plain in _PLAIN.items():
        if told.get(name) is not None and told[name] not in plain:
            raise UserError(
                f"{key}: {name}={told[name]!r} in its adapter_config.json: only plain LoRA can be gone on with"
            )
    return folder
