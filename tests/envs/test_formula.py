"""Formulas of `multi`: their values against Python's own arithmetic, and what is refused where."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.arithmetic import MAX_CHARS, MAX_DEPTH, Formula, FormulaError
from envs.errors import UserError

SCORES = {"a": 0.5, "b": 2.0, "zero": 0.0, "less": -1.5, "größe_2": 3.0}


def value(text: str) -> float:
    return Formula(text, SCORES).evaluate(SCORES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", 0.5),
        ("  ( a )  ", 0.5),
        ("größe_2", 3.0),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("8 - 3 - 2", 3),
        ("8 / 4 / 2", 1),
        ("8 - 3 + 2", 7),
        ("2 ^ 3 ^ 2", 512),
        ("(2 ^ 3) ^ 2", 64),
        ("2 * 3 ^ 2", 18),
        ("-2 ^ 2", -4),
        ("(-2) ^ 2", 4),
        ("2 ^ -1", 0.5),
        ("2 ^ -2 ^ 2", 2**-4),
        ("- -a", 0.5),
        ("+a - -b", 2.5),
        ("2 * -b", -4),
        ("zero ^ 0", 1),
        (".5 + 5. + 1e-1 + 2E+1", 25.6),
        ("min(a, b, less)", -1.5),
        ("max(a, b, less)", 2),
        ("min(a)", 0.5),
        ("abs(less)", 1.5),
        ("floor(less)", -2),
        ("ceil(less)", -1),
        ("exp(1)", math.e),
        ("sqrt(b * b)", 2),
        ("log(exp(b))", 2),
        ("0.5 * a + 0.5 * max(0, 1 - abs(b - 2.5))", 0.5),
        ("min(1, a + b) * floor(a + 0.5)", 1),
    ],
)
def test_a_formula_has_the_value_of_ordinary_maths(text, expected):
    assert value(text) == pytest.approx(expected, rel=1e-15)


class Checked:
    """A float under Python's own operators, every result finite."""

    def __init__(self, number: float | complex) -> None:
        if isinstance(number, complex) or not math.isfinite(number):
            raise ArithmeticError(number)
        self.number = float(number)

    def __add__(self, other: Checked) -> Checked:
        return Checked(self.number + other.number)

    def __sub__(self, other: Checked) -> Checked:
        return Checked(self.number - other.number)

    def __mul__(self, other: Checked) -> Checked:
        return Checked(self.number * other.number)

    def __truediv__(self, other: Checked) -> Checked:
        return Checked(self.number / other.number)

    def __pow__(self, other: Checked) -> Checked:
        return Checked(self.number**other.number)

    def __neg__(self) -> Checked:
        return Checked(-self.number)

    def __pos__(self) -> Checked:
        return self

    def __lt__(self, other: Checked) -> bool:
        return self.number < other.number

    def __gt__(self, other: Checked) -> bool:
        return self.number > other.number


def checked(function: Callable[[float], float]) -> Callable[[Checked], Checked]:
    return lambda argument: Checked(function(argument.number))


PYTHON = {name: checked(getattr(math, name)) for name in ("floor", "ceil", "exp", "sqrt", "log")} | {
    "abs": checked(abs),
    "min": lambda *arguments: min(arguments),
    "max": lambda *arguments: max(arguments),
    "number": Checked,
}


# Each formula twice: as ours, and as Python would write it. Parts are joined bare, so that precedence and
# associativity decide; Python's `**` binds like `^`.
def joined(parts: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
    def binary(one: tuple[str, str], sign: str, other: tuple[str, str]) -> tuple[str, str]:
        return f"{one[0]}{sign}{other[0]}", f"{one[1]}{sign.replace('^', '**')}{other[1]}"

    def call(name: str, arguments: list[tuple[str, str]]) -> tuple[str, str]:
        ours, theirs = zip(*arguments, strict=True)
        return f"{name}({', '.join(ours)})", f"{name}({', '.join([*theirs, *theirs])})"

    def single(name: str, argument: tuple[str, str]) -> tuple[str, str]:
        return f"{name}({argument[0]})", f"{name}({argument[1]})"

    return st.one_of(
        st.builds(binary, parts, st.sampled_from("+-*/^"), parts),
        st.builds(lambda p, sign: (sign + p[0], sign + p[1]), parts, st.sampled_from("+-")),
        st.builds(lambda p: (f"({p[0]})", f"({p[1]})"), parts),
        # Arguments stand twice in Python's, whose min and max take no single one.
        st.builds(call, st.sampled_from(["min", "max"]), st.lists(parts, min_size=1, max_size=3)),
        st.builds(single, st.sampled_from(["abs", "floor", "ceil", "exp", "sqrt", "log"]), parts),
    )


numbers = st.sampled_from(["0", "1", "2", "3", "0.5", "1e3", "10", "0.1"]).map(lambda n: (n, f"number({n})"))
names = st.sampled_from(sorted(SCORES)).map(lambda n: (n, n))
formulas = st.recursive(numbers | names, joined, max_leaves=12)


@settings(max_examples=400)
@given(formulas)
def test_a_formula_agrees_with_python(formula):
    ours, theirs = formula
    variables = {name: Checked(score) for name, score in SCORES.items()}
    try:
        expected = eval(theirs, {"__builtins__": {}}, PYTHON | variables).number
    except (ArithmeticError, ValueError):
        with pytest.raises(FormulaError):
            value(ours)
    else:
        assert value(ours) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1 / zero", "division by zero: 1 / 0"),
        ("a / (b - 2)", "division by zero: 0.5 / 0"),
        ("sqrt(less)", "domain error: sqrt of -1.5"),
        ("log(zero)", "domain error: log of 0"),
        ("log(less)", "domain error: log of -1.5"),
        ("less ^ 0.5", r"domain error: \^ of -1.5, 0.5"),
        ("zero ^ -1", r"domain error: \^ of 0, -1"),
        ("exp(1000)", "overflow: exp of 1000"),
        ("10 ^ 400", r"overflow: \^ of 10, 400"),
        ("1e200 * 1e200", r"overflow: \* of 1e\+200, 1e\+200"),
        ("min(1, 0 * exp(1000))", "overflow: exp of 1000"),
    ],
)
def test_a_formula_without_a_value_says_why(text, why):
    with pytest.raises(FormulaError, match=f"^{why}$"):
        value(text)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_finite_number_is_named(score):
    with pytest.raises(FormulaError, match="the score of a is"):
        Formula("max(a, 1)", ["a"]).evaluate({"a": score})


