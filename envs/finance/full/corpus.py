"""The full corpus: thousands of long reports with drafts, press releases and restatements among them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from envs.finance.companies import Company, choose_eval_families, make_companies
from envs.finance.config import FinanceConfig
from envs.finance.full.books import RESTATABLE, Lines, complete, keep_books, restate
from envs.finance.full.reports import FIVE_YEARS, NOTES, FullReport
from envs.finance.full.tables import amount, cents

_NOTE_SHARE = 0.75
"""Probability that a company has a certain note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FullCorpus:
    """All documents; every split's tools see all of them."""

    companies: tuple[Company, ...]
    reports: Mapping[str, FullReport]
    """The annual reports by path; drafts are not among them."""
    texts: Mapping[str, str]
    """Every document by path."""
    eval_families: frozenset[str]

    def split_of(self, company: Company) -> str:
        """`train` or `eval`."""
        return "eval" if company.family in self.eval_families else "train"


def generate_full(config: FinanceConfig) -> FullCorpus:
    """The corpus of this config: a pure function of it. A company's documents depend on the seed and its name alone."""
    companies = make_companies(config)
    reports: dict[str, FullReport] = {}
    texts: dict[str, str] = {}
    for company in companies:
        for report in _reports(company, config):
            reports[report.path] = report
            texts[report.path] = report.text()
            texts.update(_distractors(report, config))
    return FullCorpus(
        companies=companies, reports=reports, texts=texts, eval_families=choose_eval_families(config, companies)
    )


def _reports(company: Company, config: FinanceConfig) -> Iterator[FullReport]:
    rng = random.Random(f"{config.seed}/{company.folder}/books")
    latest = (config.last_year or config.first_year + config.num_years - 1) - config.num_years + 1
    first = rng.randint(config.first_year, latest)
    notes = frozenset(note for note in NOTES if rng.random() < _NOTE_SHARE)
    # Each report shows five years, and the earliest of them needs the cash of the year before.
    leaves = keep_books(rng, company.unit, range(first - 5, first + config.num_years))
    books = {year: _completed(leaves, year) for year in range(first - 4, first + config.num_years)}
    for year in range(first, first + config.num_years):
        shown, restated = {y: books[y] for y in range(year - 4, year + 1)}, ""
        # The first report has no earlier one that it could differ from.
        if year > first and rng.random() < config.restated_share:
            restated = rng.choice(RESTATABLE)
            shown[year - 1] = _completed(leaves | {year - 1: restate(leaves[year - 1], restated, rng)}, year - 1)
        yield FullReport(company=company, year=year, seed=config.seed, books=shown, restated=restated, notes=notes)


def _completed(leaves: Mapping[int, Lines], year: int) -> Lines:
    return complete(leaves[year], leaves[year - 1]["Cash and cash equivalents"])


def _distractors(report: FullReport, config: FinanceConfig) -> Iterator[tuple[str, str]]:
    """A press release and a draft, each with the configured probability; their figures differ from the report's."""
    rng = report.rng("distractors", report.year)
    if rng.random() < config.distractor_share:
        yield f"{report.company.folder}/{report.year}/press-release.txt", _press_release(report, rng)
    if rng.random() < config.distractor_share:
        changed = {year: {k: _moved(v, rng) for k, v in lines.items()} for year, lines in report.books.items()}
        draft = FullReport(
            company=report.company,
            year=report.year,
            seed=report.seed,
            books=changed,
            notes=report.notes,
            is_draft=True,
        )
        yield draft.path, draft.text()


def _moved(value: int, rng: random.Random) -> int:
    return value + max(1, abs(value) // 40) * rng.choice((-1, 1))


def _press_release(report: FullReport, rng: random.Random) -> str:
    name, year, unit = report.company.name, report.year, report.company.unit
    lines = [f"{name}\nPress release: preliminary results of {year}"]
    lines.append(
        f"{name} today announced preliminary, unaudited results. The final figures, which may differ, will be "
        f"published in the {year} annual report."
    )
    for label in FIVE_YEARS:
        value = _moved(report.books[year][label], rng)
        shown = f"${cents(value)}" if label.endswith("per share") else f"${amount(value, unit)} {unit}"
        lines.append(f"{label} for {year} is expected to be about {shown}.")
    return (
        "\n\n".join(lines)
        + "\n\nAdjusted figures leave out restructuring costs and are no substitute for audited ones."
    )
