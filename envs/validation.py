"""What pydantic found wrong with what a user wrote, told on one screen."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from envs.errors import nearest
from envs.reading.variables import NAME
from envs.secrets import without_secrets
from envs.user_code import TARGET_PATTERN

_MOST_LINES = 20
_MAX_VALUE_CHARS = 200
_URL = "expected a URL that begins with http:// or https://, or a ${NAME} that holds one"
_PATTERNS = {
    r"^(https?://|\$\{)": _URL,
    r"^(https?://.+|\$\{.+|engine)$": f"{_URL}, or engine",
    TARGET_PATTERN: "expected `package.module:Name` or `path/to/file.py:name`",
    NAME: "expected the name of an environment variable",
}
"""What the patterns of our settings ask for."""


def validation_problems(
    what: str, error: ValidationError, root: type[BaseModel] | None = None, given: Any = None
) -> str:
    """Every bad key as it stands in the file, what was expected and, for an unknown one, the nearest known key.

    `root` is the section that was validated; without it keys are named as pydantic names them. `given` is what stood
    there as it was written: where that is the path of a file for what was found wrong, the file is named.
    """
    problems = _one_for_each_key([_problem(details, root, given) for details in error.errors()])
    lines = [f"{what}: {len(problems)} problem{'s' * (len(problems) > 1)}", *(f"  {problem}" for problem in problems)]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  ... and {len(lines) - _MOST_LINES} more"]
    return "\n".join(lines)


def _one_for_each_key(found: Sequence[tuple[str, str, str]]) -> list[str]:
    """Of (key, expected, got): pydantic says of each thing that a key may hold why it is not that one.

    What is wrong within one of them tells more than that the whole is none of the others.
    """
    expected: dict[tuple[str, str], list[str]] = {}
    for key, wanted, got in found:
        if not any(other.startswith(f"{key}.") for other, _, _ in found if key):
            words = expected.setdefault((key, got), [])
            words += [wanted] if wanted not in words else []
    return [
        (f"{key}: " if key else "") + "; or: ".join(words) + (f" (got {got})" if got else "")
        for (key, got), words in expected.items()
    ]


def _problem(details: ErrorDetails, root: type[BaseModel] | None, given: Any) -> tuple[str, str, str]:
    """(key, what was expected, what was got)."""
    location, missing = details["loc"], details["type"] == "missing"
    lacks_items = missing and isinstance(location[-1], int)
    key, section, held = _locate(location[:-1] if lacks_items else location, root)
    file = _file_of(given, key, details["input"])
    where = f"; in {file}" if file and file not in details["msg"] else ""
    if details["type"] == "extra_forbidden":
        return key, f"unknown key{_suggestion(key, section)}{where}", ""
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{key}.type" if key else "type", f"{_of_types(details, held)}{where}", ""
    if lacks_items:
        expected = f"expected {_length_of(held)} values"
    elif missing:
        return key, f"required, but not given{where}", ""
    else:
        expected = _expected(details, held)
    value = "" if isinstance(details["input"], dict) else repr(_shown_at(location, details["input"]))
    shown = value if len(value) <= _MAX_VALUE_CHARS else f"{value[:_MAX_VALUE_CHARS]} ..."
    return key, f"{expected}{where}", shown


def _expected(details: ErrorDetails, held: Any) -> str:
    """pydantic's words, but for those that speak of its own classes or of regular expressions."""
    if details["type"] in ("model_type", "model_attributes_type"):
        return details["msg"].partition(" or ")[0]
    if details["type"] == "path_type":
        return "expected a path"
    if details["type"] in ("tuple_type", "too_long") and (length := _length_of(held)):
        return f"expected {length} values"
    if details["type"] == "string_pattern_mismatch":
        return _PATTERNS.get(details["ctx"]["pattern"], details["msg"])
    return details["msg"].removeprefix("Value error, ")


def _of_types(details: ErrorDetails, held: Any) -> str:
    """Which `type` a section of several kinds may have."""
    known = [tag for member in _sections_in(held) if (tag := _tag(member))]
    tags = details["ctx"].get("expected_tags") or ", ".join(map(repr, known))
    # What stands in brackets is no section, as in a location.
    expected = ", ".join(tag for tag in tags.split(", ") if "[" not in tag)
    if details["type"] == "union_tag_not_found":
        return f"required, one of {expected}"
    tag = str(details["ctx"].get("tag"))
    return f"expected one of {expected} (got {tag!r}){nearest(tag, known or expected.replace(chr(39), '').split(', '))}"


def _file_of(given: Any, key: str, found: Any) -> str:
    """The path that stands in `given` on the way to `key`, where what was found wrong was read from that file."""
    for step in key.split(".") if key else ():
        if isinstance(given, str):
            return given
        try:
            given = given[int(step)] if isinstance(given, list) else given[step]
        except (KeyError, IndexError, TypeError, ValueError):
            return ""
    return given if isinstance(given, str) and given != found else ""


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


def _locate(location: Sequence[str | int], root: type[BaseModel] | None) -> tuple[str, type[BaseModel] | None, Any]:
    """The key as it stands in the file, the section that holds it, and what it may hold.

    pydantic's location names union members too.
    """
    keys: list[str] = []
    section: type[BaseModel] | None = None
    held: Any = root
    parts = [str(part) for part in location if "[" not in str(part)]
    while parts:
        members = {_tag(member): member for member in _sections_in(held)}
        if len(members) > 1:
            inner = members.get(parts.pop(0))
        else:
            inner = next(iter(members.values()), None)
            if parts[0] in _alternatives(held):
                parts.pop(0)
        if not parts:
            break
        section = inner
        keys.append(parts.pop(0))
        field = section.model_fields.get(keys[-1]) if section else None
        held = field.annotation if field else _values_of(held)
    return ".".join(keys), section, held


def _length_of(annotation: Any) -> int:
    """How many values a field holds, where it always holds as many; else 0."""
    if get_origin(annotation) is tuple:
        return len(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return max(map(_length_of, get_args(annotation)))
    return 0


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


def _alternatives(annotation: Any) -> set[str]:
    """The names by which pydantic tells apart what a field may hold: text or a section, say."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, UnionType):
        return set()
    return {getattr(member, "__name__", "") for member in get_args(annotation)}


def _values_of(annotation: Any) -> Any:
    """What a mapping or a list holds; None for anything else."""
    return get_args(annotation)[-1] if get_origin(annotation) in (dict, list) else None
