"""Whether a turn without a parsed call tried to make one: told apart from answers that quote or mention calls."""

from __future__ import annotations

import re
from collections.abc import Sequence

from envs.json_text import read_json

_TAG = re.compile(r"\s*(<[^<>\s{}]+>|\[[A-Z_]{3,}\])")
# <tool_call>, <|tool_call..., also cut off or misspelt; the opening tags of other dialects.
_OPENING = re.compile(r"<\|?\s?tool[_ ]?call(?:\w*\|?>|(?=[^\w>]|$))|<function=|\[TOOL_CALLS\]|<\|python_tag\|>", re.I)
_CLOSING = re.compile(r"</\|?\s?tool[_ ]?call\w*\|?>|<\|?/tool[_ ]?call\w*\|?>", re.I)
# Code that an answer quotes; a fence is also how untrained models wrap a call, so only its marks are dropped.
_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_FENCE = re.compile(r"```\w*")
_BARE = re.compile(
    r"""\{\s*["']name["']\s*:\s*(?P<first>["'][^"']*["'])\s*,\s*["'](?:arguments|parameters)["']\s*:
      | \{\s*["'](?:arguments|parameters)["']\s*:.*?["']name["']\s*:\s*(?P<last>["'][^"']*["'])
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_WHOLE_TURN = re.compile(r"""[\s\[]*\{\s*["']name["']\s*:\s*["'][^"']*["']\s*,\s*["']arguments["']\s*:\s*\{""", re.I)
_PROSE = re.compile(r"(?:[ \t]+(?P<word>[^\W\d_]+)|[.,;:!?)\"'](?:\s|$))")


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

    *Covered*: tags of calls, whole or cut or misspelt, of this dialect or another; a bare JSON or Python call. Not
    an attempt: tags or calls quoted as code (unless nothing else is in the turn), a tag that prose only mentions,
    a call in JSON in the midst of an answer, JSON that is more than a call or whose `name` is no tool's.
    *Not covered*: unmarked text that describes a call in words, which is an answer.
    """
    spoken = _QUOTED.sub(" ", text)
    bare = _FENCE.sub("", text)
    if not spoken.strip():
        spoken = bare = bare.strip("`\n ")
    return _has_tag(spoken, names, markers) or _is_bare_json(bare, names) or _is_python(bare, names)


def _has_tag(text: str, names: Sequence[str], markers: Sequence[str]) -> bool:
    openings = [m.end() for m in _OPENING.finditer(text)]
    openings += [m.end() for marker in markers for m in re.finditer(re.escape(marker), text)]
    for end in openings:
        prose = _PROSE.match(text, end)
        if prose is None or prose["word"] in names:
            return True
    closings = [m.span() for m in _CLOSING.finditer(text)]
    return any(
        text[:start].rstrip().endswith(("}", "]", ">")) or not _PROSE.match(text, end) for start, end in closings
    )


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
    if _WHOLE_TURN.match(text) and _has_no_other_keys(text):
        return True
    for found in _BARE.finditer(text):
        if (found["first"] or found["last"]).strip("\"'") not in names:
            continue
        begins = not text[: found.start()].strip(" \t\n[(")
        if begins or _ends_the_turn(text[found.start() :]):
            return True
    return False


def _has_no_other_keys(text: str) -> bool:
    """Whether the JSON object is nothing but a name and arguments, whatever it names; broken JSON may be."""
    try:
        value = read_json(text)
    except ValueError:
        return True
    return not isinstance(value, dict) or value.keys() == {"name", "arguments"}


def _ends_the_turn(text: str) -> bool:
    """Whether nothing but closing marks follows the object that opens `text`, or it never closes."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return not text[at + 1 :].strip(" \t\n])}.;,")
    return True


def _is_python(text: str, names: Sequence[str]) -> bool:
    """A turn that is nothing but `tool(...)` or `[tool(...)]`, or such a call cut short."""
    alternatives = "|".join(map(re.escape, names))
    match = re.match(rf"\s*\[?\s*(?:{alternatives})(?:\(|\s+\(\s*(?:[\"'{{)]|\w+\s*=))", text)
    return bool(match) and (text.rstrip().endswith((")", "]", ");", ").")) or ")" not in text)
