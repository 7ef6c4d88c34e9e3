"""Questions about full reports: each kind with its program in FinQA's language, and where its facts stand.

Every operation of the language occurs (`envs.finance.program`), in one to four steps. A question that FinQA would
answer with yes or no (`greater`) asks for 1 or 0, which the numeric grader can compare.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

from envs.finance.full.facts import Fact, OpenReport, Question
from envs.finance.full.reports import QUARTERS, FullReport
from envs.finance.full.tables import rows_of
from envs.finance.program import read_number

YES_NO_RULE = "Answer with one digit: one for yes, zero for no."
"""In words: an answer that repeats the question must not hold the gold number."""


class Asker:
    """Draws questions about the reports of one split."""

    def __init__(self, reports: Sequence[FullReport], rng: random.Random) -> None:
        self._by_path = {report.path: report for report in reports}
        self._by_year: dict[int, list[FullReport]] = {}
        for report in reports:
            self._by_year.setdefault(report.year, []).append(report)
        self._open: dict[str, OpenReport] = {}
        self.rng = rng

    def open(self, report: FullReport) -> OpenReport:
        if report.path not in self._open:
            self._open[report.path] = OpenReport(report)
        return self._open[report.path]

    def year_before(self, report: FullReport) -> OpenReport | None:
        path = f"{report.company.folder}/{report.year - 1}/annual-report.txt"
        return self.open(self._by_path[path]) if path in self._by_path else None

    def rival(self, report: FullReport) -> OpenReport:
        return self.open(self.rng.choice(self._by_year[report.year]))


INCOME = "Consolidated statements of income"
BALANCE = "Consolidated balance sheets"
_TWO_YEARS = (
    (INCOME, 0),
    (BALANCE, 0),
    ("Consolidated statements of cash flows", 0),
    ("Note: Segment information", 0),
    ("Note: Segment information", 1),
    ("Note: Debt", 0),
)
_ROW_WORDS = {
    "Five years": "over the five years of its selected financial data",
    "Unaudited": "over the four quarters",
    "Payments due": "over all the periods that it shows",
    "Operating leases": "over all the periods that it shows",
}


def in_words(label: str) -> str:
    return label[0].lower() + label[1:]


def _source(report: FullReport) -> str:
    return f"According to the {report.year} annual report of {report.company.name},"


def _line(asker: Asker, opened: OpenReport) -> str | None:
    """A line of any statement or note with two years, both above 0."""
    labels = opened.labels(*asker.rng.choice(_TWO_YEARS))
    return asker.rng.choice(labels) if labels else None


def _two_lines(asker: Asker, opened: OpenReport) -> tuple[str, str] | None:
    labels = [k for k in opened.labels(*asker.rng.choice(_TWO_YEARS)) if not k.endswith("(dollars)")]
    if len(labels) < 2:
        return None
    first, second = asker.rng.sample(labels, 2)
    return first, second


def _change(asker: Asker, opened: OpenReport) -> Question | None:
    report, label = opened.report, _line(asker, opened)
    if label is None:
        return None
    now, before = opened.pair(label)
    text = f"{_source(report)} by how much did {in_words(label)} change from {report.year - 1} to {report.year}?"
    program = f"subtract({now.plain}, {before.plain})"
    return Question(text=text, program=program, unit=now.unit, facts=(now, before), about=(label,), reports=(report,))


def _percentage(asker: Asker, opened: OpenReport) -> Question | None:
    report, label = opened.report, _line(asker, opened)
    if label is None:
        return None
    now, before = opened.pair(label)
    text = f"{_source(report)} by what percentage did {in_words(label)} change from {report.year - 1} to {report.year}?"
    program = f"subtract({now.plain}, {before.plain}), divide(#0, {before.plain})"
    return Question(text=text, program=program, unit="percent", facts=(now, before), about=(label,), reports=(report,))


def _sum(asker: Asker, opened: OpenReport) -> Question | None:
    report, labels = opened.report, _two_lines(asker, opened)
    if labels is None:
        return None
    x, y = (opened.fact(label) for label in labels)
    text = f"{_source(report)} what was the sum of {in_words(labels[0])} and {in_words(labels[1])} for {report.year}?"
    return Question(
        text=text, program=f"add({x.plain}, {y.plain})", unit=x.unit, facts=(x, y), about=labels, reports=(report,)
    )


def _ratio(asker: Asker, opened: OpenReport) -> Question | None:
    report, labels = opened.report, _two_lines(asker, opened)
    if labels is None:
        return None
    x, y = (opened.fact(label) for label in labels)
    if not Decimal("0.05") < x.number / y.number < 50:
        return None
    text = f"{_source(report)} what was the ratio of {in_words(labels[0])} to {in_words(labels[1])} for {report.year}?"
    return Question(
        text=text, program=f"divide({x.plain}, {y.plain})", unit="", facts=(x, y), about=labels, reports=(report,)
    )


def _product(asker: Asker, opened: OpenReport) -> Question | None:
    report, quarter = opened.report, asker.rng.choice(QUARTERS)
    label = f"{quarter} quarter repurchases"
    if not opened.has(label):
        return None
    shares, price = opened.pair(label)
    text = (
        f"{_source(report)} how much did it pay in all, in thousands of dollars, for the shares that it purchased in "
        "the "
        f"{quarter.lower()} quarter?"
    )
    program = f"multiply({shares.plain}, {price.plain})"
    return Question(
        text=text, program=program, unit="thousand", facts=(shares, price), about=(label,), reports=(report,)
    )


def _share(asker: Asker, opened: OpenReport) -> Question | None:
    report = opened.report
    assets = opened.labels(BALANCE)
    total = asker.rng.choice(("Total assets", "Total current assets"))
    parts = [k for k in assets[: assets.index(total)] if not k.startswith("Total")]
    first, second = asker.rng.sample(parts, 2)
    x, y, whole = (opened.fact(label) for label in (first, second, total))
    text = (
        f"{_source(report)} what percentage of {in_words(total)} were {in_words(first)} and {in_words(second)} "
        "together at "
        f"the end of {report.year}?"
    )
    program = f"add({x.plain}, {y.plain}), divide(#0, {whole.plain})"
    return Question(
        text=text, program=program, unit="percent", facts=(x, y, whole), about=(first, second, total), reports=(report,)
    )


def _average(asker: Asker, opened: OpenReport) -> Question | None:
    """Over two reports: the figure of the year before is the one first reported, restated or not."""
    report, earlier = opened.report, asker.year_before(opened.report)
    labels = [*opened.labels(INCOME), *opened.labels(BALANCE)]
    if earlier is None:
        return None
    label = asker.rng.choice(labels)
    if label not in (*earlier.labels(INCOME), *earlier.labels(BALANCE)):
        return None
    x, y = opened.fact(label), earlier.fact(label)
    text = (
        f"What was the average of {in_words(label)} of {report.company.name} over {report.year} and "
        f"{report.year - 1}, each as first "
        "reported in that year's own annual report?"
    )
    program = f"add({x.plain}, {y.plain}), divide(#0, const_2)"
    return Question(
        text=text, program=program, unit=x.unit, facts=(x, y), about=(label,), reports=(report, earlier.report)
    )


def _same_line(asker: Asker, opened: OpenReport) -> tuple[str, OpenReport] | None:
    """A line in amounts that another company's report of the same year has too."""
    other, labels = asker.rival(opened.report), [*opened.labels(INCOME), *opened.labels(BALANCE)]
    shared = {*other.labels(INCOME), *other.labels(BALANCE)}
    labels = [k for k in labels if k in shared and not k.endswith("(dollars)")]
    if other.report.company == opened.report.company or not labels:
        return None
    return asker.rng.choice(labels), other


