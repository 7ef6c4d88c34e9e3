"""JSON that a model wrote, read without surprises."""

from __future__ import annotations

import json
import math
from typing import Any


def read_json(text: str, *, finite: bool = True) -> Any:
    """The value. Raises `ValueError`, in words for whoever wrote the text, for all that Python can't read or hold.

    `finite` refuses NaN and infinite numbers (1e999), which Python takes and JSON has not: no server could read them.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite) if finite else json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg}") from None
    except (ValueError, RecursionError):
        # Integers of thousands of digits, lists nested a thousand deep, numbers that are not finite.
        raise ValueError("not usable JSON") from None


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)
