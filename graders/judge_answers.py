"""What a judge answered, read as a number or a label.

Covered: the hosted structure as JSON, in a fenced block at the end too (`{"steps": …, "result": 0.7}`, or `score` in
place of `result`); and, from servers that enforce no structure, the bare number or label that most prompts ask for,
alone or on the last line: `0.7`, `**7**`, `Score: 0.7`, `The final score is 4.`, `"good"`, `\\boxed{0.7}`,
`<score>0.7</score>`; a fraction of the range (`8/10`, `4 out of 5`) and per cent of it. What closes reasoning
(`</think>`) and all before it is passed over.
Not covered, and no result: numbers inside sentences (`I give it 0.9.`) and JSON anywhere but at the end, which may be
quotations of what is judged; JSON that was cut off; decimal commas; numbers in words.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = r"[-+\u2212]?(?:[0-9]{1,15}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,3})?"
_LABEL = re.compile(
    r"(?:(?:the|my|final|overall|total)\s+)*(?:score|rating|grade|result|reward|label|verdict|classification|answer)"
    r"\s*(?:\([^()]*\))?\s*(?::|=|is\b:?|-(?=\s))\s*",
    re.IGNORECASE,
)
_SCORE = re.compile(rf"(?P<number>{_NUMBER})(?:\s*(?P<percent>%)|\s*(?:/|out\s+of)\s*(?P<of>{_NUMBER}))?")
_TAGS = re.compile(r"</?[A-Za-z_]+>")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def answer_of(text: str) -> Mapping[str, Any]:
    """The judge's answer as an object; of a bare one, `result` is its last line, without what decorates it."""
    text = text.rpartition("</think>")[2].strip()
    answer = _object(text)
    if answer is None and text.endswith("```"):
        block = text.removesuffix("```").rpartition("```")[2]
        answer = _object(block.removeprefix("json"))
        if answer is None and text.count("```") == 2 and text.startswith("```"):
            text = block.strip()
    if answer is None:
        return {"result": _last_line(text)}
    return answer if "result" in answer or "score" not in answer else {**answer, "result": answer["score"]}


def score_of(result: Any, bounds: tuple[float, float]) -> float | None:
    """The finite number that a result says, not yet clamped to `bounds`; None where it says none."""
    if isinstance(result, bool):
        return None
    if isinstance(result, int):
        # A whole number may be too long for a float.
        return float(min(max(result, -(10**300)), 10**300))
    if isinstance(result, float):
        return result if math.isfinite(result) else None
    if not isinstance(result, str) or (read := _SCORE.fullmatch(_undecorated(result))) is None:
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
    for said in (result, _undecorated(result)):
        if said in labels:
            return said
        alike = [label for label in labels if label.casefold() == said.casefold()]
        if len(alike) == 1:
            return alike[0]
    return None


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _last_line(text: str) -> str:
    return text.rpartition("\n")[2].strip()


def _undecorated(line: str) -> str:
    """Without emphasis, tags, `Score:` before it and a full stop behind it."""
    line = re.sub(r"[*`#$]", "", _TAGS.sub("", _BOXED.sub(r"\1", line))).strip(" \t_>")
    line = line[head.end() :] if (head := _LABEL.match(line)) else line
    return line.strip(" \t_\"'").removesuffix(".").strip(" \t_\"'")


def _float(text: str) -> float:
    return float(text.replace("\u2212", "-"))
