"""Run or validate a grader: `python scripts/grade.py run --grader grader.json --samples samples.jsonl`.

The grader is the hosted service's JSON, or the `grader`, `penalties` and `judge` sections of a run config in YAML. A
line of the samples is `{"item", "sample"}` (exported ones too), `{"item", "model_sample"}` as the hosted graders/run
takes them, or a rollout as a run writes it. `validate` checks the grader alone, and with `--samples` that it can grade
these rows; it asks no judge, and needs no key.
Exit codes: 0 done, 2 something in the input is wrong, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from program import UserError, console, run, say

from envs.terminal import shown_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from graders.trial import Graded, TrialSettings


def main() -> int:
    arguments = _parse_arguments()
    # Only now: --help and a misspelt option answer at once.
    from envs.reading.documents import check_writable
    from envs.reading.json_text import write_json
    from graders.hosted.sample_file import read_samples
    from graders.trial import as_hosted, build_trial, grade_all

    try:
        settings = _read_settings(arguments)
        rows = list(itertools.islice(read_samples(arguments.samples), arguments.limit)) if arguments.samples else []
        if arguments.command == "validate":
            build_trial(settings, rows, arguments.samples, asks=False)
            # As the hosted graders/validate answers.
            shown = {"grader": settings.grader.model_dump(mode="json")}
            print(shown_json(shown, indent=2))
            return 0
        if arguments.json:
            check_writable(arguments.json, "--json")
        graded = asyncio.run(grade_all(settings, rows, arguments.samples, arguments.concurrency))
        if arguments.json:
            lines = (write_json(as_hosted(g, settings.grader), ensure_ascii=False) for g in graded)
            arguments.json.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return 2
    print_tables(console(), graded, num_worst=arguments.worst)
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=("run", "validate"))
    parser.add_argument("--grader", type=Path, required=True, help="JSON of a grader, or YAML of a run config")
    parser.add_argument("--samples", type=Path, help="JSONL")
    parser.add_argument("--penalties", type=Path, help="JSON or YAML of the penalties section; default: the config's")
    parser.add_argument("--judge-url", help="OpenAI-compatible server with /v1; default: the config's judge.base_url")
    parser.add_argument("--judge-model", help="asked in place of the model that the grader names")
    parser.add_argument("--judge-key-env", help="environment variable that holds the judge's key")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--concurrency", type=int, default=16, help="rows graded at once")
    parser.add_argument("--worst", type=int, default=5, help="rows of least reward that are shown")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write each row's grade there, as JSONL")
    arguments = parser.parse_args()
    if arguments.command == "run" and arguments.samples is None:
        parser.error("run needs --samples")
    for name in ("limit", "concurrency"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            parser.error(f"--{name} {number}: expected at least 1")
    return arguments


def _read_settings(arguments: argparse.Namespace) -> TrialSettings:
    from pydantic import ValidationError

    from envs.reading.documents import read_document
    from envs.validation import validation_problems
    from graders.trial import TrialSettings

    path: Path = arguments.grader
    data = read_document(path, str(path))
    # A grader without a type is told that it has none; no run config has a name.
    if isinstance(data, dict) and data.keys() & {"type", "name"}:
        data = {"grader": data}
    elif isinstance(data, dict) and "base" in data:
        # Of the trainer nothing else is needed here, and this for such configs alone.
        from trainer.config import read_sections

        data = read_sections(path, [])
    if arguments.penalties:
        penalties = read_document(arguments.penalties, str(arguments.penalties))
        data = {
            **data,
            "penalties": penalties.get("penalties", penalties) if isinstance(penalties, dict) else penalties,
        }
    given = {"base_url": arguments.judge_url, "model": arguments.judge_model, "api_key_env": arguments.judge_key_env}
    judge = {key: value for key, value in given.items() if value is not None}
    if judge and isinstance(data, dict):
        data = {**data, "judge": {**(data.get("judge") or {}), **judge}}
    try:
        return TrialSettings.model_validate(data)
    except ValidationError as e:
        raise UserError(validation_problems(f"grader {path}", e, TrialSettings, data)) from None


def print_tables(console: Console, graded: Sequence[Graded], *, num_worst: int) -> None:
    grades = [g.grade for g in graded if g.grade is not None]
    parts: dict[str, list[float]] = {}
    for grade in grades:
        for name, score in {**grade.parts, **grade.scores}.items():
            parts.setdefault(name, []).append(score)
    rewards = _table("score", "rows", "mean", "std", "min", "25 %", "median", "75 %", "max")
    for name, values in {"reward": [g.reward for g in grades], **parts}.items():
        if values and (name == "reward" or len(parts) > 1):
            rewards.add_row(name, str(len(values)), *(f"{x:.3f}" for x in _spread(values)))
    console.print(rewards)
    judged = [grade.passed for grade in grades if grade.passed is not None]
    if judged:
        console.print(f"passed {sum(judged)} of {len(judged)} ({sum(judged) / len(judged):.1%})", highlight=False)
    if lost := len(graded) - len(grades):
        console.print(f"not graded {lost} of {len(graded)}: in training these rollouts are masked", highlight=False)
        _print_counts(console, "not graded", Counter(g.lost for g in graded if g.lost), len(graded))
    _print_counts(
        console, "error", Counter(kind.value for g in graded for kind in dict.fromkeys(g.errors)), len(graded)
    )
    if graded:
        latencies = sorted(g.latency_s for g in graded)
        p95 = latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))]
        console.print(f"latency: median {statistics.median(latencies):.3f} s, p95 {p95:.3f} s", highlight=False)
    tokens: Counter[str] = Counter()
    for grade in grades:
        tokens.update(grade.judge_tokens)
    _print_counts(console, "judge tokens", tokens, None)
    _print_worst(console, graded, num_worst)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _spread(values: Sequence[float]) -> tuple[float, ...]:
    """Mean, standard deviation, least, quartiles, most."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return (statistics.fmean(values), statistics.pstdev(values), min(values), *quartiles, max(values))


def _print_counts(console: Console, what: str, counts: Mapping[str, int], num_rows: int | None) -> None:
    if counts:
        table = _table(what, "count", *(["share"] if num_rows else []))
        for name, count in sorted(counts.items(), key=lambda entry: -entry[1]):
            table.add_row(name, f"{count:,}", *([f"{count / num_rows:.1%}"] if num_rows else []))
        console.print(table)


def _print_worst(console: Console, graded: Sequence[Graded], num_worst: int) -> None:
    from rich.text import Text

    from envs.text import both_ends

    worst = sorted(graded, key=lambda g: g.grade.reward if g.grade else float("-inf"))[:num_worst]
    if worst:
        table = _table("line", "reward")
        table.add_column("why", max_width=90, overflow="fold")
        for g in worst:
            reward = f"{g.grade.reward:.3f}" if g.grade else "none"
            # Text, not markup: an answer may hold brackets.
            why = g.fault or (g.grade.explanation if g.grade else "")
            table.add_row(str(g.row.line), reward, Text(both_ends(why, 400)))
        console.print(table)


if __name__ == "__main__":
    run(main)
