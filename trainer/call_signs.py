"""Whether a turn without a parsed call tried to make one: told apart from answers that quote or mention calls."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from envs.json_text import read_json

_TAG = re.compile(r"\s*(<[^<>\s{}]+>|\[[A-Z_]{3,}\])")
# <tool_call>, <|tool_call..., also cut off or misspelt; the opening tags of other dialects.
_OPENING = re.compile(
    r"<[|｜]?\s?(?:tool|function)[_▁ ]?call(?:[\w▁]*[|｜]?>|(?=[^\w▁>]|$))"
    r"|<function=|<(?:｜DSML｜)?invoke name=|\[TOOL_CALLS\]|<\|python_tag\|>",
    re.I,
)
_CLOSING = re.compile(r"</\|?\s?tool[_ ]?call\w*\|?>|<\|?/tool[_ ]?call\w*\|?>", re.I)
# Code that an answer quotes; a fence is also how untrained models wrap a call, so only its marks are dropped.
_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_FENCE = re.compile(r"```\w*")
_NAME_KEYS = ("name", "tool", "tool_name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_BARE = re.compile(
    rf"""\{{\s*["']?(?:{"|".join(_NAME_KEYS)})["']?\s*:\s*(?P<first>["'][^"']*["'])\s*,
          \s*["']?(?:{"|".join(_ARGUMENT_KEYS)})["']?\s*:
      | \{{\s*["'](?:arguments|parameters)["']\s*:.*?["']name["']\s*:\s*(?P<last>["'][^"']*["'])
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_ANY_TAG = re.compile(r"<[^<>{}]*>")
_WHOLE_TURN = re.compile(r"""[\s\[]*\{\s*["']name["']\s*:\s*["'][^"']*["']\s*,\s*["']arguments["']\s*:\s*\{""", re.I)
_PROSE = re.compile(r"(?:[ \t]+(?P<word>[^\W\d_]+)|[.,;:!?)\"'*/]+(?:[\s<]|$))")


def after_reasoning(text: str, ends: Sequence[str]) -> str:
    """What follows the first of `ends`, the tags that close reasoning.

    The whole text where none stands in it, and where nothing follows: then there is nothing else in the turn.
    """
    found = [(at, end) for end in ends if (at := text.find(end)) >= 0]
    if not found:
        return text
    at, end = min(found)
    after = text[at + len(end) :]
    return after if after.strip() else text


def is_attempt(text: str, names: Sequence[str], markers: Sequence[str] = ()) -> bool:
    """Whether `text`, in which no call was parsed, tried to call one of the tools `names`.

    `markers` are the tags that open a call under the template in use.

    *Covered*: tags of calls, whole or cut or misspelt, of this dialect or another; a bare call in JSON, in Python or as
    `tool {...}`, in tags of whatever name, cut short too. Not an attempt: tags or calls quoted as code (unless nothing
    else is in the turn), a tag that prose in any script only mentions, a call in the midst of an answer, JSON that is
    more than a call or whose `name` is no tool's. *Not covered*: unmarked text that describes a call in words, which is
    an answer.
    """
    spoken = _QUOTED.sub(" ", text)
    bare = _FENCE.sub("", text)
    if not spoken.strip():
        spoken = bare = bare.strip("`\n ")
    return _has_tag(spoken, names, markers) or _is_bare_json(bare, names) or _is_named(bare, names)


def _has_tag(text: str, names: Sequence[str], markers: Sequence[str]) -> bool:
    openings = [m.span() for m in _OPENING.finditer(text)]
    openings += [m.span() for marker in markers for m in re.finditer(re.escape(marker), text)]
    for start, end in openings:
        prose = _PROSE.match(text, end)
        if prose is None and _is_amid_other_script(text, start, end):
            continue
        if prose is None or prose["word"] in names:
            return True
    closings = [m.span() for m in _CLOSING.finditer(text)]
    return any(
        text[:start].rstrip().endswith(("}", "]", ">"))
        or not (_PROSE.match(text, end) or _is_amid_other_script(text, start, end))
        for start, end in closings
    )


def _is_amid_other_script(text: str, start: int, end: int) -> bool:
    """Whether a tag stands in words or quotes of a script that sets no spaces (Chinese) or other marks (« », 「 」)."""
    return bool(text[:start].strip()) and text[end : end + 1] > "\x7f"


def opening_tag(call_text: str, name: str, elsewhere: Sequence[str]) -> str:
    """The first tag of `call_text`, a call of `name` as the template writes it, that no turn without calls holds.

    `elsewhere` are such turns. Empty where calls have no tag of their own.
    """
    tags = (match.group(1) for match in _TAG.finditer(call_text))
    return next((tag for tag in tags if name not in tag and not any(tag in text for text in elsewhere)), "")


def tag_after(text: str, probe: str) -> str:
    """The tag that follows `probe` in `text`, which closes what the probe stands in; empty without one."""
    at = text.find(probe)
    match = _TAG.match(text, at + len(probe)) if at >= 0 else None
    return match.group(1) if match else ""


def _is_bare_json(text: str, names: Sequence[str]) -> bool:
    """A call in JSON without its tags, which begins or ends the turn."""
    with contextlib.suppress(ValueError):
        return _is_call(read_json(text), names)
    if _WHOLE_TURN.match(text) or _is_cut_short(text, names):
        return True
    for found in _BARE.finditer(text):
        if (found["first"] or found["last"]).strip("\"'") not in names or _end(text, found.start()) < found.end():
            continue
        begins = not _ANY_TAG.sub("", text[: found.start()]).strip(" \t\n[(")
        after = _ANY_TAG.sub("", text[_end(text, found.start()) :])
        if begins or not after.strip(" \t\n])}.;,"):
            return True
    return False


def _is_call(value: Any, names: Sequence[str]) -> bool:
    """Whether a turn that is this JSON and nothing else is a call, or several."""
    if isinstance(value, list):
        return bool(value) and all(_is_call(one, names) for one in value)
    if not isinstance(value, dict):
        return False
    if value.keys() == {"tool_calls"} or value.keys() - {"type", "id"} == {"function"}:
        inner = value.get("tool_calls", value.get("function"))
        return isinstance(inner, dict | list) and _is_call(inner, names)
    if value.keys() == {"name", "arguments"} and isinstance(value["arguments"], dict):
        return True  # whatever it names
    name = next((value[key] for key in _NAME_KEYS if key in value), None)
    arguments = [key for key in _ARGUMENT_KEYS if key in value]
    if name not in names or not arguments:
        return False
    is_usual = "name" in value and arguments[0] in ("arguments", "parameters")
    return is_usual or value.keys() <= {*_NAME_KEYS, *_ARGUMENT_KEYS, "type", "id"}


def _is_cut_short(text: str, names: Sequence[str]) -> bool:
    """A call in JSON that ends within its name or before its arguments."""
    match = re.match(r"""[\s\[]*\{\s*["']name["']\s*:\s*["'](?P<name>[^"']*)["']\s*(?:,\s*["']?\w*["']?)?\s*\Z""", text)
    return match is not None and match["name"] in names


def _end(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`; the text's end where none does."""
    opening, closing = text[start], {"{": "}", "(": ")"}[text[start]]
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == opening) - (text[at] == closing)
        if depth == 0:
            return at + 1
    return len(text)


def _is_named(text: str, names: Sequence[str]) -> bool:
    """A turn that is nothing but `tool(...)`, several of them, `tool {...}` or a step of ReAct; or begins one."""
    name = f"(?:{'|'.join(map(re.escape, names))})"
    tagged = re.search(rf"<{name}>\s*\{{", text)
    step = re.search(rf"^\s*action\s*:\s*`?{name}`?\s*\n\s*action input\s*:", text, re.I | re.M)
    if tagged or step or re.match(rf"\s*(?:[\w.=]*[.=])?{name}(?::\d+)?\s*\{{\s*[\"'}}].*\}}\s*\Z", text, re.DOTALL):
        return True
    call = re.compile(rf"[\s\[,;]*{name}(?:\(|\s+(?=\(\s*(?:[\"'{{)]|\w+\s*=)))")
    at = 0
    while match := call.match(text, at):
        at = _end(text, text.index("(", match.end() - 1))
    return at > 0 and not text[at:].strip(" \t\n]);,")
