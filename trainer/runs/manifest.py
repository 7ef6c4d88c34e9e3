"""What a checkpoint rests on, written into it: its own files, and what the run had written until then.

The metrics and the visits of the steps so far decide what the steps to come do and what the report says of all of
them. A run that goes on from a checkpoint goes on from their first bytes as they were, or says what is wrong.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from envs.errors import UserError
from trainer.runs.files import digest, is_intact, object_in, read_document, refusal, sealed, write_atomically

NAME = "checkpoint.json"
STATE = "policy.safetensors"
OLD_STATE = "policy.pt"
"""What versions without a manifest wrote."""
RESTS_ON = ("metrics.jsonl", "visits.jsonl")
_STEP = re.compile(r"step-(\d{6,15})")


class Print(BaseModel):
    """A file, or its beginning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What stands in checkpoint.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    run_id: str
    files: dict[str, Print]
    """Of the checkpoint, by their paths in it."""
    rests_on: dict[str, Print]
    """The beginnings of the run's own files; nothing of one that was not there."""


def adapter_of(run: Path, step: int | None = None) -> Path:
    """The final adapter of a run, or of its newest checkpoint where it has not ended. Raises `UserError`.

    With `step` that of the checkpoint after so many steps.
    """
    if step is not None:
        kept = dict(checkpoints(run))
        if step not in kept or not (kept[step] / "adapter" / "adapter_model.safetensors").is_file():
            told = f"it keeps those of {', '.join(map(str, sorted(kept)))}" if kept else "it keeps none yet"
            raise UserError(f"--step {step}: {run} keeps no checkpoint of that step; {told}")
        return kept[step] / "adapter"
    for folder in (run / "adapter", *(checkpoint / "adapter" for _, checkpoint in checkpoints(run))):
        if (folder / "adapter_model.safetensors").is_file():
            return folder
    raise UserError(f"{run}: holds neither a final adapter nor a checkpoint yet")


def write_manifest(checkpoint: Path, run: Path, *, step: int, run_id: str) -> None:
    """Into the folder `checkpoint`, whose files are then on the disk, and so is what it rests on."""
    files = {
        str(path.relative_to(checkpoint)): _print(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    _write(checkpoint, Manifest(step=step, run_id=run_id, files=files, rests_on=_rests_on(run)))


def renew_manifest(checkpoint: Path, run: Path) -> None:
    """Take in what the run has written since, at the same step. A checkpoint of an older version stays as it is."""
    if (manifest := read_manifest(checkpoint)) is not None:
        _write(checkpoint, manifest.model_copy(update={"rests_on": _rests_on(run)}))


def read_manifest(checkpoint: Path) -> Manifest | None:
    """None in a checkpoint of an older version. Raises `UserError` that names the file."""
    path = checkpoint / NAME
    try:
        text = read_document(path, ours=True)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise refusal(e, path) from e
    if not is_intact(text) or (read := object_in(text)) is None:
        raise UserError(f"{path}: is damaged: it is not what was written")
    try:
        manifest = Manifest.model_validate({key: value for key, value in read.items() if key != "sha256"})
    except ValidationError as e:
        where = ".".join(map(str, e.errors()[0]["loc"]))
        raise UserError(f"{path}: is damaged: {where}: {e.errors()[0]['msg']}") from None
    if f"step-{manifest.step:06d}" != checkpoint.name or set(manifest.rests_on) != set(RESTS_ON):
        raise UserError(f"{path}: is damaged: does not describe {checkpoint.name}")
    if STATE not in manifest.files:
        raise UserError(f"{path}: is damaged: names no {STATE}")
    return manifest


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of each, the newest first. Whatever else lies beside them is passed over."""
    found = []
    for path in (run / "checkpoints").glob("step-*"):
        name = _STEP.fullmatch(path.name)
        if name and path.name == f"step-{int(name[1]):06d}" and path.is_dir() and not path.is_symlink():
            found.append((int(name[1]), path))
    return sorted(found, reverse=True)


def fault_of(checkpoint: Path, run: Path) -> str:
    """What is wrong with a checkpoint or with what it rests on, with the file's name; empty where nothing is.

    Of an older version's only that its state is there is known.
    """
    try:
        manifest = read_manifest(checkpoint)
        if manifest is None:
            is_there = any((checkpoint / name).is_file() for name in (STATE, OLD_STATE))
            return "" if is_there else f"{checkpoint / STATE}: is missing"
        return next(_faults(manifest, checkpoint, run), "")
    except OSError as e:
        return f"{e.filename}: {e.strerror or e}"
    except UserError as e:
        return str(e)


def _faults(manifest: Manifest, checkpoint: Path, run: Path) -> Iterator[str]:
    for name in RESTS_ON:
        yield from _differs(run / name, manifest.rests_on[name], only_beginning=True)
    for name, was in manifest.files.items():
        yield from _differs(checkpoint / name, was, only_beginning=False)


def _differs(path: Path, was: Print, *, only_beginning: bool) -> Iterator[str]:
    num_bytes, sha256 = digest(path, num_bytes=was.num_bytes + (not only_beginning))
    if num_bytes == was.num_bytes and sha256 == was.sha256:
        return
    if not path.exists():
        yield f"{path}: is missing"
    elif num_bytes < was.num_bytes:
        yield f"{path}: is damaged: {num_bytes:,} of {was.num_bytes:,} bytes are left"
    else:
        part = f"its first {was.num_bytes:,} bytes are" if only_beginning else "it is"
        yield f"{path}: is damaged: {part} not what was written"


def _print(path: Path) -> Print:
    num_bytes, sha256 = digest(path, sync=True)
    return Print(num_bytes=num_bytes, sha256=sha256)


def _rests_on(run: Path) -> dict[str, Print]:
    return {name: _print(run / name) for name in RESTS_ON}


def _write(checkpoint: Path, manifest: Manifest) -> None:
    write_atomically(checkpoint / NAME, sealed(manifest.model_dump()) + "\n")


def run_id_of(run: Path) -> str | None:
    """Whose checkpoints they are, by the newest that says so."""
    for _, folder in checkpoints(run):
        with contextlib.suppress(UserError):
            if (manifest := read_manifest(folder)) is not None:
                return manifest.run_id
    return None
