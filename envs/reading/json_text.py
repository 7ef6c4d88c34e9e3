"""JSON that a model or a user wrote, read without surprises; and JSON that everyone can read, written."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_MAX_DEPTH = 200
_TOO_DEEP = f"nested more than {_MAX_DEPTH} deep"
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(text: str, *, finite: bool = True) -> Any:
    """The value. Raises `ValueError`, in words for whoever wrote the text, for all that Python can't read or hold.

    `finite` refuses NaN and infinite numbers (1e999), which Python takes and JSON has not: no server could read them.
    """
    try:
        return _FINITE.decode(text) if finite and text[:1] != "\ufeff" else json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg}") from None
    except (ValueError, RecursionError):
        # Integers of thousands of digits, lists nested a thousand deep, numbers that are not finite.
        raise ValueError("not usable JSON") from None


def write_json(value: Any, **options: Any) -> str:
    """`json.dumps`, but null for NaN and infinity: Python writes bare words for them, which are no JSON."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        # Rare, and looking at every number first would cost as much as writing it.
        return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_without_nan(key): _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_strict_json(text: str) -> Any:
    """The value of a JSON text, strictly: what servers and tokenizers can't take is no value.

    Refused, where Python's reader lets it pass: NaN and Infinity, numbers beyond a float's range, integers of more than
    4,300 digits, values nested more than 200 deep, half of a surrogate pair, a key that stands twice in an object (of
    which Python keeps the last, other readers the first). Raises `ValueError` that says what.
    """
    try:
        value = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole, object_pairs_hook=_distinct
        )
    except json.JSONDecodeError as e:
        hint = "; expected the whole object on one line" if e.doc.strip() == "{" else ""
        place = f"column {e.colno}" if e.lineno == 1 else f"line {e.lineno}, column {e.colno}"
        raise ValueError(f"not valid JSON: {e.msg} at {place}{hint}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Rarely needed, and a walk through every value costs as much as reading it did.
    if text.count("[") + text.count("{") > _MAX_DEPTH or "\\ud" in text.lower():
        _check_values(value)
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice[:60]}: the key stands twice in one object; expected it once")
    return value


def _whole(number: str) -> int:
    try:
        return int(number)
    except ValueError:
        raise ValueError(f"an integer of {len(number):,} digits; expected one of at most 4,300") from None


def _check_values(value: Any) -> None:
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    while waiting:
        place, inner, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        texts = [inner] if isinstance(inner, str) else list(inner) if isinstance(inner, dict) else []
        if halves := [text for text in texts if _SURROGATE.search(text)]:
            at = _SURROGATE.search(halves[0])
            assert at is not None
            raise ValueError(
                f"{place or 'value'}: holds half of a surrogate pair (\\u{ord(at[0]):04x}), which is no character"
            )
        if isinstance(inner, dict):
            waiting += [(f"{place}.{key}".lstrip("."), v, depth + 1) for key, v in inner.items()]
        elif isinstance(inner, list):
            waiting += [(f"{place}[{i}]", v, depth + 1) for i, v in enumerate(inner)]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON; expected a number or null")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is beyond the range of numbers")
    return value


_FINITE = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
"""What `json.loads`, which refuses a byte order mark besides, makes anew for every text."""
