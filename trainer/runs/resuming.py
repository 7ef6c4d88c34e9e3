"""What a run goes on from: the newest checkpoint in its folder, or, where it begins, the adapter of another run.

Whether that is whole, and what to do where it is not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.reading.json_text import read_json
from trainer.config import RunConfig
from trainer.runs.about import FILES, changed_files, read_about
from trainer.runs.files import clear, digest, drop_damaged, is_intact, open_to_read, step_files, whole_lines
from trainer.runs.manifest import NAME, RESTS_ON, adapter_of, checkpoints, fault_of, read_manifest
from trainer.runs.records import asked_as, rollout_in
from trainer.types import Kind, ids_begin_with

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LIKE_ANY = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "base_model_name_or_path", "task_type", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "eva_config"),
}
"""Keys of an adapter's config that say nothing of what it computes, or are looked at apart."""
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others change the base's own weights (pissa, olora, corda, loftq): over the base as it is they are another policy.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""What may stand under a key; under every other one nothing (null, false, empty), whatever PEFT calls it one day."""


def check_resumable(run: Path) -> list[str]:
    """Raise `UserError` where what the run would go on from is missing or damaged. A folder without any is a new run's,
    and a run.json that is missing is made anew.

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
    run_id = read_about(run)["run_id"] if (run / "run.json").exists() else manifest.run_id
    if manifest.run_id != run_id:
        raise UserError(
            f"{run / 'run.json'}: is of the run {run_id}, but {newest} of {manifest.run_id}; delete run.json to have "
            "it made anew, or the checkpoint if that comes from elsewhere"
        )
    return []


def refuse_changed_files(path: Path, config: RunConfig) -> None:
    """Raise `UserError`: a file that the config names is as much of the run as the config itself."""
    if not (path / "run.json").exists() or not checkpoints(path):
        return
    if changed := changed_files(read_about(path), config):
        raise UserError(
            f"output_dir {path}: holds a run that was made with other contents of {', '.join(changed[:5])}. Choose "
            f'another output_dir, delete the folder, or restore the file; or delete "{FILES}" from '
            f"{path / 'run.json'} to go on with what it holds now, which the steps before have not seen"
        )


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


def drop_unfit(
    run: Path, run_id: str, kind: Kind, steps: Iterable[int], *, needs_digest: bool
) -> Iterator[tuple[Path, int]]:
    """Of the steps' rollouts leave each once, whole, and in the place of its own step; the files that had others, and
    how many. Rollouts of older versions have no digest.
    """
    seen: set[str] = set()

    def fits(line: bytes, begins: str) -> bool:
        rollout = rollout_in(line) if not needs_digest or is_intact(line) else None
        if rollout is None or asked_as(rollout) in seen or not rollout.episode.rollout_id.startswith(begins):
            return False
        seen.add(asked_as(rollout))
        return True

    for step in steps:
        begins = ids_begin_with(run_id, kind, step)
        for path in sorted(step_files(run / kind, step)):
            if num_dropped := drop_damaged(path, intact=functools.partial(fits, begins=begins)):
                yield path, num_dropped


def drop_ungraded(run: Path, steps: Iterable[int], *, num_rollouts: int) -> list[str]:
    """Delete the training rollouts of a step that has its `num_rollouts`, or more, and not one with a grade.

    It has stopped the run, or would: where the world is there again, they are worth another try. Returns what the user
    has to be told.
    """
    told = []
    for step in steps:
        files = step_files(run / Kind.TRAIN, step)
        graded = [r is None or r.grade is not None for file in files for r in map(rollout_in, whole_lines(file))]
        if len(graded) >= num_rollouts and not any(graded):
            for file in files:
                clear(file)
            told.append(f"not one of the {len(graded)} rollouts of step {step} has a grade: they are made again")
    return told


def _refuse_leftovers(run: Path) -> None:
    left = [name for name in RESTS_ON if (run / name).exists() and (run / name).stat().st_size]
    left += [kind for kind in (*Kind, "tokens") if step_files(run / kind)]
    if (run / "run.json").exists() and "finished_steps" in read_about(run):
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

    *Covered*: that it is there, is a plain LoRA, and has the config's rank and scale. *Not covered*: whether it fits
    the run's model (`trainer.learning.adapter.check_adapter`), or was made over its base. Raises `UserError`.
    """
    lora = config.model.lora
    if lora.start_from is None or checkpoints(config.output_dir):
        return None
    from safetensors import SafetensorError

    key = f"model.lora.start_from {lora.start_from}"
    try:
        folder = lora.start_from
        if not (folder / _WEIGHTS).is_file():
            if not (folder / "config.yaml").is_file():
                raise UserError(f"{key}: is neither the folder of a run nor of an adapter ({_WEIGHTS})")
            folder = adapter_of(folder)
        told = read_json((folder / _CONFIG).read_text(encoding="utf-8"))
        rank, alpha = told["r"], told["lora_alpha"]
        if type(rank) is not int or not isinstance(alpha, int | float):
            raise TypeError(f"r {rank!r}, lora_alpha {alpha!r}")
        _check_whole((folder / _WEIGHTS).resolve())
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as e:
        raise UserError(f"{key}: can't be read as an adapter ({_WEIGHTS}, {_CONFIG}): {e!r}"[:1000]) from e
    for name, of_adapter, own in (("r", rank, lora.r), ("alpha", alpha, lora.alpha)):
        if of_adapter != own:
            raise UserError(f"{key}: its {name} is {of_adapter:g}; set model.lora.{name} to it (now {own:g})")
    for name, value in told.items():
        if name not in _LIKE_ANY and value and value not in _PLAIN.get(name, ()):
            raise UserError(f"{key}: {name}={value!r} in its {_CONFIG}: only plain LoRA can be gone on with"[:1000])
    return folder


def other_modules(adapter: Path, targets: Iterable[str]) -> str:
    """What is said of an adapter whose config lists other layers than `targets`, which the run's adapts; else empty."""
    listed = read_json((adapter / _CONFIG).read_text(encoding="utf-8")).get("target_modules")
    theirs, ours = ({str(name).rpartition(".")[2] for name in names or ()} for names in (listed, targets))
    if not isinstance(listed, list) or theirs == ours:
        return ""
    own, run = (", ".join(sorted(names)) for names in (theirs, ours))
    return f"{adapter} adapts {own}, and this run {run}; set model.lora.target_modules to [{own}]"


def _check_whole(weights: Path) -> None:
    """Raise `SafetensorError`, `ValueError` or `OSError` unless all is there that the file's header names."""
    from safetensors import safe_open

    with open_to_read(weights), safe_open(weights, framework="np") as file:
        if not file.keys():
            raise ValueError(f"{weights.name} holds no weights")
