"""What a docstring says of a function and of its parameters, in the styles that people write.

*Covered*: Google's, as transformers' `get_json_schema` reads it (`name: text`) and with types (`name (type):`),
blank lines and continuation lines anywhere; NumPy's; reST's (`:param name:`) and Epydoc's.
*Not covered*: several styles in one docstring.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

_TRL_SECTIONS = re.compile("Args:|Returns:|Raises:")
_TRL_AFTER_ARGS = re.compile("Returns:|Raises:")
_TRL_ENTRY = re.compile(r"(\w+):(.*)")
_GOOGLE_ARGS = re.compile(r"(args|arguments|params|parameters|keyword args|keyword arguments|other parameters):", re.I)
_GOOGLE_SECTION = re.compile(r"[A-Z][A-Za-z]*( [A-Za-z]+){0,2}:")
_OTHER_STYLES = re.compile(
    r"^[ \t]*(Parameters|Returns|Raises|Yields|Notes|Examples?|See Also|References|Warnings)[ \t]*\n[ \t]*-{3,}"
    r"|^[ \t]*[:@](param|parameter|arg|type|returns?|rtype|raises?)\b[^:\n]*:"
    r"|^(Arguments|Params|Parameters|Keyword Args|Yields|Examples?|Notes?):[ \t]*$",
    re.M,
)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Docs:
    """What a docstring says."""

    description: str
    """All paragraphs before the first section, as they stand."""
    texts: dict[str, str] = field(default_factory=dict)
    """By parameter, in one line each."""
    returns: str | None = None


def read_docstring(doc: str, parameters: Collection[str]) -> Docs:
    """The docstring (without its indentation) in the first style in which it has a text for every parameter.

    Where it has none in any, the reading that knows the most parameters.
    """
    readings = []
    for docs in _readings(doc, parameters):
        if all(name in docs.texts for name in parameters) and not _OTHER_STYLES.search(docs.description):
            return docs
        readings.append(docs)
    return max(readings, key=lambda docs: sum(name in docs.texts for name in parameters))


def trl_docs(doc: str) -> Docs:
    """As transformers' `get_json_schema` reads a docstring, for TRL's users."""
    first = _TRL_SECTIONS.search(doc)
    texts: dict[str, str] = {}
    if section := re.search(r"\n\s*Args:\n", doc):
        body = _TRL_AFTER_ARGS.split(doc[section.end() :])[0]
        texts = _trl_entries([line.strip() for line in body.split("\n") if line.strip()])
    returns = re.search(r"\n\s*Returns:\n", doc)
    return Docs(
        description=doc[: first.start() if first else len(doc)].strip(),
        texts=texts,
        returns=doc[returns.end() :].split("Raises:")[0].strip() if returns else None,
    )


def _trl_entries(lines: list[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    name = ""
    for line in lines:
        # A name without a text takes the next line for it, whatever that is.
        if (found := _TRL_ENTRY.match(line)) and not (name and not texts[name]):
            name, texts[found[1]] = found[1], found[2].strip()
        elif name:
            texts[name] = f"{texts[name]} {line}".strip()
    return texts


def split_choices(text: str) -> tuple[str, list[Any] | None]:
    """TRL's `text (choices: [...])` in two: the text, and the values that a parameter may have."""
    found = _CHOICES.search(text)
    if found is None:
        return text, None
    try:
        choices = json.loads(found[1])
    except ValueError:
        return text, None
    if not isinstance(choices, list):
        return text, None
    return text[: found.start()].strip(), [c.strip() if isinstance(c, str) else c for c in choices]


def _readings(doc: str, parameters: Collection[str]) -> Iterator[Docs]:
    yield trl_docs(doc)
    yield _google(doc, parameters)
    # Here and not above: importing envs must stay quick.
    import docstring_parser

    for style in (docstring_parser.Style.NUMPYDOC, docstring_parser.Style.REST, docstring_parser.Style.EPYDOC):
        try:
            read = docstring_parser.parse(doc, style)
        except docstring_parser.ParseError:
            continue
        texts = {
            name.strip().lstrip("*"): _one_line(param.description or "")
            for param in read.params
            for name in param.arg_name.split(",")
        }
        paragraphs = (read.short_description, read.long_description)
        yield Docs(description="\n\n".join(filter(None, paragraphs)).strip(), texts=texts)


def _google(doc: str, parameters: Collection[str]) -> Docs:
    """Sections by their headings; entries are the lines that begin with a parameter's name."""
    names = "|".join(re.escape(name) for name in parameters)
    # After a type some leave out the colon, or the space after it.
    typed = r"(?:\(.*?\)|\[.*?\])\s*:|\(.*\)$"
    entry = re.compile(rf"\*{{0,2}}({names or '(?!)'})\s*(?:{typed}|:(?=\s|$))\s*(.*)")
    description: list[str] = []
    texts: dict[str, list[str]] = {}
    section, name = "", ""
    for line in doc.split("\n"):
        text = line.strip()
        if (not line[:1].isspace() or not section) and _GOOGLE_SECTION.fullmatch(text):
            section, name = text, ""
        elif not section:
            description.append(line)
        elif _GOOGLE_ARGS.fullmatch(section) and text:
            if found := entry.match(text):
                name = found[1]
                texts[name] = [found[2]]
            elif name and line[:1].isspace():
                texts[name].append(text)
            else:
                name = ""
    return Docs(
        description="\n".join(description).strip(),
        texts={name: " ".join(filter(None, lines)) for name, lines in texts.items()},
    )


def _one_line(text: str) -> str:
    return " ".join(filter(None, (line.strip() for line in text.strip().split("\n"))))
