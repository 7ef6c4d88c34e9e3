"""Short generated reports, year by year, and the distractors among them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal

from envs.finance.companies import Company, choose_eval_families, make_companies
from envs.finance.config import FinanceConfig

TABLE_METRICS = ("revenue", "profit", "debt")
TEXT_METRIC = "employees"
"""Stands in the sentence below the table, of the report's own year only; a count without a unit."""
# Amounts have at most four digits in either unit, because a small model copies short numbers. None looks like a year,
# no profit exceeds its revenue, and of one metric any amount in thousands is below any amount in millions.
_STEP = {"million": Decimal("0.1"), "thousand": Decimal(1)}
_STEPS = {"revenue": (2200, 9999), "profit": (200, 1899), "debt": (2200, 9999)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One yearly report."""

    company: Company
    year: int
    figures: Mapping[str, tuple[Decimal, Decimal]]
    """Table: metric → (this year, the year before), in the company's unit."""
    employees: int
    restated: str | None
    """The metric whose figure of the year before differs from the one first reported."""

    @property
    def path(self) -> str:
        return f"{self.company.folder}/{self.year}.txt"

    def text(self) -> str:
        """The file's content, about 75 tokens."""
        lines = [
            f"{self.company.name}, {self.company.unit}s of dollars | {self.year} | {self.year - 1}",
            *(f"{metric} | {now} | {before}" for metric, (now, before) in self.figures.items()),
        ]
        note = f" The {self.year - 1} {self.restated} is restated." if self.restated else ""
        return "\n".join([*lines, f"It had {self.employees} employees.{note}"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """All reports; every split's tools see all of them."""

    companies: tuple[Company, ...]
    reports: Mapping[str, Report]
    """By path, in the order of companies and years."""
    eval_families: frozenset[str]

    def split_of(self, company: Company) -> str:
        """`train` or `eval`."""
        return "eval" if company.family in self.eval_families else "train"

    def report(self, company: Company, year: int) -> Report:
        """Raises KeyError where there is none."""
        return self.reports[f"{company.folder}/{year}.txt"]


def generate_corpus(config: FinanceConfig) -> Corpus:
    """The corpus of this config: a pure function of it, in time linear in the number of reports.

    Each company draws from a generator of its own, so that its figures depend on the seed and its name alone and do
    not move when the corpus grows.
    """
    companies = make_companies(config)
    reports = {report.path: report for company in companies for report in _reports(company, config)}
    return Corpus(companies=companies, reports=reports, eval_families=choose_eval_families(config, companies))


def _reports(company: Company, config: FinanceConfig) -> Iterator[Report]:
    rng = random.Random(f"{config.seed}/{company.folder}")
    employees = rng.randint(120, 900)
    before = {metric: rng.randint(*bounds) for metric, bounds in _STEPS.items()}
    step = _STEP[company.unit]
    for year in range(config.first_year, config.first_year + config.num_years):
        now = {metric: _moved(rng, metric, steps, 0.75, 1.3) for metric, steps in before.items()}
        employees = max(101, min(999, employees + rng.choice((-1, 1)) * rng.randint(3, 60)))
        shown, restated = dict(before), None
        # The first report has no earlier one that it could differ from.
        if year > config.first_year and rng.random() < config.restated_share:
            restated = rng.choice(TABLE_METRICS)
            shown[restated] = _moved(rng, restated, before[restated], 0.9, 1.1)
        figures = {metric: (now[metric] * step, shown[metric] * step) for metric in TABLE_METRICS}
        yield Report(company=company, year=year, figures=figures, employees=employees, restated=restated)
        before = now


def _moved(rng: random.Random, metric: str, steps: int, low: float, high: float) -> int:
    """The amount, in steps, times a factor from [low, high]; kept within the metric's bounds, never the same."""
    least, most = _STEPS[metric]
    moved = max(least, min(most, int(steps * rng.uniform(low, high))))
    if moved == steps:
        moved += 7 if steps < most - 7 else -7
    return moved
