"""Numbers as models typeset them, rewritten as plain English text has them; the rest of the text stays as it is.

Each rule says what it turns into what; the order matters. `graders.rules.numbers` reads what comes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_CHARACTERS = str.maketrans(
    {
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        **dict.fromkeys("\uff05\ufe6a", "%"),
        # Minus signs and hyphens; dashes of sentences and ranges stay what they are.
        **dict.fromkeys("\u2010\u2011\ufe63\uff0d", "-"),
        "\uff0c": ",",
        "\uff0e": ".",
    }
)
_PARTS = {"½": "5", "¼": "25", "¾": "75"}
_MOST_NESTED = 4

CODES = "USD|EUR|GBP|CHF|JPY|CNY|RMB|INR|CAD|AUD"
"""Currencies."""
_SCALE = r"(?:thousand|million|billion|trillion|dollars|euros|USD|EUR|per\s?cent)s?"
_GROUP_SPACES = " \u00a0\u2009\u202f\u2007"

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _power(match: re.Match[str]) -> str:
    exponent = (match["power"] or match["raised"].translate(_SUPERSCRIPTS)).replace("\u2212", "-").replace(" ", "")
    return f"{match['mantissa'] or '1'}e{exponent}"


def _fraction(match: re.Match[str]) -> str:
    above, below = Decimal(match[1]), Decimal(match[2])
    return f"{(above / below).normalize():.12f}".rstrip("0").rstrip(".") if below else match[0]


def _without_groups(match: re.Match[str]) -> str:
    return re.sub(rf"[{_GROUP_SPACES}.'\u2019]", "", match[1]) + "." + match[2]


def _as_commas(match: re.Match[str]) -> str:
    return re.sub(rf"[{_GROUP_SPACES}.'\u2019]", ",", match[0])


_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf|normal)|operatorname|boxed|fbox|mbox|emph|underline)"
    r"\s{0,2}\{([^{}]{0,200})\}"
)


def _rule(pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Rule:
    return re.compile(pattern, re.IGNORECASE), replacement


_BEGIN, _END = r"(?<![0-9.,])", r"(?![0-9]|[.,][0-9])"
_GAP = rf"[{_GROUP_SPACES}.'\u2019]"
_SUPERSCRIPT = "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]"
_FIGURE = r"(-?[0-9]{1,12}(?:\.[0-9]{1,12})?)"
_TIMES = r"\s{0,2}(?:\\times|\\cdot|[×·⋅*x])\s{0,2}"
_REFERENCE = r"\[\^?[0-9]{1,3}(?:[,;\s\u2013-]{1,2}[0-9]{1,3}){0,5}\]"

_RULES: tuple[Rule, ...] = (
    # ---- LaTeX
    _rule(r"\$\$|\\[()\[\]]", " "),
    # Dollars of mathematics, told from those of money as Pandoc does: no space inside the pair, no digit behind it.
    _rule(r"(?<!\\)\$(?=[^\s$])((?:[^$\n\\]|\\[^\n]){1,200})(?<=[^\s\\])\$(?![0-9])", r"\1"),
    _rule(r"\{,\}|,\\!", ","),
    _rule(r"(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))", ","),
    _rule(r"\\(?:[,;: ]|quad\b|qquad\b|approx\b|sim\b|displaystyle\b)|(?<=[0-9])~(?=\S)", " "),
    _rule(r"\\!|\\(?:left|right)(?![a-z])", ""),
    _rule(rf"\\[dt]?frac\s?\{{\s?{_FIGURE}\s?\}}\s?\{{\s?{_FIGURE}\s?\}}", _fraction),
    _rule(r"\\([%$#&_])", r"\1"),
    # ---- figures that belong to a unit or a name: cm^2, m/s^{2}, 45^\\circ, x_1
    _rule(r"(?<=[a-z])\s?\^(?:\{\s?[-\u2212]?[0-9]{1,2}\s?\}|[-\u2212]?[0-9]{1,2})", ""),
    _rule(r"(?<=[a-z])_(?:\{[0-9]{1,2}\}|[0-9]{1,2}(?![0-9_]))", ""),
    # ---- what touches a number: USD5, Rs.5, approx.5, $5T; and Python's 1_234_567
    _rule(rf"\b({CODES})(?=[0-9])", r"\1 "),
    _rule(r"\b(Rs|approx|ca)\.(?=[0-9])", r"\1 "),
    _rule(r"(?<=[0-9])\s?(?-i:T)\b", " trillion"),
    _rule(rf"{_BEGIN}(?<![\w])[0-9]{{1,3}}(?:_[0-9]{{3}}){{1,5}}(?![\w])", lambda m: m[0].replace("_", "")),
    # ---- tags
    _rule(r"<su[pb]>[^<>]{0,20}</su[pb]>", ""),
    _rule(r"</?[a-z][^<>\n]{0,40}>", ""),
    # ---- powers of ten: 4.2 × 10^6, 4.2\times10^{6}, 4.2 x 10⁶, 10^6; before the asterisks of 10**6 go
    _rule(
        rf"(?:(?P<mantissa>[0-9]{{1,15}}(?:\.[0-9]{{1,15}})?){_TIMES}|(?<![\w.,]))10\s?"
        rf"(?:(?:\^|\*\*)\s?\{{?\s?(?P<power>[-+\u2212]?\s?[0-9]{{1,2}})\s?\}}?|(?P<raised>{_SUPERSCRIPT}{{1,3}}))(?![0-9])",
        _power,
    ),
    # ---- bullets, emphasis and reference marks; an asterisk between two figures multiplies
    _rule(r"(?<=\n)[ \t]{0,12}[-+*\u2022][ \t]{1,4}(?=\S)", ""),
    _rule(r"\*{2,3}(?![0-9])|(?<![0-9])\*{2,3}|(?<![0-9)\s*])\*|\*(?!\s?[0-9($+*-])", ""),
    _rule(r"(?<![a-z0-9_])_{1,3}(?=[-+\u2212(]?[$\u20ac\u00a3]?[0-9.])|(?<=[a-z0-9%)])_{1,3}(?![a-z0-9_])", ""),
    _rule(rf"((?:[0-9%)]|\b{_SCALE})[.,]?\s?)(?:{_REFERENCE}){{1,5}}", r"\1"),
    _rule(r"(?<=[a-z.,;:])\[\^?[0-9]{1,3}\]|【[^【】\n]{0,60}】", ""),
    _rule(rf"(?<=[0-9a-z%).]){_SUPERSCRIPT}{{1,4}}", ""),
    # ---- signs, tolerances, fractions of one character
    _rule(r"(?<![0-9%)] )\b(?:minus|negative)\s(?=[$\u20ac\u00a3]?[0-9])", "-"),
    _rule(r"(?:\u00b1|\+/-|\\pm)\s?[0-9][0-9.,]{0,15}", ""),
    *(_rule(rf"(?<=[0-9])\s?{sign}", f".{part}") for sign, part in _PARTS.items()),
    *(_rule(sign, f"0.{part}") for sign, part in _PARTS.items()),
    # ---- separators of other languages, where no English reading is left: 1.234,56 and 1 234,56; 1.234.567;
    # 12 345 and 12'345; 12,34,567; 3,5 and 3,1416; 0,125
    _rule(rf"{_BEGIN}([0-9]{{1,3}}(?:{_GAP}[0-9]{{3}}){{1,5}}),([0-9]{{1,2}}){_END}", _without_groups),
    _rule(rf"{_BEGIN}[0-9]{{1,3}}(?:\.[0-9]{{3}}){{2,5}}{_END}", _as_commas),
    _rule(rf"{_BEGIN}[0-9]{{1,3}}(?:[{_GROUP_SPACES}'\u2019][0-9]{{3}}){{1,5}}(?![0-9]|,[0-9])", _as_commas),
    _rule(rf"{_BEGIN}[0-9]{{1,2}}(?:,[0-9]{{2}}){{1,4}},[0-9]{{3}}(?![0-9]|,[0-9])", lambda m: m[0].replace(",", "")),
    _rule(rf"{_BEGIN}([0-9]{{1,12}}),([0-9]{{1,2}}|[0-9]{{4,12}}){_END}", r"\1.\2"),
    _rule(rf"{_BEGIN}0,([0-9]{{3}}){_END}", r"0.\1"),
)


def plain(text: str) -> str:
    """The text with its numbers as plain English text has them."""
    text = text.translate(_CHARACTERS)
    for _ in range(_MOST_NESTED):
        text, num_found = _WRAPPED.subn(r"\1", text)
        if not num_found:
            break
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def marked(text: str) -> str | None:
    r"""The part that the text itself marks as its answer: what the last `\boxed{…}` or `<answer>…</answer>` holds, or
    what stands behind the last `####` or a last line that begins with `Answer:`; None without a mark.
    """
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    found = [match for pattern in _MARKS for match in pattern.finditer(text)]
    return max(found, key=lambda match: match.start())[1] if found else None


_MARKS = (
    re.compile(r"<answer>((?:(?!<answer>).){0,2000}?)</answer>", re.IGNORECASE | re.DOTALL),
    re.compile(r"^[ \t]*####(?!#)((?:(?!\n[ \t]*####).)*)\Z", re.MULTILINE | re.DOTALL),
    re.compile(
        r"^[ \t>*_#-]{0,8}(?:(?:my|the|so|therefore|thus)[ ,]{1,2}){0,3}(?:final[ ])?answer[ *_]{0,4}[:\uff1a=]"
        r"((?:(?!\n[ \t>*_#-]{0,8}(?:final[ ])?answer[ *_]{0,4}[:\uff1a=]).)*)\Z",
        re.IGNORECASE | re.MULTILINE | re.DOTALL,
    ),
)


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
