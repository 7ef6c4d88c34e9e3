"""Arithmetic that a model or a user wrote, without Python's own: the `calculate` tool's, and formulas over scores.

    sum     := product (("+" | "-") product)*
    product := signed (("*" | "/") signed)*
    signed  := ("-" | "+") signed | power
    power   := atom ("^" signed)?            so -2^2 is -4, and 2^3^2 is 2^9
    atom    := number | name | function "(" sum ("," sum)* ")" | "(" sum ")"

Covered: the text's length and nesting are bounded, and its faults are told with their place when it is read; evaluation
is a loop over a stack. Not covered: names that are no identifiers (`f1-score` is a difference). Python's `ast` would
not do: it refuses a sum of 3,000 terms, and its faults are those of another language.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from typing import Any, Generic, TypeVar

from envs.errors import ToolError, UserError

MAX_CHARS = 10_000
"""The longest formula."""
MAX_DEPTH = 50
MAX_TOOL_CHARS = 200
"""The longest expression for the `calculate` tool."""
MAX_RESULT = Decimal(10) ** 15

Number = TypeVar("Number", float, Decimal)

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)|(?P<sign>[-+*/^(),]))"
)
_SPACE = re.compile(r"\s*")
_THOUSANDS_SEPARATOR = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_PLAIN = re.compile(r"[0-9.,+\-*/() ]*[0-9][0-9.,+\-*/() ]*")
_MORE = re.compile(r"\*\*|//|[0-9.)] *\(|,")
"""Powers, whole quotients, calls and lists, of the same signs."""
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_ANY_NUMBER = ("min", "max")
"""Functions of one argument or more; the others have one."""
_OPERATORS: dict[tuple[str, int], Callable[..., Any]] = {
    ("+", 2): operator.add,
    ("-", 2): operator.sub,
    ("*", 2): operator.mul,
    ("/", 2): operator.truediv,
    ("^", 2): math.pow,
    ("-", 1): operator.neg,
    # Python's own min and max take a single number for a list.
    **{(name, 1): operator.pos for name in _ANY_NUMBER},
}


class FormulaError(ArithmeticError):
    """The formula has no value for these scores; the text says why."""


class Formula:
    """A formula over the scores of named graders. Raises `UserError`, with the place, for a text that can't be read."""

    def __init__(self, text: str, names: Iterable[str]) -> None:
        if len(text) > MAX_CHARS:
            raise UserError(f"calculate_output: expected at most {MAX_CHARS:,} characters, got {len(text):,}")
        try:
            self._code = _Reader(text, frozenset(names), _finite).read_all()
        except _Unreadable as e:
            raise UserError(f"calculate_output: {e}") from None
        self.names = frozenset(step for step in self._code if isinstance(step, str))
        """The graders whose scores it reads."""

    def evaluate(self, scores: Mapping[str, float]) -> float:
        """The value for these scores. Raises `FormulaError` where there is no finite one, at any step."""
        for step in self._code:
            if isinstance(step, str) and not math.isfinite(scores[step]):
                raise FormulaError(f"the score of {step} is {scores[step]}")
        return _value(self._code, scores, _applied)


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text, in exact decimals; see `format_number` for its digits.

    Numbers may have thousands separators. Raises `ToolError` for anything but numbers and + - * / ( ), for an
    expression of more than 200 characters, a division by zero and a result of 10^15 or more.
    """
    if len(expression) > MAX_TOOL_CHARS:
        raise ToolError(f"the expression is longer than {MAX_TOOL_CHARS} characters")
    text = _THOUSANDS_SEPARATOR.sub("", expression)
    if not _PLAIN.fullmatch(text) or _MORE.search(text):
        raise ToolError("use only numbers and + - * / ( )")
    try:
        value = _value(_Reader(text, frozenset(), _decimal).read_all(), {}, _exact)
    except ZeroDivisionError as e:
        raise ToolError("division by zero") from e
    except (_Unreadable, DecimalException) as e:
        raise ToolError("not an arithmetic expression") from e
    if abs(value) >= MAX_RESULT:
        raise ToolError("the result is too large")
    return format_number(value)


def format_number(value: Decimal) -> str:
    """Two decimals, below 1 four significant digits; no trailing zeros, no exponent."""
    digits = 2 if abs(value) >= 1 or value == 0 else 3 - value.adjusted()
    # Very small results have no four digits worth showing.
    rounded = round(value, min(digits, 12))
    text = f"{rounded:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    """`number`, `name`, `sign`, or `end`."""
    text: str
    place: int
    """From 1."""

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else repr(self.text)


@dataclass(frozen=True, slots=True)
class _Apply:
    """Takes its arguments off the stack and puts the value there."""

    name: str
    num_arguments: int


class _Unreadable(ValueError):
    """The text is no arithmetic: says where and what was expected."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a smaller number")
    return value


def _decimal(text: str) -> Decimal:
    if text.isdigit() and text.startswith("0") and text.strip("0"):
        raise ValueError("a number without zeros before it")
    return Decimal(int(text)) if text.isdigit() else Decimal(repr(float(text)))


