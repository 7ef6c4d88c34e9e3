"""YAML → a validated config. Every mistake is a `UserError` that names file and key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from envs.errors import UserError, told_of
from envs.reading.documents import apply_override, read_document
from envs.validation import validation_problems
from graders.build import check_grader
from trainer.config.run import RunConfig

_BASE = "base"
_MOST_BASES = 20
"""Below one another: far more than anybody can follow."""
_WITHOUT_TYPE = {"loss": "clipped", "world": "remote", "engine": "local"}
"""Of which type a section is that names none."""


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config, on the one that it names as its `base`, and apply `key.sub=value` overrides.

    Values of overrides are YAML. Raises `UserError`.
    """
    data, files = _on_its_base(path, ())
    _override(data, overrides or [])
    return validate_config(data, source=", on ".join(map(str, files)))


def read_sections(path: Path | None, overrides: list[str]) -> dict[str, Any]:
    """The sections as they are given, not yet validated: the YAML's on its base, if there is one, under the overrides.

    Raises `UserError`.
    """
    data = {} if path is None else _on_its_base(path, ())[0]
    _override(data, overrides)
    return data


def _override(data: dict[str, Any], overrides: list[str]) -> None:
    for override in overrides:
        apply_override(data, override)
    if _BASE in data:
        raise UserError(f"override {_BASE}={data[_BASE]}: a config names its base in its file; give that as --config")


def _on_its_base(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """The sections of `path`, which `above` name as their base, and the files that they come from, `path` first."""
    chain = (*above, path)
    if len(above) > _MOST_BASES:
        raise UserError(
            f"config {chain[0]}: {_BASE}: more than {_MOST_BASES} configs, each on the next; expected fewer"
        )
    with told_of(f"config {above[-1]}: {_BASE}" if above else ""):
        data = read_document(path, f"config {path}")
    if path.resolve() in [file.resolve() for file in above]:
        raise UserError(f"config {chain[0]}: {_BASE}: goes in a circle: {' → '.join(map(str, chain))}")
    if not isinstance(data, dict):
        raise UserError(f"config {path}: expected a mapping of sections, got {type(data).__name__}")
    base = data.pop(_BASE, None)
    if base is None:
        return data, [path]
    if not isinstance(base, str):
        raise UserError(f"config {path}: {_BASE}: expected the path of a config from this one's folder, got {base!r}")
    below, files = _on_its_base(path.parent / base, chain)
    sections = {key: _merged(below[key], data[key], key) if key in below else data[key] for key in data}
    return below | sections, [path, *files]


_VALUES = {"kwargs", "weights", "response_format", "chat_template_kwargs", "question_mix", "headers", "env", "bind"}
"""Mappings that are one value: half of one and half of another would be what nobody wrote."""


def _merged(below: Any, above: Any, section: str = "") -> Any:
    """Mappings key by key; everything else, and a mapping of another `type`, takes the place of what was there."""
    if not isinstance(below, dict) or not isinstance(above, dict) or section in _VALUES:
        return above
    types = [one.get("type", _WITHOUT_TYPE.get(section)) for one in (below, above)]
    if "type" in above and types[0] != types[1]:
        return above
    return below | {key: _merged(below[key], value, key) if key in below else value for key, value in above.items()}


def laid_over(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` by dotted key, where each that is a mapping lies on what the config has there, as on a `base:`."""
    sections = read_sections(path, [])
    laid: dict[str, Any] = {}
    for key, value in settings.items():
        below: Any = sections
        for word in key.split("."):
            below = below.get(word) if isinstance(below, dict) else None
        laid[key] = _merged(below, value, key.rpartition(".")[2])
    return laid


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
