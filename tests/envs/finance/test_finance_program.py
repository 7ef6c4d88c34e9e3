"""FinQA's program language: programs against values computed by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.arithmetic import calculate, format_number
from envs.finance.program import ProgramError, execute, expression, read_number

ROWS = {
    "Revenue": [Decimal("10.5"), Decimal("-2"), Decimal("3.5")],
    "options, granted (in thousands)": [Decimal(4), Decimal(6)],
    "nothing": [],
}


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("add(1.5, 2)", "3.5"),
        ("subtract(5829, 5735)", "94"),
        ("multiply(974, 35.09)", "34177.66"),
        ("divide(7, 8)", "0.875"),
        ("exp(1.5, 3)", "3.375"),
        ("exp(4, 0.5)", "2"),
        ("exp(2, const_m1)", "0.5"),
        ("subtract(412.5, 400), divide(#0, 400)", "0.03125"),
        ("divide(3, 4), divide(1, 4), subtract(#0, #1)", "0.5"),
        ("add(1, 2), add(#0, 3), multiply(#0, #1), divide(#2, const_2)", "9"),
        ("divide(12, 10), exp(#0, const_2), multiply(12, #1)", "17.28"),
        ("add(5%, 2.5%)", "0.075"),
        ("add(1,234, $2)", "1236"),
        ("add(5829,5735)", "11564"),
        ("subtract(-5, const_100)", "-105"),
        ("multiply(const_1000000, 2)", "2000000"),
        ("table_max(Revenue, none)", "10.5"),
        ("table_min(Revenue, none)", "-2"),
        ("table_sum(Revenue, none)", "12"),
        ("table_average(Revenue, none)", "4"),
        ("table_sum(options, granted (in thousands), none), divide(#0, 4)", "2.5"),
        ("  add( 1 , 2 ) ,subtract( #0 , 1 )  ", "2"),
    ],
)
def test_a_program_gives_the_value_computed_by_hand(program: str, result: str) -> None:
    assert execute(program, ROWS) == Decimal(result)


@pytest.mark.parametrize(
    ("program", "result"),
    [("greater(2, 1)", True), ("greater(1, 2)", False), ("greater(1, 1)", False), ("add(1, 1), greater(#0, 1)", True)],
)
def test_greater_says_yes_or_no(program: str, result: bool) -> None:
    assert execute(program) is result


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("", "expected operation"),
        ("add", "expected operation"),
        ("modulo(1, 2)", "unknown operation 'modulo'"),
        ("add(1)", "two arguments"),
        ("add(1, 2, 3)", "two arguments"),
        ("add(1, x)", "expected a number"),
        ("add(#0, 1)", "#0 is no earlier step"),
        ("add(1, 2), add(#1, 1)", "#1 is no earlier step"),
        ("divide(1, 0)", "has no value"),
        ("exp(0, const_m1)", "has no value"),
        ("exp(2, 101)", "beyond 100"),
        ("exp(-2, 0.5)", "has no value"),
        ("greater(2, 1), add(#0, 1)", "yes and no"),
        ("table_max(Profit, none)", "no row 'Profit'"),
        ("table_max(nothing, none)", "no row 'nothing'"),
        ("table_max(Revenue, 3)", "row label, none"),
        ("table_max(none)", "row label, none"),
    ],
)
def test_a_program_that_has_no_value_says_why(program: str, fault: str) -> None:
    with pytest.raises(ProgramError, match=fault):
        execute(program, ROWS)


@pytest.mark.parametrize(
    ("program", "arithmetic"),
    [
        ("subtract(412.5, 400), divide(#0, 400)", "(412.5 - 400) / 400"),
        ("exp(1.5, 3)", "1.5 * 1.5 * 1.5"),
        ("table_average(Revenue, none)", "(10.5 + (-2) + 3.5) / 3"),
        ("table_max(Revenue, none)", None),
        ("greater(1, 2)", None),
        ("exp(4, 0.5)", None),
    ],
)
def test_programs_are_written_as_arithmetic_where_they_can_be(program: str, arithmetic: str | None) -> None:
    assert expression(program, ROWS) == arithmetic


_NUMBERS = st.decimals(-9999, 9999, places=2)
_OPS = st.sampled_from(["add", "subtract", "multiply", "divide"])


@given(numbers=st.lists(_NUMBERS, min_size=5, max_size=5), ops=st.lists(_OPS, min_size=4, max_size=4))
def test_the_calculator_agrees_with_the_program(numbers: list[Decimal], ops: list[str]) -> None:
    steps = [f"{ops[0]}({numbers[0]}, {numbers[1]})"]
    steps += [f"{op}(#{i}, {numbers[i + 2]})" for i, op in enumerate(ops[1:])]
    program = ", ".join(steps)
    try:
        value = execute(program)
    except ProgramError:
        assert any(op == "divide" for op in ops)
        return
    arithmetic = expression(program)
    assert not isinstance(value, bool)
    if abs(value) < 10**15 and arithmetic is not None and len(arithmetic) <= 200:
        assert abs(Decimal(calculate(arithmetic)) - Decimal(format_number(value))) <= Decimal("0.01")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", "1234.5"),
        ("$ 9.4", "9.4"),
        ("(12.5)", "-12.5"),
        ("( 12.5% )", "-0.125"),
        ("-$3", "-3"),
        ("3.0%", "0.03"),
        (".5", "0.5"),
        ("-", None),
        ("", None),
        ("12 people", None),
        ("2019-2020", None),
    ],
)
def test_numbers_are_read_as_reports_write_them(text: str, value: str | None) -> None:
    assert read_number(text) == (None if value is None else Decimal(value))