def _full(fact: Fact) -> Decimal:
    return fact.number * (1000 if fact.unit == "million" else 1)


def _comparison(asker: Asker, opened: OpenReport) -> Question | None:
    found = _same_line(asker, opened)
    if found is None:
        return None
    label, other = found
    high, low = sorted((opened, other), key=lambda x: _full(x.fact(label)), reverse=True)
    x, y, year = high.fact(label), low.fact(label), opened.report.year
    match x.unit, y.unit:
        case "million", "thousand":
            program = f"divide({y.plain}, const_1000), subtract({x.plain}, #0)"
        case "thousand", "million":
            program = f"multiply({y.plain}, const_1000), subtract({x.plain}, #0)"
        case _:
            program = f"subtract({x.plain}, {y.plain})"
    text = (
        f"According to their {year} annual reports, by how much, in {x.unit}s of dollars, was {in_words(label)} of "
        f"{high.report.company.name} greater than that of {low.report.company.name} for {year}?"
    )
    return Question(
        text=text, program=program, unit=x.unit, facts=(x, y), about=(label,), reports=(high.report, low.report)
    )


def _greater(asker: Asker, opened: OpenReport) -> Question | None:
    found = _same_line(asker, opened)
    if found is None:
        return None
    label, other = found
    x, y, year = opened.fact(label), other.fact(label), opened.report.year
    if _full(x) == _full(y):
        return None
    match x.unit, y.unit:
        case "million", "thousand":
            program = f"multiply({x.plain}, const_1000), greater(#0, {y.plain})"
        case "thousand", "million":
            program = f"multiply({y.plain}, const_1000), greater({x.plain}, #0)"
        case _:
            program = f"greater({x.plain}, {y.plain})"
    text = (
        f"According to their {year} annual reports, was {in_words(label)} of {opened.report.company.name} for {year} "
        f"greater than that of {other.report.company.name}? {YES_NO_RULE}"
    )
    return Question(
        text=text, program=program, unit="", facts=(x, y), about=(label,), reports=(opened.report, other.report)
    )