@pytest.mark.parametrize(
    ("text", "place", "told"),
    [
        ("", 1, "expected a number, a grader's name, a function or (, found the end"),
        ("   ", 4, "expected a number, a grader's name, a function or (, found the end"),
        ("a +", 4, "expected a number, a grader's name, a function or (, found the end"),
        ("a b", 3, "expected an operator or the end, found 'b'"),
        ("2a", 2, "expected an operator or the end, found 'a'"),
        ("a ** b", 4, "expected a number, a grader's name, a function or (, found '*'"),
        ("(a", 3, "expected an operator or ), found the end"),
        ("a)", 2, "expected an operator or the end, found ')'"),
        ("1 + c", 5, "expected a grader's name (a, b, größe_2, less, zero), found 'c'"),
        ("A", 1, "expected a grader's name (a, b, größe_2, less, zero), found 'A'"),
        ("sin(a)", 1, "expected a function (min, max, abs, floor, ceil, exp, sqrt, log), found 'sin'"),
        ("a(1)", 1, "expected a function (min, max, abs, floor, ceil, exp, sqrt, log), found 'a'"),
        ("max", 4, "expected a function's arguments in (, found the end"),
        ("abs(a, b)", 1, "expected one argument for abs, not 2, found 'abs'"),
        ("log(8, 2)", 1, "expected one argument for log, not 2, found 'log'"),
        ("min()", 5, "expected a number, a grader's name, a function or (, found ')'"),
        ("min(a, )", 8, "expected a number, a grader's name, a function or (, found ')'"),
        ("min(a b)", 7, "expected an operator, a comma or ), found 'b'"),
        ("a, b", 2, "expected an operator or the end, found ','"),
        ("a % b", 3, "expected a number, a name, or one of + - * / ^ ( ) and a comma, found '%'"),
        ("a.real", 2, "expected a number, a name, or one of + - * / ^ ( ) and a comma, found '.'"),
        ("a['x']", 2, "expected a number, a name, or one of + - * / ^ ( ) and a comma, found '['"),
        ("'a'", 1, 'expected a number, a name, or one of + - * / ^ ( ) and a comma, found "\'"'),
        ("__import__('os')", 12, 'expected a number, a name, or one of + - * / ^ ( ) and a comma, found "\'"'),
        ("1e999", 1, "expected a smaller number, found '1e999'"),
        ("a if b else 1", 3, "expected an operator or the end, found 'if'"),
    ],
)
def test_a_formula_that_can_not_be_read_is_refused_with_its_place(text, place, told):
    with pytest.raises(UserError) as caught:
        Formula(text, SCORES)
    assert str(caught.value) == f"calculate_output: character {place}: {told}"


@pytest.mark.parametrize("opening", ["(", "-", "max(1, ", "2 ^ ", "abs("])
def test_nesting_is_bounded(opening):
    closing = ")" if "(" in opening else ""
    deepest = MAX_DEPTH - 1
    Formula(opening * deepest + "1" + closing * deepest, ())
    for depth in (MAX_DEPTH, MAX_CHARS // len(opening) // 3):
        with pytest.raises(UserError, match=f"at most {MAX_DEPTH} levels of nesting"):
            Formula(opening * depth + "1" + closing * depth, ())


def test_length_is_bounded_and_a_long_sum_is_no_deep_one():
    terms = MAX_CHARS // 2
    assert Formula("1+" * (terms - 1) + "1", ()).evaluate({}) == terms
    with pytest.raises(UserError, match="expected at most 10,000 characters, got 10,001"):
        Formula("1+" * terms + "1", ())


@given(st.text(alphabet="ab12.e+-*/^(), max", max_size=30))
def test_any_text_has_a_value_or_is_refused(text):
    try:
        result = value(text)
    except (UserError, FormulaError):
        return
    assert math.isfinite(result)


def test_a_formula_tells_which_scores_it_reads():
    assert Formula("max(a, 2) + a ^ b", SCORES).names == {"a", "b"}
    assert Formula("1", SCORES).names == frozenset()
    # A grader may be called like a function.
    assert Formula("max(max, 0.2)", ["max"]).evaluate({"max": 0.1}) == 0.2
