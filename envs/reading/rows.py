"""Rows that a user brings: of a JSONL file, or of a data set that Hugging Face's `datasets` loads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from envs.errors import UserError, nearest
from envs.reading.hub import hub_or_cache
from envs.reading.json_text import read_strict_json
from envs.settings import Settings


class DatasetSource(Settings):
    """Names a data set, wherever a config takes the path of a file with rows."""

    dataset: str = Field(
        min_length=1,
        description="Hugging Face id; or a folder: written by `save_to_disk`, or of Parquet, JSON or CSV files.",
    )
    name: str | None = Field(default=None, description="Its configuration, where it has several.")
    split: str = Field(default="train", min_length=1, description="Its split; a slice such as train[:200] also.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")

    def __str__(self) -> str:
        return f"{self.dataset} ({self.split})"


def _not_nothing(value: Any) -> Any:
    if not isinstance(value, str | Path | dict | DatasetSource) or value == "":
        raise ValueError("expected the path of a JSONL file, or a data set: {dataset: NAME}")
    return value


# In brackets, so that `envs.validation` leaves the names of the union's members out of a key.
FileOrDataset = Annotated[
    Annotated[Path, Tag("[file]")] | Annotated[DatasetSource, Tag("[dataset]")],
    Discriminator(lambda value: "[dataset]" if isinstance(value, dict | DatasetSource) else "[file]"),
    BeforeValidator(_not_nothing),
]


def read_rows(source: FileOrDataset, *, key: str) -> Iterator[tuple[int, str, Any]]:
    """(number, where it stands, JSON value) of each row: of a file each line that is not empty, by its number.

    Raises `UserError` that names the config's key, file and line; without any row, too.
    """
    num_rows = 0
    for number, where, value in (
        _of_dataset(source, key) if isinstance(source, DatasetSource) else _of_file(source, key)
    ):
        num_rows += 1
        yield number, where, value
    if not num_rows:
        raise UserError(f"{key} {source}: no rows")


def _of_file(path: Path, key: str) -> Iterator[tuple[int, str, Any]]:
    try:
        # Not splitlines: a JSON string may hold line separators of Unicode.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as e:
        raise UserError(f"{key} {path}: {e.strerror or e}{_hint(path)}") from e
    except UnicodeDecodeError as e:
        at = e.object[: e.start].count(b"\n") + 1
        raise UserError(f"{key} {path}, line {at}: not UTF-8 text: {e.reason} at byte {e.start}{_hint(path)}") from e
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if line.lstrip().startswith("["):
            raise UserError(f"{where}: a JSON list; expected JSONL: one object a line, without a list around them")
        try:
            yield number, where, read_strict_json(line)
        except ValueError as e:
            raise UserError(f"{where}: {e}{_hint(path)}") from None


def _hint(path: Path) -> str:
    """What can be read in its place, for a path that is no JSONL file by its looks."""
    if path.is_dir() or path.suffix.lower() in (".parquet", ".arrow", ".csv", ".tsv"):
        folder = path if path.is_dir() else path.parent
        return f"; expected a JSONL file, or a folder of Parquet, JSON or CSV files as {{dataset: {folder}}}"
    if not path.exists() and path.parent.is_dir():
        return nearest(path.name, (file.name for file in path.parent.iterdir()))
    return ""


def _of_dataset(source: DatasetSource, key: str) -> Iterator[tuple[int, str, Any]]:
    for number, row in enumerate(read_dataset(source, key=key), start=1):
        where = f"{source}, row {number}"
        try:
            yield number, where, read_strict_json(json.dumps(row))
        except (TypeError, ValueError) as e:
            raise UserError(f"{where}: {e}; expected values that JSON has") from None


def read_dataset(source: DatasetSource, *, key: str) -> list[dict[str, Any]]:
    """The rows, as they would stand in JSONL. Raises `UserError` that names the config's key and the data set.

    A key whose value is null is left out, at every depth: Arrow gives every row the keys of all others.
    """
    import datasets

    where = f"{key} {source}"
    folder = Path(source.dataset)
    if source.dataset.startswith((".", "/")) and not folder.is_dir():
        raise UserError(f"{where}: no such folder")
    try:
        if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            loaded = _saved(datasets.load_from_disk(folder), source, where)
        else:
            with contextlib.nullcontext() if folder.is_dir() else hub_or_cache():
                loaded = datasets.load_dataset(
                    source.dataset, source.name, split=source.split, revision=source.revision
                )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise UserError(f"{where}: {type(e).__name__}: {' '.join(str(e.__cause__ or e).split())}") from e
    return [_without_nulls(row) for row in loaded]


def _saved(loaded: Any, source: DatasetSource, where: str) -> Any:
    """The split of what `load_from_disk` returned."""
    if source.name is not None or source.revision is not None:
        raise UserError(f"{where}: a folder written by save_to_disk has neither name nor revision; leave them out")
    if not isinstance(loaded, dict):
        if source.split != "train":
            raise UserError(f"{where}: the folder holds one data set without splits; leave split out")
        return loaded
    if source.split not in loaded:
        raise UserError(f"{where}: no such split; it has {', '.join(loaded)}")
    return loaded[source.split]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
