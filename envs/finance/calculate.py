"""Arithmetic for the `calculate` tool: + - * / and parentheses, exact decimals, nothing else."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from decimal import Decimal, DecimalException

from envs.errors import ToolError

MAX_CHARS = 200
MAX_RESULT = Decimal(10) ** 15

_OPERATORS: dict[type[ast.operator], Callable[[Decimal, Decimal], Decimal]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_THOUSANDS_SEPARATOR = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text; see `format_number` for its digits.

    Numbers may have thousands separators. Raises `ToolError` for anything but numbers and + - * / ( ), for an
    expression of more than 200 characters, a division by zero and a result of 10^15 or more.
    """
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression is longer than {MAX_CHARS} characters")
    # The characters are checked before Python's parser sees the text: no name, string, exponent or newline gets there.
    if not re.fullmatch(r"[0-9.,+\-*/() ]*[0-9][0-9.,+\-*/() ]*", expression):
        raise ToolError("use only numbers and + - * / ( )")
    try:
        tree = ast.parse(_THOUSANDS_SEPARATOR.sub("", expression).strip(), mode="eval")
        value = _value(tree.body)
    except ZeroDivisionError as e:
        raise ToolError("division by zero") from e
    except (SyntaxError, DecimalException) as e:
        raise ToolError("not an arithmetic expression") from e
    if abs(value) >= MAX_RESULT:
        raise ToolError("the result is too large")
    return format_number(value)


def _value(node: ast.expr) -> Decimal:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Decimal(repr(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ToolError("use only numbers and + - * / ( )")


def format_number(value: Decimal) -> str:
    """Two decimals, below 1 four significant digits; no trailing zeros, no exponent."""
    digits = 2 if abs(value) >= 1 or value == 0 else 3 - value.adjusted()
    # Very small results have no four digits worth showing.
    rounded = round(value, min(digits, 12))
    text = f"{rounded:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
