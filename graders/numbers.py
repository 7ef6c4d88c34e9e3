"""Numbers in running text: signs, separators, currencies, percent and scale words.

Covered: `$1,234.5 million`, `-$5`, `(12)` as a negative, `12.5 %`, `3.2bn`, `412.5 (in millions)`, `1.2e6`. Left out
are asides, such as the second number of `14.4 million (3.6%)`, and what is no number: `10-K`, `Q3`, `4th`, `1.2.3`.
Not covered: decimal commas, spaces as thousands separators, numbers in words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

_EXPONENTS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ABBREVIATIONS = {"k": 3, "m": 6, "mm": 6, "mn": 6, "b": 9, "bn": 9, "tn": 12}

_DIGITS = re.compile(
    r"(?<![\w.])(?<![0-9],)"
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.(?P<part>[0-9]+))?|\.(?P<bare_part>[0-9]+))"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,2})(?!\w))?"
)
_UNIT = re.compile(
    r"(?P<closed>\s*\))?\s*(?:"
    r"(?P<percent>%|per\s?cent\b|percentage\s+points?\b)"
    r"|-?(?:\(?in\s+)?(?P<word>thousand|million|billion|trillion)s?\b"
    r"|(?P<letters>mm|mn|bn|tn|k|m|b)\b)",
    re.IGNORECASE,
)
_CLOSE = re.compile(r"\s*(?:(?:US\s)?dollars|USD)?\s*\)", re.IGNORECASE)
_DOLLARS = re.compile(r"\s*(?:US\s)?(?:dollars?|USD)\b", re.IGNORECASE)
_PREFIX = re.compile(
    r"(?P<paren>\(\s*)?(?P<sign>[-+\u2212\u2013](?P<space>\s*))?"
    r"(?:(?P<code>USD?)\s?)?(?:(?P<symbol>[$\u20ac\u00a3])\s?)?(?P<inner>[-\u2212])?$"
)
_DECLINE = re.compile(
    r"\b(?:decreas\w*|declin\w*|fell|falls?|drop\w*|down|loss|reduc\w*)\s+(?:(?:by|of)\s+)?(?:(?:about|approximately)\s+)?$",
    re.IGNORECASE,
)
_CONTEXT_CHARS = 60
"""How far around a number is looked; keeps the parse linear in the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number of a text."""

    text: str
    """As it stands there, with sign and unit."""
    value: Decimal
    """Signed, without the scale word: 1.5 for `1.5 million`."""
    exponent: int | None
    """Power of ten of the scale word; None without one."""
    percent: bool
    currency: bool
    """With a currency sign, or dollars in words: an amount of money."""
    decimals: int
    """Digits behind the decimal point of `value`; negative where scientific notation leaves none."""
    significant: int
    """Digits of `value` without leading zeros."""
    either_sign: bool
    """Written without a sign behind a word such as `decreased by`: it may stand for the negative too."""

    @property
    def full(self) -> Decimal:
        """The value with its scale word multiplied in; per cent stay per cent."""
        return self.value.scaleb(self.exponent or 0)

    @property
    def looks_like_a_year(self) -> bool:
        return bool(re.fullmatch(r"(?:19|20)[0-9]{2}", self.text))


def find_numbers(text: str) -> tuple[Number, ...]:
    """The numbers of a text in their order, asides in parentheses behind another number left out."""
    found: list[Number] = []
    depth = position = 0
    for match in _DIGITS.finditer(text):
        between = text[position : match.start()]
        depth = max(0, depth + between.count("(") - between.count(")"))
        position = match.start()
        if depth and found:
            continue
        number = _number(text, match)
        if number is not None:
            found.append(number)
    return tuple(found)


def _number(text: str, match: re.Match[str]) -> Number | None:
    before = text[max(0, match.start() - _CONTEXT_CHARS) : match.start()]
    after = text[match.end() : match.end() + _CONTEXT_CHARS]
    unit = _UNIT.match(after)
    if unit is None and re.match(r"\w|-[A-Za-z]|[.,][0-9]", after):
        return None
    prefix = _PREFIX.search(before)
    assert prefix is not None, "the prefix may be empty, so it always matches"
    ahead = before[: prefix.start()]
    end = unit.end() if unit else 0
    close = None if unit and unit["closed"] else _CLOSE.match(after[end:])
    in_parentheses = bool(prefix["paren"]) and (close is not None or bool(unit and unit["closed"]))
    signed = _is_sign(prefix, ahead)
    negative = (signed and prefix["sign"][0] != "+") or bool(prefix["inner"]) or (in_parentheses and not signed)

    whole, part = (match["whole"] or "0").replace(",", ""), match["part"] or match["bare_part"] or ""
    shift = int(match["exponent"] or 0)
    value = Decimal(f"{whole}.{part}" if part else whole).scaleb(shift)
    start = match.start() - (len(before) - prefix.start() if signed or prefix["inner"] or in_parentheses else 0)
    return Number(
        text=text[start : match.end() + end + (close.end() if close and in_parentheses else 0)].strip(),
        value=-value if negative else value,
        exponent=_exponent(unit),
        percent=bool(unit and unit["percent"]),
        currency=bool(prefix["symbol"] or prefix["code"] == "USD" or _DOLLARS.match(after[end:])),
        decimals=len(part) - shift,
        significant=len((whole + part).lstrip("0")),
        either_sign=not negative and not signed and bool(_DECLINE.search(ahead)),
    )


def _is_sign(prefix: re.Match[str], ahead: str) -> bool:
    """Whether the mark before the number is its sign, not the minus of a sum, a range or a dash of the sentence."""
    if not prefix["sign"]:
        return False
    if prefix["paren"]:
        return True
    if prefix["space"]:
        return ahead.rstrip() == "" or ahead.rstrip()[-1] in "=:"
    return not re.search(r"[\w)%]$", ahead)


def _exponent(unit: re.Match[str] | None) -> int | None:
    if unit is None or unit["percent"]:
        return None
    return _EXPONENTS[unit["word"].lower()] if unit["word"] else _ABBREVIATIONS[unit["letters"].lower()]
