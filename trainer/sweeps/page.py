"""A sweep as people read it: the table, the page, and the best config as a file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import yaml
from markupsafe import Markup

from envs.secrets import without_secrets
from trainer.config import read_sections
from trainer.reports.drawing import Series, bars, line_chart
from trainer.reports.pages import cut, write_page
from trainer.reports.run_report import REFRESH_S
from trainer.reports.tables import Grid, Row
from trainer.runs.files import write_atomically
from trainer.sweeps.figures import Shown, measure_of, show, unit_of
from trainer.sweeps.pictures import Dot, Line, parallel_coordinates, scatter
from trainer.sweeps.plan import Plan
from trainer.sweeps.space import as_overrides, in_words, short_keys, shown

_NUM_COLOURED = 3
"""The best trials, which have the same colour in every picture."""
_MOST_LABELS = 30
_STATES = {"running": "at work", "complete": "", "pruned": "cut short", "failed": "failed"}


def best_of(plan: Plan, trials: Sequence[Shown]) -> Shown | None:
    """Of two as good the one that began first; None where none has come to its end."""
    ranked = _ranked(plan, trials)
    return ranked[0] if ranked else None


def _ranked(plan: Plan, trials: Sequence[Shown]) -> list[Shown]:
    """Those that came to their end, the best first."""
    sign = -1 if plan.config.objective.goal == "maximise" else 1
    done = [t for t in trials if t.noted.value is not None and t.noted.state == "complete"]
    return sorted(done, key=lambda t: (sign * (t.noted.value or 0.0), t.noted.index))


def trials_table(plan: Plan, trials: Sequence[Shown]) -> Grid:
    """A row a trial: the best first, then those that have no result."""
    key, beside = plan.config.objective.key, plan.config.beside
    names = short_keys([*plan.config.space])
    ranked = _ranked(plan, trials)
    others = [trial for trial in trials if trial not in ranked]
    headers = ["trial", key, *names.values(), *beside, "minutes", ""]
    rows = []
    for trial in [*ranked, *others]:
        noted = trial.noted
        cells = [trial.name, _mean(key, trial.values), *(shown(noted.point[k]) for k in names)]
        cells += [_mean(k, trial.beside[k]) for k in beside]
        cells += ["–" if noted.seconds is None else f"{noted.seconds / 60:.1f}", _state(trial)]
        verdicts = ["", "better" if ranked and trial is ranked[0] else "", *[""] * (len(cells) - 2)]
        rows.append(Row(cells=cells, verdicts=verdicts, links=_links(plan, trial)))
    return Grid(id="trials", title="Trials", headers=headers, rows=rows, has_remarks=True)


def _mean(key: str, values: Sequence[float]) -> str:
    """Of the runs, with the least and the most where there are several."""
    if not values:
        return "–"
    mean = show(key, fmean(values))
    return mean if len(values) == 1 else f"{mean} ({show(key, min(values))} to {show(key, max(values))})"


def _state(trial: Shown) -> str:
    state = _STATES[trial.noted.state]
    return f"{state}: {cut(trial.noted.reason, 200)}" if trial.noted.reason else state


def _links(plan: Plan, trial: Shown) -> list[tuple[str, str]]:
    links = [(name, f"trials/{name}/report.html") for name in trial.runs]
    there = [(name, link) for name, link in links if (plan.folder / link).is_file()]
    return [(name.partition("-seed-")[2] or "report", link) for name, link in there]


# ---- the page


def write_sweep_page(plan: Plan, trials: Sequence[Shown], importance: Mapping[str, float], *, is_over: bool) -> Path:
    """Write `report.html` into the sweep's folder, and return its path."""
    best = best_of(plan, trials)
    return write_page(
        plan.folder / "report.html",
        "sweep.html",
        title=plan.folder.resolve().name,
        facts=_facts(plan, trials),
        refresh_s=0 if is_over else REFRESH_S,
        notes=_notes(plan, trials, is_over=is_over),
        best=f"{best.name}: {in_words(best.noted.point)}" if best is not None else "",
        best_values=[(k, _mean(k, v)) for k, v in _last_figures(plan, best)] if best is not None else [],
        command=f"python scripts/train.py --config {plan.folder / 'best.yaml'}" if best is not None else "",
        sections=[(name, [p for p in drawn if p]) for name, drawn in _sections(plan, trials, importance)],
        table=trials_table(plan, trials),
    )


def _last_figures(plan: Plan, trial: Shown) -> list[tuple[str, Sequence[float]]]:
    return [(plan.config.objective.key, trial.values), *((k, trial.beside[k]) for k in plan.config.beside)]


def _facts(plan: Plan, trials: Sequence[Shown]) -> list[tuple[str, str]]:
    counts = {state: sum(t.noted.state == state for t in trials) for state in _STATES}
    facts = [
        ("base", str(plan.config.base)),
        ("method", plan.config.method.type),
        ("objective", f"{plan.config.objective.key}, {plan.config.objective.goal}d"),
        ("trials", f"{counts['complete']} of {plan.num_trials} complete"),
        *((_STATES[state], str(counts[state])) for state in ("running", "pruned", "failed") if counts[state]),
        ("seeds", ", ".join(map(str, plan.seeds))),
    ]
    return [(name, value) for name, value in facts if value]