def _value(
    code: tuple[Number | str | _Apply, ...],
    named: Mapping[str, Number],
    apply: Callable[[_Apply, list[Number]], Number],
) -> Number:
    stack: list[Number] = []
    for step in code:
        if isinstance(step, _Apply):
            arguments = stack[-step.num_arguments :]
            del stack[-step.num_arguments :]
            stack.append(apply(step, arguments))
        else:
            stack.append(named[step] if isinstance(step, str) else step)
    (value,) = stack
    return value


def _exact(step: _Apply, arguments: list[Decimal]) -> Decimal:
    value: Decimal = _OPERATORS[step.name, len(arguments)](*arguments)
    return value


def _applied(step: _Apply, arguments: list[float]) -> float:
    function = _OPERATORS.get((step.name, len(arguments))) or _FUNCTIONS[step.name]
    given = ", ".join(f"{argument:g}" for argument in arguments)
    try:
        value = float(function(*arguments))
    except ZeroDivisionError:
        raise FormulaError(f"division by zero: {arguments[0]:g} / 0") from None
    except ValueError:
        raise FormulaError(f"domain error: {step.name} of {given}") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise FormulaError(f"overflow: {step.name} of {given}")
    return value


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while match := _TOKEN.match(text, position):
        kind = match.lastgroup
        assert kind is not None
        tokens.append(_Token(kind, match[kind], match.start(kind) + 1))
        position = match.end()
    space = _SPACE.match(text, position)
    assert space is not None
    if space.end() < len(text):
        raise _Unreadable(
            f"character {space.end() + 1}: expected a number, a name, or one of + - * / ^ ( ) and a comma, found "
            f"{text[space.end()]!r}"
        )
    return [*tokens, _Token("end", "", len(text) + 1)]


class _Reader(Generic[Number]):
    """Recursive descent; writes what it reads in postfix order. Raises `_Unreadable`."""

    def __init__(self, text: str, names: frozenset[str], number: Callable[[str], Number]) -> None:
        """`number` reads one; its `ValueError` says what was expected."""
        self._code: list[Number | str | _Apply] = []
        self._tokens = _tokens(text)
        self._names = names
        self._read_number: Callable[[str], Number] = number
        self._next = 0
        self._depth = 0

    def read_all(self) -> tuple[Number | str | _Apply, ...]:
        self._sum()
        if self._token.kind != "end":
            raise self._refuse("an operator or the end")
        return tuple(self._code)

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _refuse(self, expected: str, token: _Token | None = None) -> _Unreadable:
        found = token or self._token
        return _Unreadable(f"character {found.place}: expected {expected}, found {found}")

    def _take(self, *signs: str) -> str | None:
        if self._token.kind != "sign" or self._token.text not in signs:
            return None
        self._next += 1
        return self._tokens[self._next - 1].text

    def _sum(self) -> None:
        self._product()
        while sign := self._take("+", "-"):
            self._product()
            self._code.append(_Apply(sign, 2))

    def _product(self) -> None:
        self._signed()
        while sign := self._take("*", "/"):
            self._signed()
            self._code.append(_Apply(sign, 2))

    def _signed(self) -> None:
        # Every way down leads through here, so this alone bounds the recursion.
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refuse(f"at most {MAX_DEPTH} levels of nesting")
        if sign := self._take("+", "-"):
            self._signed()
            if sign == "-":
                self._code.append(_Apply("-", 1))
        else:
            self._atom()
            if self._take("^"):
                self._signed()
                self._code.append(_Apply("^", 2))
        self._depth -= 1

    def _atom(self) -> None:
        token = self._token
        if self._take("("):
            self._sum()
            if not self._take(")"):
                raise self._refuse("an operator or )")
            return
        if token.kind not in ("number", "name"):
            raise self._refuse("a number, a grader's name, a function or (")
        self._next += 1
        if token.kind == "number":
            try:
                self._code.append(self._read_number(token.text))
            except ValueError as e:
                raise self._refuse(str(e), token) from None
        elif self._take("("):
            self._call(token)
        elif token.text in self._names:
            self._code.append(token.text)
        elif token.text in _FUNCTIONS:
            raise self._refuse("a function's arguments in (")
        else:
            raise self._refuse(f"a grader's name ({', '.join(sorted(self._names)) or 'there are none'})", token)

    def _call(self, name: _Token) -> None:
        if name.text not in _FUNCTIONS:
            raise self._refuse(f"a function ({', '.join(_FUNCTIONS)})", name)
        self._sum()
        num_arguments = 1
        while self._take(","):
            self._sum()
            num_arguments += 1
        if not self._take(")"):
            raise self._refuse("an operator, a comma or )")
        if num_arguments > 1 and name.text not in _ANY_NUMBER:
            raise self._refuse(f"one argument for {name.text}, not {num_arguments}", name)
        self._code.append(_Apply(name.text, num_arguments))
