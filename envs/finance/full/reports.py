"""Full reports: statements, notes and text of one company and year, as sections of paragraphs and tables."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from envs.finance.companies import Company
from envs.finance.full import prose
from envs.finance.full.books import Lines
from envs.finance.full.tables import Section, Table, TableRow, amount, cents, per_mille, split


@dataclass(frozen=True, slots=True, kw_only=True)
class FullReport:
    """What a report is written from. The text is a pure function of it."""

    company: Company
    year: int
    seed: int
    books: Mapping[int, Lines]
    """Completed lines of this year and the four before it; those of the year before as this report shows them."""
    restated: str = ""
    """The leaf of the year before that differs from what was first reported."""
    is_draft: bool = False
    notes: frozenset[str] = field(default_factory=frozenset)
    """Titles of the notes that this company has."""

    @property
    def path(self) -> str:
        return f"{self.company.folder}/{self.year}/{'draft-' if self.is_draft else ''}annual-report.txt"

    @property
    def opening(self) -> str:
        """The first lines; what a short description of the document would say."""
        draft = "DRAFT, not for publication. All figures are subject to change.\n" if self.is_draft else ""
        return (
            f"{draft}{self.company.name}\nAnnual report {self.year}\n"
            f"For the fiscal year ended December 31, {self.year}. "
            f"Amounts in {self.company.unit}s of dollars unless stated otherwise."
        )

    def sections(self) -> list[Section]:
        made = (write(self) for title, write in SECTIONS.items() if title not in NOTES or title in self.notes)
        return [section for section in made if section is not None]

    def text(self) -> str:
        sections = self.sections()
        contents = "Contents: " + "; ".join(section.title for section in sections)
        head = f"{self.company.name} {self.year} {'draft ' if self.is_draft else ''}annual report"
        return "\n\n".join([self.opening, contents, *(section.text(head) for section in sections)])

    def amount(self, label: str, year: int | None = None) -> str:
        """A line's amount as it is written, in the company's unit."""
        return amount(self.books[self.year if year is None else year][label], self.company.unit)

    def rng(self, *parts: object) -> random.Random:
        """For details that belong to the company and the parts, the same in every report that shows them."""
        return random.Random("/".join(map(str, (self.seed, self.company.folder, *parts))))


def _statement(report: FullReport, heading: str, labels: Sequence[str], years: Sequence[int] = ()) -> Table:
    years = years or (report.year, report.year - 1)
    return Table(
        heading=heading, columns=tuple(map(str, years)), rows=tuple(_line(report, label, years) for label in labels)
    )


def _line(report: FullReport, label: str, years: Sequence[int]) -> TableRow:
    values = [report.books[year][label] for year in years]
    if label.endswith("per share"):
        return TableRow(label=f"{label} (dollars)", cells=tuple(map(cents, values)), unit="dollars")
    if label == "Employees":
        return TableRow(label=label, cells=tuple(f"{v:,}" for v in values), unit="count")
    unit = report.company.unit
    return TableRow(label=label, cells=tuple(amount(v, unit) for v in values), unit=unit)


def _in_unit(report: FullReport) -> str:
    return f"(in {report.company.unit}s of dollars)"


def _business(report: FullReport) -> Section:
    rng = report.rng("business")
    sector = report.company.family.rsplit(" ", 1)[-1].lower()
    chosen = rng.sample(prose.BUSINESS[1:], rng.randint(1, 3))
    backlog = (f"${report.amount('Backlog', year)} {report.company.unit}" for year in (report.year, report.year - 1))
    facts = (
        f"At December 31, {report.year} we had {report.books[report.year]['Employees']:,} employees. Our backlog of "
        "orders was "
        f"{next(backlog)}, against {next(backlog)} a year earlier."
    )
    return Section(
        title="Business",
        paragraphs=(prose.BUSINESS[0].format(name=report.company.name, sector=sector), *chosen, facts),
    )


def _risks(report: FullReport) -> Section:
    rng = report.rng("risks")
    return Section(title="Risk factors", paragraphs=tuple(rng.sample(prose.RISKS, rng.randint(1, len(prose.RISKS)))))


FIVE_YEARS = ("Revenue", "Operating income", "Net income", "Total assets", "Total debt", "Diluted earnings per share")


def _selected(report: FullReport) -> Section:
    years = tuple(range(report.year, report.year - 5, -1))
    labels = (*FIVE_YEARS, "Dividends per share", "Employees")
    return Section(
        title="Selected financial data",
        tables=(_statement(report, f"Five years {_in_unit(report)}", labels, years),),
    )


def _discussion(report: FullReport) -> Section:
    rng = report.rng("discussion", report.year)
    paragraphs = []
    for line in ("Revenue", "Gross profit", "Operating income"):
        grew = report.books[report.year][line] > report.books[report.year - 1][line]
        words = rng.choice(prose.UP if grew else prose.DOWN)
        paragraphs.append(words.format(line=line, year=report.year, before=report.year - 1))
    paragraphs.append(
        f"Advertising expense was ${report.amount('Advertising expense')} {report.company.unit} in {report.year} and "
        f"${report.amount('Advertising expense', report.year - 1)} {report.company.unit} in {report.year - 1}. "
        "Interest on our debt and "
        "dividends were paid out of cash from operations."
    )
    return Section(title="Management's discussion and analysis", paragraphs=tuple(paragraphs))


def _income(report: FullReport) -> Section:
    labels = (
        *("Revenue", "Cost of revenue", "Gross profit", "Research and development"),
        *("Selling, general and administrative", "Depreciation and amortization", "Total operating expenses"),
        *("Operating income", "Interest expense", "Other income, net", "Income before income taxes"),
        *("Income tax expense", "Net income", "Basic earnings per share", "Diluted earnings per share"),
    )
    note = ""
    if report.restated:
        note = (
            f"{report.restated} of {report.year - 1}, and all amounts that depend on it, are restated: they differ "
            "from those in "
            f"the {report.year - 1} annual report because an error was corrected."
        )
    table = _statement(report, f"{_in_unit(report)}, except per share", labels)
    return Section(title="Consolidated statements of income", paragraphs=(note,) if note else (), tables=(table,))


def _balance(report: FullReport) -> Section:
    labels = (
        *("Cash and cash equivalents", "Short-term investments", "Accounts receivable, net", "Inventories"),
        *("Prepaid expenses and other current assets", "Total current assets", "Property, plant and equipment, net"),
        *("Goodwill", "Intangible assets, net", "Other assets", "Total assets", "Accounts payable"),
        *("Accrued liabilities", "Current portion of long-term debt", "Total current liabilities", "Long-term debt"),
        *("Deferred income taxes", "Other liabilities", "Total liabilities"),
        *("Common stock and additional paid-in capital", "Retained earnings", "Total shareholders' equity"),
    )
    return Section(title="Consolidated balance sheets", tables=(_statement(report, _in_unit(report), labels),))


def _cash(report: FullReport) -> Section:
    labels = (
        *("Net income", "Depreciation and amortization", "Stock-based compensation"),
        *("Changes in working capital and other", "Net cash from operating activities", "Capital expenditures"),
        *("Acquisitions, net of cash acquired", "Net cash from investing activities"),
        *("Proceeds from issuance of debt", "Repayments of debt", "Dividends paid", "Repurchases of common stock"),
        *("Net cash from financing activities", "Net change in cash"),
    )
    return Section(
        title="Consolidated statements of cash flows", tables=(_statement(report, _in_unit(report), labels),)
    )


def _policies(report: FullReport) -> Section:
    rng = report.rng("policies")
    chosen = rng.sample(prose.POLICIES[1:], rng.randint(3, len(prose.POLICIES) - 1))
    return Section(
        title="Note: Significant accounting policies",
        paragraphs=(prose.POLICIES[0].format(name=report.company.name), *chosen),
    )


def _parts(report: FullReport, heading: str, total: str, names: Sequence[str], template: str, key: str) -> Table:
    """A line divided among parts, for this year and the one before."""
    columns = [split(report.books[y][total], len(names), report.rng(key, y)) for y in (report.year, report.year - 1)]
    unit = report.company.unit
    rows = [
        TableRow(label=template.format(name), cells=tuple(amount(column[i], unit) for column in columns), unit=unit)
        for i, name in enumerate(names)
    ]
    return Table(
        heading=heading,
        columns=(str(report.year), str(report.year - 1)),
        rows=(*rows, _line(report, total, (report.year, report.year - 1))),
    )


def _segments(report: FullReport) -> Section:
    names = report.rng("segments").choice(prose.SEGMENTS)
    words = f"We report {len(names)} segments: {', '.join(names)}. Corporate costs are allocated by revenue."
    tables = (
        _parts(
            report, f"Revenue by segment {_in_unit(report)}", "Revenue", names, "{} segment revenue", "segment revenue"
        ),
        _parts(report, f"Revenue by region {_in_unit(report)}", "Revenue", prose.REGIONS, "Revenue in {}", "regions"),
    )
    return Section(title="Note: Segment information", paragraphs=(words,), tables=tables)


def _debt(report: FullReport) -> Section:
    rng = report.rng("debt")
    rates = sorted(rng.sample(range(28, 89), 2))
    names = [
        f"{rate / 10:.1f}% senior notes due {report.year + years}"
        for rate, years in zip(rates, (rng.randint(3, 5), rng.randint(6, 12)), strict=True)
    ]
    table = _parts(
        report,
        f"Debt {_in_unit(report)}",
        "Total debt",
        [*names, "Term loan", "Revolving credit facility"],
        "{}",
        "debt",
    )
    due = split(report.books[report.year]["Total debt"], 6, report.rng("maturities", report.year))
    unit = report.company.unit
    years = (*(str(report.year + i) for i in range(1, 6)), "later")
    maturities = Table(
        heading=f"Payments due {_in_unit(report)}",
        columns=years,
        rows=(TableRow(label="Maturities of long-term debt", cells=tuple(amount(v, unit) for v in due), unit=unit),),
    )
    words = f"The weighted average interest rate of our debt was {sum(rates) / 20:.1f}%. We met all covenants."
    return Section(title="Note: Debt", paragraphs=(words,), tables=(table, maturities))


def _pay(report: FullReport) -> Section:
    rng = report.rng("options", report.year)
    before, granted = rng.randint(3000, 9000), rng.randint(500, 2000)
    exercised, forfeited = rng.randint(200, 1500), rng.randint(50, 400)
    counts = {
        f"Outstanding at December 31, {report.year - 1}": before,
        "Options granted": granted,
        "Options exercised": -exercised,
        "Options forfeited": -forfeited,
        f"Outstanding at December 31, {report.year}": before + granted - exercised - forfeited,
    }
    prices = [cents(rng.randint(900, 6500)) for _ in counts]
    rows = tuple(
        TableRow(label=label, cells=(amount(n, "thousand"), price), unit="thousand")
        for (label, n), price in zip(counts.items(), prices, strict=True)
    )
    words = (
        f"Stock-based compensation was ${report.amount('Stock-based compensation')} {report.company.unit} in "
        f"{report.year}. Options "
        "vest over four years and lapse after ten."
    )
    columns = ("options (thousands)", "average exercise price (dollars)")
    table = Table(heading="Stock options", columns=columns, rows=rows)
    return Section(title="Note: Stock-based compensation", paragraphs=(words,), tables=(table,))


def _taxes(report: FullReport) -> Section:
    years = (report.year, report.year - 1)
    rates = {
        "Statutory federal rate": [350, 350],
        **{k: [report.books[y][k] for y in years] for k in ("State taxes, net", "Foreign rate differential")},
        "Effective tax rate": [report.books[y]["Effective tax rate"] for y in years],
    }
    rows = tuple(TableRow(label=k, cells=tuple(map(per_mille, v)), unit="percent") for k, v in rates.items())
    table = Table(heading="Reconciliation of the tax rate", columns=tuple(map(str, years)), rows=rows)
    open_years = (
        f"${report.amount('Unrecognized tax benefits', y)} {report.company.unit} at the end of {y}" for y in years
    )
    words = f"Unrecognized tax benefits were {' and '.join(open_years)}."
    return Section(title="Note: Income taxes", paragraphs=(words,), tables=(table,))


def _leases(report: FullReport) -> Section:
    rng, unit = report.rng("leases", report.year), report.company.unit
    due = [
        int(report.books[report.year]["Rent expense"] * share * rng.uniform(0.9, 1.1)) + 5
        for share in (1, 0.9, 0.8, 0.6, 0.5, 1.4)
    ]
    years = (*(str(report.year + i) for i in range(1, 6)), "later")
    table = Table(
        heading=f"Operating leases {_in_unit(report)}",
        columns=years,
        rows=(TableRow(label="Minimum lease payments", cells=tuple(amount(v, unit) for v in due), unit=unit),),
    )
    rent = (f"${report.amount('Rent expense', year)} {unit} in {year}" for year in (report.year, report.year - 1))
    words = f"Rent expense was {' and '.join(rent)}."
    return Section(title="Note: Leases", paragraphs=(words,), tables=(table,))


def _repurchases(report: FullReport) -> Section:
    rng = report.rng("repurchases", report.year)
    rows = tuple(
        TableRow(
            label=f"{quarter} quarter repurchases",
            cells=(amount(rng.randint(110, 1890), "thousand"), cents(rng.randint(1100, 9000))),
            unit="thousand",
        )
        for quarter in QUARTERS
    )
    columns = ("shares purchased (thousands)", "average price paid per share (dollars)")
    table = Table(heading="Purchases of our own shares", columns=columns, rows=rows)
    return Section(title="Note: Repurchases of common stock", tables=(table,))


def _quarters(report: FullReport) -> Section:
    unit = report.company.unit
    rows = tuple(
        TableRow(
            label=f"Quarterly {line.lower()}",
            cells=tuple(
                amount(v, unit)
                for v in split(report.books[report.year][line], 4, report.rng("quarters", line, report.year), 0.15)
            ),
            unit=unit,
        )
        for line in ("Revenue", "Gross profit", "Selling, general and administrative")
    )
    table = Table(heading=f"Unaudited {_in_unit(report)}", columns=QUARTERS, rows=rows)
    return Section(title="Note: Quarterly results", tables=(table,))


def _commitments(report: FullReport) -> Section:
    words = (
        f"Purchase commitments were ${report.amount('Purchase commitments')} {report.company.unit} at December 31, "
        f"{report.year} and "
        f"${report.amount('Purchase commitments', report.year - 1)} {report.company.unit} at December 31, "
        f"{report.year - 1}. "
        "We are party to proceedings of the ordinary course of business, and expect no material loss from them."
    )
    return Section(title="Note: Commitments and contingencies", paragraphs=(words,))


QUARTERS = ("First", "Second", "Third", "Fourth")
SECTIONS: Mapping[str, Callable[[FullReport], Section]] = {
    "business": _business,
    "risks": _risks,
    "selected": _selected,
    "discussion": _discussion,
    "income": _income,
    "balance": _balance,
    "cash": _cash,
    "policies": _policies,
    "segments": _segments,
    "debt": _debt,
    "pay": _pay,
    "taxes": _taxes,
    "leases": _leases,
    "repurchases": _repurchases,
    "quarters": _quarters,
    "commitments": _commitments,
}
NOTES = ("segments", "debt", "pay", "taxes", "leases", "repurchases", "quarters", "commitments")
"""The sections that not every company has."""
