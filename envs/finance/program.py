"""FinQA's program language (Chen et al. 2021): reading a program, executing it, writing it as arithmetic.

    subtract(412.5, 398.1), divide(#0, 398.1)

A step is an operation on two arguments: a number (`412.5`, `1,234`, `5.2%` for 0.052), a constant (`const_100`,
`const_m1` for -1) or the result of an earlier step (`#0`). The operations are add, subtract, multiply, divide, exp (a
to the power of b) and greater (yes or no); table_max, table_min, table_sum and table_average take the label of a
table's row and `none`. The last step's result is the program's.

Differences from FinQA's own interpreter: exact decimals of 40 digits and no rounding to five places; a result of
`greater` can't be computed with; a label may hold commas and parentheses.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, DecimalException, localcontext

BINARY = ("add", "subtract", "multiply", "divide", "exp", "greater")
TABLE = ("table_max", "table_min", "table_sum", "table_average")
MAX_POWER = 100
_MAX_WRITTEN_POWER = 6
_CONTEXT = Context(prec=40)
_COMPUTE: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "exp": operator.pow,
}
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_NEXT_STEP = re.compile(rf"\)\s*,\s*(?=(?:{'|'.join(BINARY + TABLE)})\()")
_TABLE_CALL = re.compile(rf"(?:{'|'.join(TABLE)})\(.*?,\s*none\)")
_INNERMOST_CALL = re.compile(rf"(?:{'|'.join(BINARY)})\([^()]*\)")
_STEP = re.compile(r"\s*(?P<op>[a-z_]+)\((?P<args>.*)\)\s*", re.DOTALL)
_NUMBER = re.compile(r"-?\$?\s*(?P<digits>[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<percent>%?)")

Rows = Mapping[str, Sequence[Decimal]]
"""The rows of a report's tables: label → numbers."""


class ProgramError(ValueError):
    """A program that can't be read or has no value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """`#index`: the result of an earlier step."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operation."""

    op: str
    args: tuple[Decimal | Ref, ...]
    """Two; none for a table operation."""
    label: str = ""
    """The row of a table operation."""


def parse(program: str) -> tuple[Step, ...]:
    """The steps of a program. Raises `ProgramError`."""
    parts = _NEXT_STEP.split(program.strip())
    texts = [*(part + ")" for part in parts[:-1]), parts[-1]]
    return tuple(_step(text, index) for index, text in enumerate(texts))


def unnested(program: str) -> str:
    """The nested form, `divide(subtract(412.5, 398.1), 398.1)`, as steps; what is not of that form stays as it is."""
    steps: list[str] = []

    def take(call: re.Match[str]) -> str:
        steps.append(call[0])
        return f"#{len(steps) - 1}"

    rest, num_left = _TABLE_CALL.sub(take, program.strip()), 1
    while num_left:
        rest, num_left = _INNERMOST_CALL.subn(take, rest, count=1)
    return ", ".join(steps) if steps and rest == f"#{len(steps) - 1}" else program


def _step(text: str, index: int) -> Step:
    match = _STEP.fullmatch(text)
    if match is None:
        raise ProgramError(f"expected operation(argument, argument), got {text[:60]!r}")
    op, body = match["op"], match["args"]
    if op in TABLE:
        label, comma, none = body.rpartition(",")
        if not comma or none.strip() != "none" or not label.strip():
            raise ProgramError(f"{op}: expected (row label, none), got ({body[:60]})")
        return Step(op=op, args=(), label=label.strip())
    if op not in BINARY:
        raise ProgramError(f"unknown operation {op!r}; expected one of {', '.join(BINARY + TABLE)}")
    args = [a.strip() for a in re.split(r",\s+|,(?![0-9]{3}(?![0-9]))", body)]
    if len(args) != 2:
        raise ProgramError(f"{op}: expected two arguments, got ({body[:60]})")
    return Step(op=op, args=(_argument(args[0], index), _argument(args[1], index)))