def _table(op: str, words: str) -> Callable[[Asker, OpenReport], Question | None]:
    def ask(asker: Asker, opened: OpenReport) -> Question | None:
        report = opened.report
        wide = [
            (table, row)
            for _, table, row in rows_of(opened.sections)
            if len(row.cells) > 2 and all((read_number(c) or 0) > 0 for c in row.cells)
        ]
        table, row = asker.rng.choice(wide)
        over = next(text for start, text in _ROW_WORDS.items() if table.heading.startswith(start))
        facts = [opened.cell(row, i) for i in range(len(row.cells))]
        text = f"{_source(report)} what was the {words} {in_words(row.label)} {over}?"
        unit = "" if row.unit == "count" else row.unit
        return Question(
            text=text,
            program=f"{op}({row.label}, none)",
            unit=unit,
            facts=facts,
            about=(row.label,),
            reports=(report,),
            rows={row.label: [fact.number for fact in facts]},
        )

    return ask


def _per_employee(asker: Asker, opened: OpenReport) -> Question | None:
    report, label = opened.report, asker.rng.choice(opened.labels(INCOME)[:5])
    x = opened.fact(label)
    staff = opened.told("employees", f"{report.books[report.year]['Employees']:,}")
    scale = {"million": "const_1000000", "thousand": "const_1000"}[x.unit]
    text = f"{_source(report)} what was {in_words(label)} per employee, in dollars, in {report.year}?"
    program = f"multiply({x.plain}, {scale}), divide(#0, {staff.plain})"
    return Question(
        text=text, program=program, unit="dollars", facts=(x, staff), about=(label, "employees"), reports=(report,)
    )


def _projection(asker: Asker, opened: OpenReport) -> Question | None:
    report, label = opened.report, asker.rng.choice(opened.labels(INCOME)[:6])
    now, before = opened.pair(label)
    years = asker.rng.choice((2, 3))
    text = (
        f"{_source(report)} and if {in_words(label)} kept growing at the rate from {report.year - 1} to "
        f"{report.year}, what would it "
        f"be {years} years after {report.year}?"
    )
    program = f"divide({now.plain}, {before.plain}), exp(#0, const_{years}), multiply(#1, {now.plain})"
    return Question(text=text, program=program, unit=now.unit, facts=(now, before), about=(label,), reports=(report,))


def _rates(asker: Asker, opened: OpenReport) -> tuple[str, list[Fact]]:
    """A line of the statement of income beside revenue: this year's pair, then that of the year before."""
    label = asker.rng.choice([k for k in opened.labels(INCOME)[1:] if not k.endswith("(dollars)")])
    return label, [opened.fact(k, column) for column in (0, 1) for k in (label, "Revenue")]


def _rate_change(asker: Asker, opened: OpenReport) -> Question | None:
    report, (label, facts) = opened.report, _rates(asker, opened)
    x, y, u, v = (fact.plain for fact in facts)
    text = (
        f"{_source(report)} by how many percentage points did {in_words(label)} as a percentage of revenue change from "
        f"{report.year - 1} to {report.year}?"
    )
    program = f"divide({x}, {y}), divide({u}, {v}), subtract(#0, #1)"
    return Question(
        text=text, program=program, unit="percent", facts=facts, about=(label, "Revenue"), reports=(report,)
    )


def _mean_rate(asker: Asker, opened: OpenReport) -> Question | None:
    report, (label, facts) = opened.report, _rates(asker, opened)
    x, y, u, v = (fact.plain for fact in facts)
    text = (
        f"{_source(report)} what was the average over {report.year - 1} and {report.year} of {in_words(label)} as a "
        "percentage of "
        "each year's revenue?"
    )
    program = f"divide({x}, {y}), divide({u}, {v}), add(#0, #1), divide(#2, const_2)"
    return Question(
        text=text, program=program, unit="percent", facts=facts, about=(label, "Revenue"), reports=(report,)
    )


ASK: Mapping[str, Callable[[Asker, OpenReport], Question | None]] = {
    "change": _change,
    "percentage": _percentage,
    "comparison": _comparison,
    "sum": _sum,
    "product": _product,
    "ratio": _ratio,
    "greater": _greater,
    "table_max": _table("table_max", "largest"),
    "table_min": _table("table_min", "smallest"),
    "table_sum": _table("table_sum", "total of"),
    "table_average": _table("table_average", "average of"),
    "share": _share,
    "average": _average,
    "per_employee": _per_employee,
    "projection": _projection,
    "rate_change": _rate_change,
    "mean_rate": _mean_rate,
}
"""By kind; None where the drawn report has nothing to ask so."""
