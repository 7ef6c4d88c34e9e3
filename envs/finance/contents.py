"""What a finance world is made of, whatever its source: documents, tasks, and how the expert reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from envs.finance.brief.questions import make_tasks
from envs.finance.brief.reports import Corpus, Report, generate_corpus
from envs.finance.config import FinanceConfig
from envs.finance.documents.paged import Documents
from envs.finance.expert import Reading
from envs.finance.full.corpus import generate_full
from envs.finance.full.tasks import make_full_tasks
from envs.finance.real.kept import load_real
from envs.types import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Documents and tasks."""

    texts: Mapping[str, str]
    tasks: Mapping[str, tuple[Task, ...]]
    """By split."""
    readings: Callable[[Task, Documents], Sequence[Reading]]
    """How the expert finds and reads what a task needs."""


def load_contents(config: FinanceConfig) -> Contents:
    """What the config describes. Raises `UserError` for a corpus too small, and for a file that can't be read."""
    if config.source == "generated":
        return _brief_contents(config) if config.style == "brief" else _full_contents(config)
    texts, tasks = load_real(config)
    return Contents(texts=texts, tasks=tasks, readings=_document_readings)


def _brief_contents(config: FinanceConfig) -> Contents:
    """Short generated reports."""
    corpus = generate_corpus(config)
    return Contents(
        texts={path: report.text() for path, report in corpus.reports.items()},
        tasks={split: make_tasks(config, corpus, split) for split in ("train", "eval")},
        readings=lambda task, documents: [
            _brief_reading(corpus.reports[path], task.item["metric"], corpus) for path in task.item["paths"]
        ],
    )


def _brief_reading(report: Report, metric: str, corpus: Corpus) -> Reading:
    """The wrong reports are those of a sister company or of a neighbouring year."""
    company = report.company
    folders = [c.folder for c in corpus.companies if c.family == company.family and c != company]
    paths = [f"{folder}/{report.year}.txt" for folder in folders]
    paths += [f"{company.folder}/{year}.txt" for year in (report.year - 1, report.year + 1)]
    return Reading(
        path=report.path,
        query=f"{company.name} {report.year} {metric}",
        vague_query=company.name,
        wrong_paths=[path for path in paths if path in corpus.reports],
    )


def _full_contents(config: FinanceConfig) -> Contents:
    """Long generated reports with drafts and press releases among them."""
    corpus = generate_full(config)
    return Contents(
        texts=corpus.texts,
        tasks={split: make_full_tasks(config, corpus, split) for split in ("train", "eval")},
        readings=_document_readings,
    )


def _document_readings(task: Task, documents: Documents) -> Sequence[Reading]:
    """Each document once: a search that names it, then the pages with the evidence, or all where none is named."""
    item = task.item
    return [
        Reading(
            path=path,
            query=query,
            vague_query=(item["companies"] or [query])[0],
            wrong_paths=[p for p in documents.beside(path) if p not in item["paths"]],
            pages=sorted({documents.page_with(path, line) for where, line in item["evidence"] if where == path})
            or range(1, len(documents.pages(path)) + 1),
        )
        for path, query in zip(item["paths"], item["queries"], strict=True)
    ]