def _argument(text: str, index: int) -> Decimal | Ref:
    if match := re.fullmatch(r"#([0-9]{1,3})", text):
        if int(match[1]) >= index:
            raise ProgramError(f"step {index}: {text} is no earlier step")
        return Ref(index=int(match[1]))
    if match := re.fullmatch(r"const_(m?)([0-9]+)", text):
        return Decimal(match[2]) * (-1 if match[1] else 1)
    number = read_number(text)
    if number is None:
        raise ProgramError(f"step {index}: expected a number, const_N or #N, got {text[:60]!r}")
    return number


def read_number(text: str) -> Decimal | None:
    """A number as it stands in a report: separators, `$`, parentheses for a negative, per cent as hundredths."""
    text = text.strip()
    negative = text.startswith("(") and text.endswith(")")
    match = _NUMBER.fullmatch(text[1:-1].strip() if negative else text)
    if match is None:
        return None
    value = Decimal(match["digits"].replace(",", ""))
    value = -value if negative or text.startswith("-") else value
    return value / 100 if match["percent"] else value


def execute(program: str, rows: Rows | None = None) -> Decimal | bool:
    """The program's result; a bool where it ends with `greater`. Raises `ProgramError`."""
    results: list[Decimal | bool] = []
    with localcontext(_CONTEXT):
        for step in parse(program):
            try:
                results.append(_value(step, results, rows or {}))
            except (DecimalException, ZeroDivisionError) as e:
                raise ProgramError(f"step {len(results)} ({step.op}) has no value: {type(e).__name__}") from e
    return results[-1]


def _value(step: Step, results: Sequence[Decimal | bool], rows: Rows) -> Decimal | bool:
    if step.op in TABLE:
        numbers = _row(step, rows)
        match step.op:
            case "table_max":
                return max(numbers)
            case "table_min":
                return min(numbers)
            case "table_sum":
                return sum(numbers, Decimal(0))
            case _:
                return sum(numbers, Decimal(0)) / len(numbers)
    a, b = (results[x.index] if isinstance(x, Ref) else x for x in step.args)
    if isinstance(a, bool) or isinstance(b, bool):
        raise ProgramError(f"{step.op}: yes and no can't be computed with")
    if step.op == "greater":
        return a > b
    if step.op == "exp" and abs(b) > MAX_POWER:
        raise ProgramError(f"exp: the power {b} is beyond {MAX_POWER}")
    value = _COMPUTE[step.op](a, b)
    if not value.is_finite():
        raise ProgramError(f"{step.op}: {a} and {b} give no finite number: it has no value")
    return value


def _row(step: Step, rows: Rows) -> Sequence[Decimal]:
    numbers = rows.get(step.label)
    if not numbers:
        raise ProgramError(f"{step.op}: no row {step.label[:60]!r} with numbers")
    return numbers


def expression(program: str, rows: Rows | None = None) -> str | None:
    """The program as arithmetic with + - * / and parentheses, for the calculate tool.

    None where there is nothing to compute or no such form: `greater`, the largest or smallest of a row, a power that
    is not a whole number from 1 to 6.
    """
    texts: list[str] = []
    for step in parse(program):
        if step.op in ("table_sum", "table_average"):
            numbers = _row(step, rows or {})
            total = " + ".join(_plain(n) for n in numbers)
            texts.append(total if step.op == "table_sum" else f"({total}) / {len(numbers)}")
            continue
        if step.op == "greater" or step.op in TABLE:
            return None
        left, right = (f"({texts[x.index]})" if isinstance(x, Ref) else _plain(x) for x in step.args)
        if step.op == "exp":
            power = step.args[1]
            if isinstance(power, Ref) or power not in range(1, _MAX_WRITTEN_POWER + 1):
                return None
            texts.append(" * ".join([left] * int(power)))
        else:
            texts.append(f"{left} {_SIGNS[step.op]} {right}")
    return texts[-1]


def _plain(number: Decimal) -> str:
    return f"({number:f})" if number < 0 else f"{number:f}"
