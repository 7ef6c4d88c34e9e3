"""Whether a turn without a parsed call tried to make one: told apart from answers that quote or mention calls."""

from __future__ import annotations

import bisect
import contextlib
import re
from collections.abc import Sequence
from typing import Any

from envs.reading.json_text import read_json

_ANY_SIGN = re.compile(r"[<{\[(]|action", re.I)
"""Without any of these nothing below finds a call: most answers are told from calls at once."""
_TAG = re.compile(r"\s*(<[^<>\s{}]+>|\[[A-Z_]{3,}\])")
# <tool_call>, <|tool_call..., <seed:tool_call>, <start_function_call>, also cut off or misspelt; the opening tags and
# special tokens of other dialects.
_OPENING = re.compile(
    r"<[|｜]?\s?(?:\w{1,20}[:_|])?(?:tool|function)[_▁ ]?call(?:[\w▁]*[|｜]?>|(?=[^\w▁>]|$))"
    r"|<function=|<(?:｜DSML｜\s?|\w{1,20}:)?invoke name=|\[TOOL_CALLS\]"
    r"|<[|｜]\w{0,20}(?:tool|function|action|plugin|python)\w{0,20}[|｜]>",
    re.I,
)
_CLOSING = re.compile(r"</\|?\s?tool[_ ]?call\w*\|?>|<\|?/tool[_ ]?call\w*\|?>", re.I)
# Code that an answer quotes; a fence is also how untrained models wrap a call, so only its marks are dropped.
_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_FENCE = re.compile(r"```\w*")
_NAME_KEYS = ("name", "tool", "tool_name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_BARE = re.compile(
    rf"""\{{\s*["']?(?:{"|".join(_NAME_KEYS)})["']?\s*:\s*["'](?P<name>[^"']*)["']\s*,
          \s*["']?(?:{"|".join(_ARGUMENT_KEYS)})["']?\s*:
      | \{{\s*["'](?:arguments|parameters)["']\s*:
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NAME = re.compile(r"""["']name["']\s*:\s*["']([^"']*)["']""", re.I)
# What says in other dialects that a tool is meant: an element's name, the word before a colon.
_WORD = r"(?:use_)?(?:tool|function|action|invoke)(?:_?(?:name|use|call|code))?"
_ANSWERED = re.compile(r"<(?:final_)?answer>", re.I)
_ARGUMENTS_TAG = re.compile(r"<(?:tool_|action_)?(?:args|arguments|parameters?|params|input)\b", re.I)
_CLOSED = re.compile(r"</[^<>]*>")
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
    `tool {...}`, in tags of whatever name, cut short too; an element that names the tool, alone or before its
    arguments. The work grows with the length of the text, whatever it holds. Not an attempt: tags or calls quoted as
    code (unless nothing else is in the turn), a tag that prose in any script only mentions, a call in the midst of an
    answer, JSON that is more than a call or whose `name` is no tool's. *Not covered*: unmarked text that describes a
    call in words, and a tool as an element of its own name around text (`<search>Acme</search>`): both are answers.
    """
    if not (_ANY_SIGN.search(text) or any(marker in text for marker in markers)):
        return False
    spoken = _QUOTED.sub(" ", text)
    bare = _FENCE.sub("", text)
    if not spoken.strip():
        spoken = bare = bare.strip("`\n ")
    return (
        _has_tag(spoken, names, markers)
        or _has_named_element(spoken, names)
        or _is_bare_json(bare, names)
        or _is_named(bare, names)
    )


def _has_tag(text: str, names: Sequence[str], markers: Sequence[str]) -> bool:
    openings = [m.span() for m in _OPENING.finditer(text)]
    openings += [m.span() for marker in markers for m in re.finditer(re.escape(marker), text)]
    # The calls of Gemma's kind stand without their special tokens where the model wrote those letter by letter.
    braces = _ends(text, "{}")
    calls = re.finditer(rf"(?:<call>|\bcall:){_any_of(names)}(?=\{{)", text)
    openings += [(m.start(), braces.get(m.end(), len(text))) for m in calls]
    openings += [
        m.span() for m in re.finditer(rf"""<{_WORD}\s+name\s*=\s*["']?{_any_of(names)}["']?\s*>""", text, re.I)
    ]
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
    braces = _ends(text, "{}")
    named = [m for m in _NAME.finditer(text) if m[1] in names]
    starts = [m.start() for m in named]
    # Tags aside, a call begins the turn before the one place and ends it behind the other.
    untagged = _ANY_TAG.sub(lambda tag: " " * len(tag[0]), text)
    first, last = len(text) - len(untagged.lstrip(" \t\n[(")), len(untagged.rstrip(" \t\n])}.;,"))
    for found in _BARE.finditer(text):
        end = braces.get(found.start(), len(text))
        if found["name"] is None:  # the name comes last
            at = bisect.bisect_left(starts, found.end())
            is_named = at < len(named) and named[at].end() <= end
        else:
            is_named = found["name"] in names and found.end() <= end
        if is_named and (found.start() <= first or end >= last):
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


def _ends(text: str, brackets: str) -> dict[int, int]:
    """For each opening bracket of the pair that is closed, the place behind the one that closes it."""
    ends, open_at = {}, []
    for match in re.finditer(f"[{re.escape(brackets)}]", text):
        if match[0] == brackets[0]:
            open_at.append(match.start())
        elif open_at:
            ends[open_at.pop()] = match.end()
    return ends


def _any_of(names: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"


def _has_named_element(text: str, names: Sequence[str]) -> bool:
    """`<tool>search</tool>`, with its arguments or alone; not where text follows that it would be an example of."""
    found = re.search(rf"<{_WORD}>\s*{_any_of(names)}(?!\w)", text, re.I)
    if found is None or _ANSWERED.search(text):
        return False
    after = text[found.end() :]
    if after.startswith("("):
        return True
    rest = re.sub(r"^\s*(?:</[^<>]*>)?\s*", "", after)
    if not _CLOSED.sub("", rest).strip() or rest[0] == "{" or _ARGUMENTS_TAG.match(rest):
        return True
    if rest[0] != "<" or rest[1:2] == "/" or re.match(rf"<{_WORD}>", rest, re.I):
        return False
    return not _ANY_TAG.sub("", text[: found.start()]).strip()


def _is_named(text: str, names: Sequence[str]) -> bool:
    """A turn that is nothing but `tool(...)`, several of them, `tool {...}` or a step of ReAct; or begins one."""
    name = _any_of(names)
    whole = rf"""\s*(?:(?:{_WORD}|call)\s*:\s*)?(?:[\w.=]*[.=])?{name}(?::\d+)?
                 (?:\s*\{{\s*["'}}]|\{{\s*\w+\s*:).*\}}\s*\Z"""
    step = rf"""^[ \t]*action\s*:\s*`?{name}(?:`?[ \t]*\n\s*action\ input\s*:|\s?[\[({{].*[\])}}]\s*\Z)"""
    given = (
        rf"""^[ \t]*{_WORD}\s*:\s*`?{name}`?[ \t]*\n\s*(?:\w+[ _])?(?:input|args|arguments|parameters)\s*:\s*(?=\{{)"""
    )
    if (
        re.search(rf"<{name}>\s*\{{", text)
        or re.match(whole, text, re.DOTALL | re.VERBOSE | re.I)
        or re.search(step, text, re.I | re.M | re.VERBOSE)
    ):
        return True
    if match := re.search(given, text, re.I | re.M):
        return not text[_ends(text, "{}").get(match.end(), len(text)) :].strip()
    call = re.compile(rf"[\s\[,;]*{name}(?:\(|\s+(?=\(\s*(?:[\"'{{)]|\w+\s*=)))")
    rounds = _ends(text, "()")
    at = 0
    while match := call.match(text, at):
        at = rounds.get(text.index("(", match.end() - 1), len(text))
    return at > 0 and not text[at:].strip(" \t\n]);,")
