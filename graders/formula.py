"""The formula of a `multi` grader: a safe evaluator, without Python's own.

    sum     := product (("+" | "-") product)*
    product := signed (("*" | "/") signed)*
    signed  := ("-" | "+") signed | power
    power   := atom ("^" signed)?            so -2^2 is -4, and 2^3^2 is 2^9
    atom    := number | name | function "(" sum ("," sum)* ")" | "(" sum ")"

Covered: the text's length and nesting are bounded, and its faults are told with their place when it is read; evaluation
is a loop over a stack of floats, each of them finite. Not covered: names that are no identifiers (`f1-score` is a
difference).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from envs.errors import UserError

MAX_CHARS = 10_000
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)|(?P<sign>[-+*/^(),]))"
)
_SPACE = re.compile(r"\s*")
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": math.pow,
}
_ONE_ARGUMENT: dict[str, Callable[[float], float]] = {
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_MANY_ARGUMENTS: dict[str, Callable[..., float]] = {"min": min, "max": max}
_FUNCTIONS = (*_MANY_ARGUMENTS, *_ONE_ARGUMENT)


class FormulaError(ArithmeticError):
    """The formula has no value for these scores; the text says why."""


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
    function: Callable[..., float]
    num_arguments: int


class Formula:
    """A formula over the scores of named graders. Raises `UserError`, with the place, for a text that can't be read."""

    def __init__(self, text: str, names: Iterable[str]) -> None:
        if len(text) > MAX_CHARS:
            raise UserError(f"calculate_output: expected at most {MAX_CHARS:,} characters, got {len(text):,}")
        parser = _Parser(_tokens(text), frozenset(names))
        parser.read_all()
        self._code = tuple(parser.code)
        self.names = frozenset(step for step in self._code if isinstance(step, str))
        """The graders whose scores it reads."""

    def evaluate(self, scores: Mapping[str, float]) -> float:
        """The value for these scores. Raises `FormulaError` where there is no finite one, at any step."""
        stack: list[float] = []
        for step in self._code:
            if isinstance(step, _Apply):
                arguments = stack[-step.num_arguments :]
                del stack[-step.num_arguments :]
                stack.append(_applied(step, arguments))
            else:
                stack.append(scores[step] if isinstance(step, str) else step)
                if not math.isfinite(stack[-1]):
                    raise FormulaError(f"the score of {step} is {stack[-1]}")
        (value,) = stack
        return value


def _applied(step: _Apply, arguments: list[float]) -> float:
    given = ", ".join(f"{argument:g}" for argument in arguments)
    try:
        value = float(step.function(*arguments))
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
        raise UserError(
            f"calculate_output: character {space.end() + 1}: expected a number, a name, or one of + - * / ^ ( ) and a "
            f"comma, found {text[space.end()]!r}"
        )
    return [*tokens, _Token("end", "", len(text) + 1)]


class _Parser:
    """Recursive descent; writes the formula in postfix order into `code`."""

    def __init__(self, tokens: list[_Token], names: frozenset[str]) -> None:
        self.code: list[float | str | _Apply] = []
        self._tokens = tokens
        self._names = names
        self._next = 0
        self._depth = 0

    def read_all(self) -> None:
        self._sum()
        if self._token.kind != "end":
            raise self._refuse("an operator or the end")

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _refuse(self, expected: str, token: _Token | None = None) -> UserError:
        found = token or self._token
        return UserError(f"calculate_output: character {found.place}: expected {expected}, found {found}")

    def _take(self, *signs: str) -> str | None:
        if self._token.kind != "sign" or self._token.text not in signs:
            return None
        self._next += 1
        return self._tokens[self._next - 1].text

    def _operate(self, sign: str) -> None:
        self.code.append(_Apply(sign, _OPERATORS[sign], 2))

    def _sum(self) -> None:
        self._product()
        while sign := self._take("+", "-"):
            self._product()
            self._operate(sign)

    def _product(self) -> None:
        self._signed()
        while sign := self._take("*", "/"):
            self._signed()
            self._operate(sign)

    def _signed(self) -> None:
        # Every way down leads through here, so this alone bounds the recursion.
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refuse(f"at most {MAX_DEPTH} levels of nesting")
        if sign := self._take("+", "-"):
            self._signed()
            if sign == "-":
                self.code.append(_Apply("-", operator.neg, 1))
        else:
            self._atom()
            if self._take("^"):
                self._signed()
                self._operate("^")
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
            value = float(token.text)
            if not math.isfinite(value):
                raise self._refuse("a smaller number", token)
            self.code.append(value)
        elif self._take("("):
            self._call(token)
        elif token.text in self._names:
            self.code.append(token.text)
        else:
            what = "a function's arguments in (" if token.text in _FUNCTIONS else self._known()
            raise self._refuse(what, self._token if token.text in _FUNCTIONS else token)

    def _known(self) -> str:
        return f"a grader's name ({', '.join(sorted(self._names)) or 'there are none'})"

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
        if name.text in _MANY_ARGUMENTS:
            # Python's own min and max take a single number for a list.
            function = _MANY_ARGUMENTS[name.text] if num_arguments > 1 else operator.pos
        elif num_arguments == 1:
            function = _ONE_ARGUMENT[name.text]
        else:
            raise self._refuse(f"one argument for {name.text}, not {num_arguments}", name)
        self.code.append(_Apply(name.text, function, num_arguments))
