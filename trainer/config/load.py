"""YAML → a validated config. Every mistake is a `UserError` that names file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from envs.errors import UserError, told_of
from envs.reading.documents import apply_override, read_document
from envs.validation import validation_problems
from graders.build import check_grader
from trainer.config.run import RunConfig


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config and apply `key.sub=value` overrides (values are YAML). Raises `UserError`."""
    return validate_config(read_sections(path, overrides or []), source=str(path))


def read_sections(path: Path | None, overrides: list[str]) -> dict[str, Any]:
    """The sections as they are given, not yet validated: the YAML's, if there is one, under the overrides.

    Raises `UserError`.
    """
    data = {} if path is None else _read_sections(path)
    for override in overrides:
        apply_override(data, override)
    return data


def _read_sections(path: Path) -> dict[str, Any]:
    data = read_document(path, f"config {path}")
    if not isinstance(data, dict):
        raise UserError(f"config {path}: expected a mapping of sections, got {type(data).__name__}")
    return data


def validate_config(data: dict[str, Any], *, source: str) -> RunConfig:
    """Raises `UserError` that names every bad key, what was expected and the nearest known key."""
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as e:
        raise UserError(validation_problems(f"config {source}", e, RunConfig, data)) from None
    for key, grader in (("grader", config.grader), ("watch_grader", config.watch_grader)):
        if grader is not None:
            file = f", in {data[key]}" if isinstance(data.get(key), str) else ""
            with told_of(f"config {source}: {key}{file}"):
                check_grader(grader)
    return config