def _notes(plan: Plan, trials: Sequence[Shown], *, is_over: bool) -> list[str]:
    now = time.strftime("%Y-%m-%d %H:%M:%S%z")
    at_work = [] if is_over else [f"the sweep is at work; as of {now}"]
    failed = [f"{t.name} failed: {cut(t.noted.reason, 400)}" for t in trials if t.noted.state == "failed"]
    spread = [
        "seeds differ: beside each mean stand the least and the most of its runs; a difference of trials that is "
        "smaller says little"
    ]
    return [*at_work, *plan.remarks, *failed, *(spread if len(plan.seeds) > 1 else [])]


def _sections(plan: Plan, trials: Sequence[Shown], importance: Mapping[str, float]) -> list[tuple[str, list[Markup]]]:
    key, goal = plan.config.objective.key, plan.config.objective.goal
    measure = measure_of(key)
    title, percent = (measure.title if measure else key), bool(measure and measure.is_share)
    colours = {t.noted.index: i for i, t in enumerate(_ranked(plan, trials)[:_NUM_COLOURED])}
    curves = [
        Series(name=_curve_name(key, t), points=t.curve, faint=t.noted.index not in colours)
        for t in sorted(trials, key=lambda t: colours.get(t.noted.index, _NUM_COLOURED))
    ]
    names = short_keys([*plan.config.space])
    best, sign = best_of(plan, trials), 1 if goal == "maximise" else -1
    told = (
        f"; orange: {best.name}, the best" + "; dashed: cut short" * any(t.noted.state == "pruned" for t in trials)
        if best
        else ""
    )
    lines = [
        Line(name=t.name, point=t.noted.point, value=t.curve[-1][1], is_over=t.noted.state == "complete")
        for t in sorted(trials, key=lambda t: (sign * t.curve[-1][1] if t.curve else 0.0, -t.noted.index))
        if t.curve and t.noted.state in ("complete", "pruned")
    ]
    whole = parallel_coordinates(
        f"Settings and what came of them, the stronger the better{told}",
        plan.config.space,
        names,
        lines,
        unit=key,
        percent=percent,
        best=best.name if best else "",
    )
    against = [_against(plan, trials, other, colours) for other in plan.config.beside]
    shares = [(names[k], share) for k, share in importance.items()]
    return [
        ("Held out", [
            line_chart(f"{title}, the best three in colour", curves, unit=unit_of(key), percent=percent),
            bars("Importance: what the best quarter has that the others have not", shares, show=_percent),
        ]),
        ("What was tried", [whole]),
        ("What it costs", against),
    ]  # fmt: skip


def _against(plan: Plan, trials: Sequence[Shown], other: str, colours: Mapping[int, int]) -> Markup:
    """The objective over another figure."""
    key = plan.config.objective.key
    x, y = measure_of(other), measure_of(key)
    alone = next(iter(plan.config.space)) if len(plan.config.space) == 1 else ""
    done = [t for t in trials if t.noted.state == "complete"]
    dots = [
        Dot(
            label=_dot_label(t, alone) if len(done) <= _MOST_LABELS or t.noted.index in colours else "",
            hover=f"{t.name}: {_mean(key, t.values)}, {_mean(other, t.beside[other])}; {in_words(t.noted.point)}",
            xs=t.beside[other],
            ys=t.values,
            colour=colours.get(t.noted.index),
        )
        for t in done
    ]
    return scatter(
        f"{y.title if y else key} against {(x.title if x else other).lower()}" + (f", by {alone}" if alone else ""),
        dots,
        x_unit=unit_of(other),
        y_unit=unit_of(key),
        x_percent=bool(x and x.is_share),
        y_percent=bool(y and y.is_share),
    )


def _dot_label(trial: Shown, alone: str) -> str:
    return shown(trial.noted.point[alone]) if alone else str(trial.noted.index)


def _curve_name(key: str, trial: Shown) -> str:
    return f"{trial.name}: {show(key, trial.noted.value)}" if trial.noted.value is not None else trial.name


def _percent(share: float) -> str:
    return f"{share:.0%}"


# ---- the best config


def write_best(plan: Plan, trials: Sequence[Shown]) -> None:
    """`best.yaml`, which `scripts/train.py --config` takes: the base as it was read, with the best trial's settings.

    Its run folder is one of its own. Secrets of the base are left out of it, as of all that is written.
    """
    best = best_of(plan, trials)
    if best is None:
        return
    own = {"seed": plan.seeds[0], "output_dir": str(plan.folder / "best")}
    overrides = as_overrides({**plan.config.settings, **best.noted.point, **own})
    sections = without_secrets(read_sections(plan.config.base, overrides))
    about = f"# {best.name} of the sweep {plan.folder.name}: {plan.config.objective.key} {best.noted.value:.4g}\n"
    write_atomically(plan.folder / "best.yaml", about + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))
