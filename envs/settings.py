"""The base of every group of settings: what all of them refuse, and the one way for a setting that goes on as JSON."""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError


class Settings(BaseModel):
    """Settings of a user's: unknown keys, NaN, infinite numbers, yes or no in a number's place and texts with a NUL,
    which no path and no program's argument may hold, are refused; values cannot change after loading.

    Where a subclass has another rule for unknown keys, it says so at its head: `class Row(Settings, extra="ignore")`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_truth_values(cls, data: Any) -> Any:
        """Which pydantic would read as 1 and 0."""
        given = data if isinstance(data, dict) else {}
        wrong = [
            InitErrorDetails(type=_TRUTH_VALUE, loc=(key,), input=given[key])
            for key in _numbers_of(cls)
            if key in given and _holds_truth(given[key])
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data

    @field_validator("*")
    @classmethod
    def _has_no_nul(cls, value: Any) -> Any:
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str | Path) and "\0" in str(text) for text in texts):
            raise ValueError("holds a NUL character; expected a text without")
        for path in texts:
            if isinstance(path, Path):
                try:
                    os.fsencode(path)
                except UnicodeEncodeError:
                    raise ValueError(
                        "holds half of a surrogate pair, as JSON's escapes for an emoji are read in YAML; expected the "
                        "character itself"
                    ) from None
        return value


class WorldSettings(Settings):
    """Settings of a world."""

    type: str

    @property
    def expert_reasons(self) -> bool:
        """Whether the scripted expert writes reasoning, which a model needs a reasoning parser for."""
        return False


@runtime_checkable
class AsksServers(Protocol):
    """Settings that name servers of others."""

    def servers(self) -> Mapping[str, str]:
        """Their URLs as they are written, by the keys that hold them; somebody has to answer there before a run."""
        ...


def by_type(settings: Mapping[str, type[Settings]], *, without_type: str) -> Any:
    """The union of settings that a config tells apart by `type`; those that name none are of `without_type`."""

    def type_of(value: Any) -> str:
        given = value.get("type", without_type) if isinstance(value, dict) else getattr(value, "type", without_type)
        return str(given)

    def no_word(value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"expected settings, such as {{type: {value}, ...}}")
        return value

    tagged: Any = [Annotated[one, Tag(name)] for name, one in settings.items()]
    return Annotated[functools.reduce(operator.or_, tagged), Discriminator(type_of), BeforeValidator(no_word)]


_TRUTH_VALUE = PydanticCustomError("truth_value", "expected a number, not true or false (yes, no, on and off are such)")


@functools.cache
def _numbers_of(settings: type[Settings]) -> tuple[str, ...]:
    """The keys that take numbers, worked out once."""
    return tuple(key for key, field in settings.model_fields.items() if _is_number(field.annotation))


def _holds_truth(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, bool) or any(map(_holds_truth, inner))


def _is_number(annotation: Any) -> bool:
    """Whether numbers are taken, alone or in a list or mapping, and nothing that may be true or false."""
    leaves = _leaves(annotation)
    return bool(leaves & {int, float}) and leaves <= {int, float, str, Path, type(None)}


def _leaves(annotation: Any) -> set[Any]:
    """What the values of a type are at their innermost; those of a Literal are their types."""
    inner, origin = typing.get_args(annotation), typing.get_origin(annotation)
    if origin is Literal:
        return set(map(type, inner))
    if origin is Annotated:
        return _leaves(inner[0])
    if origin in (dict, Mapping):
        return _leaves(inner[1])
    return set().union(*map(_leaves, inner)) if inner else {annotation}


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e} (YAML reads 2024-01-31 as a date; put such a text in quotes)") from None
    return value


def _has_finite_numbers(value: dict[str, Any]) -> dict[str, Any]:
    waiting: list[Any] = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, float) and not math.isfinite(inner):
            raise ValueError(f"Input should be a finite number (got {inner})")
        waiting += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
    return value


Kwargs = Annotated[dict[str, Any], AfterValidator(_has_finite_numbers)]
"""What the user's own code is called with: all that YAML has, dates included, but NaN and infinite numbers."""

JsonObject = Annotated[dict[str, Any], AfterValidator(_is_json)]
"""What goes on as JSON, though YAML has more than that: dates, sets, NaN."""
