"""What pydantic found wrong with what a user wrote, told on one screen."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from envs.secrets import without_secrets

_MOST_LINES = 20
_MAX_VALUE_CHARS = 200


def on_one_screen(what: str, error: ValidationError, root: type[BaseModel] | None = None) -> str:
    """Every bad key as it stands in the file, what was expected and, for an unknown one, the nearest known key.

    `root` is the section that was validated; without it keys are named as pydantic names them.
    """
    lines = [f"{what}: {error.error_count()} problem{'s' * (error.error_count() > 1)}"]
    lines += [f"  {_problem(details, root)}" for details in error.errors()]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  ... and {len(lines) - _MOST_LINES} more"]
    return "\n".join(lines)


def _problem(details: ErrorDetails, root: type[BaseModel] | None) -> str:
    key, section = _locate(details["loc"], root)
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(key, section)}"
    if details["type"] == "missing":
        return f"{key}: required, but not given"
    value = "" if isinstance(details["input"], dict) else repr(_shown_at(details["loc"], details["input"]))
    shown = value if len(value) <= _MAX_VALUE_CHARS else f"{value[:_MAX_VALUE_CHARS]} ..."
    message = details["msg"].removeprefix("Value error, ")
    return (f"{key}: " if key else "") + message + (f" (got {shown})" if shown else "")


def _shown_at(location: Sequence[str | int], value: Any) -> Any:
    """What was given, without the secret that the keys around it speak of."""
    path: list[Any] = [part for part in location if isinstance(part, str)][-2:]
    if location and isinstance(location[-1], int):
        path.append(0)
    for key in reversed(path):
        value = {key: value} if isinstance(key, str) else [value]
    shown = without_secrets(value)
    for key in path:
        shown = shown[key]
    return shown


def _locate(location: Sequence[str | int], root: type[BaseModel] | None) -> tuple[str, type[BaseModel] | None]:
    """The key as it stands in the file, and the section that holds it; pydantic's location names union members too."""
    keys: list[str] = []
    section: type[BaseModel] | None = None
    held: Any = root
    parts = [str(part) for part in location if "[" not in str(part)]
    while parts:
        members = {_tag(member): member for member in _sections_in(held)}
        inner = members.get(parts.pop(0)) if len(members) > 1 else next(iter(members.values()), None)
        if not parts:
            break
        section = inner
        keys.append(parts.pop(0))
        field = section.model_fields.get(keys[-1]) if section else None
        held = field.annotation if field else _values_of(held)
    return ".".join(keys), section


def _tag(section: type[BaseModel]) -> str:
    field = section.model_fields.get("type")
    return str(get_args(field.annotation)[0]) if field else ""


def _suggestion(key: str, section: type[BaseModel] | None) -> str:
    """The known keys nearest to an unknown one."""
    if section is None:
        return ""
    near = difflib.get_close_matches(key.rpartition(".")[2], section.model_fields, n=1)
    known = ", ".join(sorted(section.model_fields))
    return f"; did you mean {near[0]}?" if near else f"; known keys: {known}"


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section that a field holds, or the members of its union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for member in get_args(annotation):
            yield from _sections_in(member)


def _values_of(annotation: Any) -> Any:
    """What a mapping or a list holds; None for anything else."""
    return get_args(annotation)[-1] if get_origin(annotation) in (dict, list) else None
