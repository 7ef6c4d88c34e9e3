"""What a user's own grader may give as a score: one rule for `python` and `custom` graders."""

from __future__ import annotations

import math
from typing import Any


def score_of(value: Any, who: str) -> float:
    """The score as a float: numbers, truth values, and whatever else says itself what float it is.

    Covered: NumPy's and torch's scalars and arrays without axes, decimals, fractions, sympy's numbers. Raises
    `ValueError` that names `who` gave it for anything else, text and arrays with axes included, and for what is not
    finite.
    """
    has_axes = getattr(value, "ndim", 0) != 0
    if has_axes or not any(hasattr(type(value), name) for name in ("__float__", "__index__")):
        raise ValueError(f"{who} gave {type(value).__name__}; expected a number")
    try:
        score = float(value)
    except TypeError as e:
        # An expression with a variable left in it, say.
        raise ValueError(f"{who} gave {type(value).__name__}; expected a number: {e}") from None
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise ValueError(f"{who} gave {score}; expected a finite number")
    return score
