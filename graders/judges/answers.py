"""What a judge answered, read as a number or a label.

Covered: the hosted structure as JSON, at the end too, in a fenced block or bare (`{"steps": …, "result": 0.7}`, or one
of `score`, `rating`, `reward`, `grade`, `label`, `verdict`, `classification` in place of `result`, in any capitals);
and, from servers that enforce no structure, the bare number or label that most prompts ask for, alone or on the last
line: `0.7`, `**7**`, `Score: 0.7`, `So the final score is 0.7 points.`, `- Score: 0.7 (good)`, `Rating: [[7]]`,
`"good"`, `(A)`, `\\boxed{0.7}`, `<score>0.7</score>`; a fraction of the range (`8/10`, `4 (out of 5)`) and per cent of
it. What closes reasoning (`</think>`) and all before it is passed over.
Not covered, and no result: numbers inside sentences (`I give it 0.9.`) and JSON anywhere but at the end, which may be
quotations of what is judged; numbers under a name that is not the score's (`Confidence: 0.9`, `Style: 0.7`); JSON that
was cut off; decimal commas; numbers in words.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = r"[-+\u2212]?(?:[0-9]{1,15}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,3})?"
_RESULT_KEYS = ("result", "score", "rating", "reward", "grade", "label", "verdict", "classification")
_BULLET = re.compile(r"(?:[-\u2022]|[0-9]{1,2}[.)])\s+(?=[^\d\s])")
_LABEL = re.compile(
    r"(?:(?:so|thus|therefore|hence|the|my|your|final|overall|total|numeric(?:al)?|assigned)\b,?\s+)*"
    r"(?:score|rating|grade|result|reward|label|verdict|classification|category|answer|output|decision|judge?ment"
    r"|points|final|total)"
    r"\s*(?:\([^()]*\)|\[[^\[\]]*\])?\s*(?:[:\uff1a=]|(?:is|=)\b(?:\s+(?:therefore|thus)\b)?:?|-(?=\s))\s*",
    re.IGNORECASE,
)
_SCORE = re.compile(
    rf"(?P<number>{_NUMBER})(?:\s*(?P<percent>%)|\s*\(?\s*(?:/|out\s+of)\s*(?P<of>{_NUMBER})\)?)?(?:\s+points?)?"
)
_REMARK = re.compile(r"(?<=\S)\s+\([^()0-9]*\)$")
"""Words in parentheses behind the result; with a figure in them they may change what it means."""
_TAGS = re.compile(r"</?[A-Za-z_]+>")
_CLOSING_TAGS = re.compile(r"(?<!\s)(?:\s*</[A-Za-z_]+>)+\s*$")
_LINE_WITH_BRACE = re.compile(r"^[ \t]*(\{)", re.MULTILINE)
_MOST_TRIED = 20
_LONGEST_RESULT = 2000
"""A longer text says no number and is not looked through for a label: patterns would take for ever over it."""
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def answer_of(text: str) -> Mapping[str, Any]:
    """The judge's answer as an object; of a bare one, `result` is its last line, without what decorates it."""
    text = text.rpartition("</think>")[2].strip()
    if text.endswith("```"):
        block = text.removesuffix("```").rpartition("```")[2].strip()
        block = block[len("json") :] if block[:4].lower() == "json" else block
        if (answer := _object(block)) is not None:
            return _with_result(answer)
        if text.count("```") == 2 and text.startswith("```"):
            text = block.strip()
    answer = _object_at_end(text)
    return {"result": _last_line(text)} if answer is None else _with_result(answer)


def _with_result(answer: dict[str, Any]) -> dict[str, Any]:
    """With `result`, where another key says it; of several the first of `_RESULT_KEYS`."""
    by_name = {key.lower(): value for key, value in reversed(answer.items())}
    told = [name for name in _RESULT_KEYS if name in by_name]
    return {**answer, "result": by_name[told[0]]} if told and "result" not in answer else answer


def score_of(result: Any, bounds: tuple[float, float]) -> float | None:
    """The finite number that a result says, not yet clamped to `bounds`; None where it says none."""
    if isinstance(result, bool):
        return None
    if isinstance(result, int):
        # A whole number may be too long for a float.
        return float(min(max(result, -(10**300)), 10**300))
    if isinstance(result, float):
        return result if math.isfinite(result) else None
    if not isinstance(result, str) or len(result) > _LONGEST_RESULT:
        return None
    if (read := _SCORE.fullmatch(_undecorated(result))) is None:
        return None
    number, (low, high) = _float(read["number"]), bounds
    if read["percent"]:
        # Of a range such as [0, 1] or [0, 100]; of any other, nobody knows of what.
        number = number / 100 * high if low == 0 else math.nan
    elif read["of"]:
        whole = _float(read["of"])
        number = number if whole == high else number / whole * high if low == 0 and whole > 0 else math.nan
    return number if math.isfinite(number) else None


def label_of(result: Any, labels: Sequence[str]) -> str | None:
    """The label that a result names: as it stands or, where only one fits, in other capitals; None without one."""
    if not isinstance(result, str):
        return None
    for said in (result, *([_undecorated(result)] if len(result) <= _LONGEST_RESULT else [])):
        if said in labels:
            return said
        alike = [label for label in labels if label.casefold() == said.casefold()]
        if len(alike) == 1:
            return alike[0]
    return None


def _object_at_end(text: str) -> dict[str, Any] | None:
    """The object that the text is, or that begins on a line of its own and ends with the text."""
    if not text.endswith("}"):
        return None
    starts = [match.start(1) for match in _LINE_WITH_BRACE.finditer(text)]
    return next((found for start in starts[:_MOST_TRIED] if (found := _object(text[start:])) is not None), None)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _last_line(text: str) -> str:
    """As it stands where it is too long for a result."""
    end = text[-_LONGEST_RESULT:]
    line = _CLOSING_TAGS.sub("", end).rpartition("\n")[2].strip()
    return line if len(text) <= _LONGEST_RESULT or "\n" in end else text.rpartition("\n")[2]


def _undecorated(line: str) -> str:
    """Without emphasis, tags, a bullet and `Score:` before it, a full stop, brackets and remarks behind it."""
    line = re.sub(r"[*`#$]", "", _TAGS.sub("", _BOXED.sub(r"\1", line))).strip(" \t_>")
    line = _BULLET.sub("", line, count=1) if _BULLET.match(line) else line
    line = line[head.end() :] if (head := _LABEL.match(line)) else line
    line = _REMARK.sub("", line.strip())
    line = re.sub(r"[.!]$", "", line.strip(" \t_\"'")).strip(" \t_\"'")
    bare = line.strip("[]() ")
    return bare if bare and not re.search(r"[\[\]()]", bare) else line


def _float(text: str) -> float:
    return float(text.replace("\u2212", "-"))
