"""Numbers in running text: signs, separators, currencies, per cent, units and scale words.

Covered, each with its test:
    signs         `-$5`, `− 5`, `minus 5`, `(12)` as a negative, but not in `twelve (12)`
    separators    `12,345.6`, `12 345` (any space), `12'345`, `1.234.567`, `12,34,567`, `1_234`; `1.234,56` and `3,5`,
                  where only a decimal comma is left; `12.345` and `12,345` are read as English has them
    scales        `3.2 billion`, `3.2bn`, `42mln`, `$4.2T`, `5 crore`, `412.5 (in millions)`, `1.2e6`, `1.2 × 10^6`,
                  `10⁶`
    per cent      `12.5 %`, `12.5 percentage points`, `12.5pp`; `5‰` and `25 bps` as the per cent that they are
    units         touching the number (`5kg`, `30km/h`, `7x`) or behind it, with a power (`5 cm^2`, `5 km/s^2`)
    LaTeX         `$5.2\\%$`, `12{,}345`, `5\\,\\text{kg}`, `\\boxed{42}`, `\\frac{1}{2}`, `4\\times10^{6}`
    marks         emphasis and tags around the number (`**42**`, `_42_`, `<b>42</b>`), references behind it (`42[1]`,
                  `42¹`, `42*`), tolerances (`42 ± 0.5` is 42), one-character fractions (`5½`)
Left out are asides, such as the second number of `14.4 million (3.6%)`, and what is no number: `10-K`, `Q3`, `4th`,
`1.2.3`, `1990s`, `3D`, `12ab34`.
Not covered: numbers in words, fractions as `1/2`, percentages as `0.05` of a whole, two scale words in a row, ranges
(their end is read), `5m` as metres, a reference mark that is a letter or `^1`, digits of other scripts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from graders.rules.plain_text import CODES, plain

_EXPONENTS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ABBREVIATIONS = {
    **{"k": 3, "tsd": 3, "lakh": 5, "lakhs": 5, "crore": 7, "crores": 7},
    **{"m": 6, "mm": 6, "mn": 6, "mln": 6, "mil": 6, "mio": 6},
    **{"b": 9, "bn": 9, "bln": 9, "mrd": 9, "tn": 12, "trn": 12},
}
_SMALLER = {"\u2030": 1, "bp": 2, "bps": 2}
"""Powers of ten by which a unit is smaller than one per cent."""

_SYMBOLS = "$\u20ac\u00a3\u00a5\u20b9\u20a9"

_DIGITS = re.compile(
    r"(?<![\w.])(?<![0-9],)"
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.(?P<part>[0-9]+))?|\.(?P<bare_part>[0-9]+))"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,2})(?!\w))?"
)
_UNIT = re.compile(
    r"(?P<closed>\s*\))?\s*(?:"
    r"(?P<percent>%|per\s?cent\b|pct\b|percentage\s+points?\b|pp\b|p\.p\.)"
    r"|(?P<smaller>\u2030|bps?\b|basis\s+points?\b)"
    r"|-?(?:\(?in\s+)?(?P<word>thousand|million|billion|trillion)s?\b"
    rf"|(?P<letters>{'|'.join(sorted(_ABBREVIATIONS, key=len, reverse=True))})\b)",
    re.IGNORECASE,
)
_CLOSE = re.compile(r"\s*(?:(?:US\s)?dollars|USD)?\s*\)", re.IGNORECASE)
_MONEY = re.compile(rf"\s*(?:[{_SYMBOLS}]|(?:US\s)?(?:dollars?|euros?|{CODES})\b)", re.IGNORECASE)
_TOUCHING = re.compile(r"(?!(?:st|nd|rd|th)\b)(?:[A-Za-z\u00b5\u03bc\u03a9]{2,12}|[ghlLstVWNJx])(?![\w-])")
"""Letters that touch a number as its unit. One letter alone is often a name (`3D`, `5G`); of an ordinal none is one."""
_PREFIX = re.compile(
    r"(?P<paren>\(\s*)?(?P<sign>[-+\u2212\u2013](?P<space>\s*))?"
    rf"(?:(?P<code>US|{CODES})\s?)?(?:(?P<symbol>[{_SYMBOLS}])\s?)?(?P<inner>[-\u2212])?$"
)
_DECLINE = re.compile(
    r"\b(?:decreas\w*|declin\w*|fell|falls?|drop\w*|down|loss|reduc\w*)\s+(?:(?:by|of)\s+)?(?:(?:about|approximately)\s+)?$",
    re.IGNORECASE,
)
_REFERS_BEFORE = re.compile(
    r"\b(?:p|pp|pg|pages?|fig|figures?|tables?|sections?|(?:foot)?notes?|exhibits?|chapters?|appendix|lines?)\.?\s?$"
    r"|\bconfidence(?:\s(?:level|score))?\s?(?::|=|is|of|at)?\s{0,2}$",
    re.IGNORECASE,
)
_REFERS_BEHIND = re.compile(r"\s?-?(?:decimals?\b|d\.p\.|significant\s(?:figures|digits))", re.IGNORECASE)
_IN_WORDS = re.compile(
    r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion)\s$",
    re.IGNORECASE,
)
"""Behind it a number in parentheses says the same once more: `twelve (12)`."""
_YEAR = r"(?:19|20)[0-9]{2}"
_CONTEXT_CHARS = 60
"""How far around a number is looked; keeps the parse linear in the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number of a text."""

    text: str
    """As it stands in the plain text, with sign and unit."""
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

    refers: bool
    """Tells where or how, not how much: `page 45`, `2 decimal places`, `Confidence: 95%`."""

    @property
    def full(self) -> Decimal:
        """The value with its scale word multiplied in; per cent stay per cent."""
        return self.value.scaleb(self.exponent or 0)

    @property
    def looks_like_a_year(self) -> bool:
        return bool(re.fullmatch(_YEAR, self.text))


def find_numbers(text: str) -> tuple[Number, ...]:
    """The numbers of a text in their order, asides in parentheses behind another number left out."""
    text = plain(text)
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
    if unit is None and _is_part_of_a_name(match[0], after):
        return None
    prefix = _PREFIX.search(before)
    assert prefix is not None, "the prefix may be empty, so it always matches"
    ahead = before[: prefix.start()]
    end = unit.end() if unit else 0
    close = None if unit and unit["closed"] else _CLOSE.match(after[end:])
    in_parentheses = bool(prefix["paren"]) and (close is not None or bool(unit and unit["closed"]))
    signed = _is_sign(prefix, ahead)
    repeats = in_parentheses and bool(_IN_WORDS.search(ahead))
    negative = (
        (signed and prefix["sign"][0] != "+")
        or bool(prefix["inner"])
        or (in_parentheses and not signed and not repeats)
    )

    whole, part = (match["whole"] or "0").replace(",", ""), match["part"] or match["bare_part"] or ""
    shift = int(match["exponent"] or 0) - _smaller(unit)
    value = Decimal(f"{whole}.{part}" if part else whole).scaleb(shift)
    start = match.start() - (len(before) - prefix.start() if signed or prefix["inner"] or in_parentheses else 0)
    return Number(
        text=text[start : match.end() + end + (close.end() if close and in_parentheses else 0)].strip(),
        value=-value if negative else value,
        exponent=_exponent(unit),
        percent=bool(unit and (unit["percent"] or unit["smaller"])),
        currency=bool(prefix["symbol"] or (prefix["code"] or "US") != "US" or _MONEY.match(after[end:])),
        decimals=len(part) - shift,
        significant=len((whole + part).lstrip("0")),
        refers=bool(_REFERS_BEFORE.search(ahead) or _REFERS_BEHIND.match(after)),
        either_sign=not negative and not signed and bool(_DECLINE.search(ahead)),
    )


def _is_part_of_a_name(digits: str, after: str) -> bool:
    if re.match(r"-[A-Za-z]|[.,][0-9]", after) or (after[:1] == "s" and re.fullmatch(_YEAR, digits)):
        return True
    return bool(re.match(r"\w", after)) and not _TOUCHING.match(after)


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
    if unit is None or unit["percent"] or unit["smaller"]:
        return None
    return _EXPONENTS[unit["word"].lower()] if unit["word"] else _ABBREVIATIONS[unit["letters"].lower()]


def _smaller(unit: re.Match[str] | None) -> int:
    """Powers of ten that turn thousandths and basis points into per cent."""
    name = unit["smaller"] if unit else None
    return _SMALLER.get(name.lower(), 2) if name else 0
