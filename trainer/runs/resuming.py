"""What a run goes on from: the newest checkpoint in its folder, or, where it begins, the adapter of another run.

Whether that is whole, and what to do where it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.errors import UserError
from trainer.config import RunConfig
from trainer.runs.about import read_about
from trainer.runs.files import digest, step_files
from trainer.runs.manifest import NAME, RESTS_ON, adapter_of, checkpoints, fault_of, read_manifest
from trainer.types import Kind

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
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


def check_resumable(run: Path, run_id: str) -> list[str]:
    """Raise `UserError` where what the run would go on from is missing or damaged. A folder without any is a new run's.

    Returns what the user has to be told where that cannot be known.
    """
    found = checkpoints(run)
    if not found:
        _refuse_leftovers(run)
        return []
    _, newest = found[0]
    if fault := fault_of(newest, run):
        raise refusal_of(newest, run, fault)
    manifest = read_manifest(newest)
    if manifest is None:
        return [
            f"{newest} has no {NAME} (versions before it wrote none): whether {', '.join(RESTS_ON)} and the checkpoint "
            "are as the run left them can't be told"
        ]
    if manifest.run_id != run_id:
        raise UserError(
            f"{run / 'run.json'}: is of the run {run_id}, but {newest} of {manifest.run_id}; delete run.json to have "
            "it made anew, or the checkpoint if that comes from elsewhere"
        )
    return []


def refusal_of(checkpoint: Path, run: Path, fault: str) -> UserError:
    """The error that names the fault of the newest checkpoint and what the run can go on from instead."""
    damaged: list[str] = []
    for _, folder in checkpoints(run):
        if folder != checkpoint and not fault_of(folder, run):
            offer = f"the newest whole checkpoint is {folder}: to go on from it, delete {', '.join(damaged)} beside it"
            break
        damaged.append(folder.name)
    else:
        offer = f"no older checkpoint is whole: restore the file from a copy, or delete {run} to start anew"
    if any(fault.startswith(f"{run / name}: ") for name in RESTS_ON):
        offer += f"; to go on without what the file has lost, delete {checkpoint / NAME}"
    return UserError(f"{fault}; {offer}")


def export_is_whole(run: Path, about: Mapping[str, Any]) -> bool:
    """Whether the exported adapter is as `run.json` has it; of older versions whether it is there."""
    noted = about.get("adapter_files")
    if not isinstance(noted, dict):
        return all((run / "adapter" / name).is_file() for name in (_WEIGHTS, _CONFIG))
    try:
        return export_digests(run / "adapter") == noted
    except OSError:
        return False


def export_digests(adapter: Path) -> dict[str, str]:
    """The SHA-256 of each file of an exported adapter. Raises `OSError`."""
    return {path.name: digest(path)[1] for path in sorted(adapter.glob("*")) if path.is_file()}


def _refuse_leftovers(run: Path) -> None:
    left = [name for name in RESTS_ON if (run / name).exists() and (run / name).stat().st_size]
    left += [kind for kind in (*Kind, "tokens") if step_files(run / kind)]
    if "finished_steps" in read_about(run):
        left.append("run.json")
    if left:
        raise UserError(
            f"{run / 'checkpoints'}: holds no checkpoint to go on from, but an earlier run has left "
            f"{', '.join(left)}; restore the checkpoints, choose another output_dir, or delete {run} to start anew"
        )


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
        told = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(told["r"]), float(told["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{key}: {folder / _CONFIG}: is no adapter's config: {e!r}") from e
    for name, of_adapter, own in (("r", rank, lora.r), ("alpha", alpha, lora.alpha)):
        if of_adapter != own:
            raise UserError(f"{key}: its {name} is {of_adapter:g}; set model.lora.{name} to it (now {own:g})")
    for name, plain in _PLAIN.items():
        if told.get(name) is not None and told[name] not in plain:
            raise UserError(f"{key}: {name}={told[name]!r} in its {_CONFIG}: only plain LoRA can be gone on with")
    return folder
