"""A snapshot of a run as lines of a terminal, as many and as long as there is room for."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from rich.cells import set_cell_size
from rich.text import Text

from envs.terminal import clean
from envs.types import Message
from trainer.measures.catalogue import CATALOGUE, Measure
from trainer.measures.intervals import Interval
from trainer.measures.timing import Lap
from trainer.reports.watch.snapshot import Figures, Snapshot, State
from trainer.runs.progress import clock, sparkline
from trainer.types import Kind, Rollout

_LABEL, _CELL = 17, 12
_RECENT_STEPS = 5
_MOST_CHARS = 4_000
"""Of a text: more never fits a screen."""
_BAR = 24
_COLOURS = {
    State.NOT_BEGUN: "yellow",
    State.AT_WORK: "green",
    State.INTERRUPTED: "bold red",
    State.FINISHED: "bold green",
    State.UNKNOWN: "yellow",
}


def screen(snapshot: Snapshot, *, width: int, height: int, pictures: bool = True) -> list[Text]:
    """At most `height` lines of at most `width` columns; what there is no room for is left out from the end.

    `pictures`: sparklines and bars, which need more than ASCII. No text of a model, a tool or a file acts on the
    terminal.
    """
    lines = [*_head(snapshot, pictures), *_table(snapshot, width), *_courses(snapshot, width, pictures)]
    lines += [*_time(snapshot), *_faults(snapshot)]
    left = height - len(lines) - 1
    lines += _episodes(snapshot, left)
    lines = [*lines[: height - 1], _foot(snapshot)]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis" if pictures else "crop"
        line.truncate(width, overflow=line.overflow)
    return lines


def _head(s: Snapshot, pictures: bool) -> Iterator[Text]:
    steps = f"step {s.last_step} of {s.num_steps}" if s.num_steps else f"step {s.last_step}"
    model = _at(s, "model", "name")
    yield Text.assemble(
        (one_line(s.name), "bold"), " · ", (s.state, _COLOURS[s.state]), f" · {steps}", f" · {model}" if model else ""
    )
    if s.state in (State.FINISHED, State.NOT_BEGUN):
        return
    step = s.last_step + 1
    phase = one_line(s.phase) or "no phase yet"
    was = "was at" if s.state is State.INTERRUPTED else "at"
    steps_s = _steps_s(_recent(s))
    left_s = max(0, s.num_steps - s.last_step) * fmean(steps_s) if steps_s else 0.0
    left = f" · left about {clock(left_s)}" if s.state is State.AT_WORK and left_s else ""
    yield Text(f"{was} {phase}{f' since {s.phase_since}' if s.phase_since else ''}{left}")
    is_evaluating = s.phase.startswith("evaluating")
    kind = Kind.EVAL if is_evaluating else Kind.TRAIN
    figures = s.evals.get(s.last_step) if is_evaluating else s.train.get(step)
    if figures is not None:
        done, asked = figures.num_done, s.asked[kind]
        what = f"evaluation after step {s.last_step}" if is_evaluating else f"step {step}"
        bar = ""
        if pictures and asked:
            full = min(_BAR, round(_BAR * done / asked))
            bar = f"{'━' * full}{'╌' * (_BAR - full)} "
        counted = f"{done}/{asked}" if asked else f"{done}"
        ahead = [f"{n} of step {later}" for later, n in _ahead(s, step)]
        yield Text(f"{what}: {bar}{counted} rollouts{', ahead: ' if ahead else ''}{', '.join(ahead)}")


def _ahead(s: Snapshot, step: int) -> list[tuple[int, int]]:
    return [(later, figures.num_done) for later, figures in s.train.items() if later > step and figures.num_done]


# ---- figures


def _table(s: Snapshot, width: int) -> Iterator[Text]:
    """Held-out before and after, the first step, the last, and what there is of the one under way."""
    columns = _columns(s)
    if not columns:
        return
    room = max(1, (width - _LABEL) // _CELL)
    columns = columns[-room:] if len(columns) > room else columns
    yield Text("".join([" " * _LABEL, *(_cell(head) for head, _, _ in columns)]), style="dim")
    for measure in (m for m in CATALOGUE if m.on_screen):
        cells = [_shown(measure, figures.get(measure.key)) for _, figures, _ in columns]
        if any(cells):
            yield Text("".join([set_cell_size(measure.key.replace("_", " "), _LABEL), *map(_cell, cells)]))
        if measure.key == "reward" and any(interval and interval.is_known for _, _, interval in columns):
            between = [f"{i.low:.2f}–{i.high:.2f}" if i and i.is_known else "" for _, _, i in columns]
            yield Text("".join([set_cell_size("  95 % interval", _LABEL), *map(_cell, between)]), style="dim")


def _columns(s: Snapshot) -> list[tuple[str, dict[str, float], Interval | None]]:
    """(heading, figures by key, interval of the reward)."""
    columns: list[tuple[str, dict[str, float], Interval | None]] = []
    evaluated = s.data.eval_steps
    for step in dict.fromkeys([*evaluated[:1], *evaluated[-1:]]):
        columns.append((f"held out {step}", _of_step(s, "eval/", step), _interval(s.evals.get(step))))
    trained = s.data.train_steps
    for step in dict.fromkeys([*trained[:1], *trained[-1:]]):
        columns.append((f"step {step}", _of_step(s, "train/", step), _interval(s.train.get(step))))
    now = s.train.get(s.last_step + 1)
    if now is not None and now.num_graded:
        columns.append((f"{s.last_step + 1} so far", now.means(), now.interval()))
    return columns


def _interval(figures: Figures | None) -> Interval | None:
    return None if figures is None else figures.interval()


def _of_step(s: Snapshot, prefix: str, step: int) -> dict[str, float]:
    return {key.removeprefix(prefix): x for key, x in s.data.steps[step].items() if key.startswith(prefix)}


def _shown(measure: Measure, value: float | None) -> str:
    return "" if value is None else measure.show(value)


def _cell(text: str) -> str:
    return set_cell_size(text.rjust(_CELL - 1), _CELL - 1) + " "


def _courses(s: Snapshot, width: int, pictures: bool) -> Iterator[Text]:
    """The reward over the steps."""
    for name, key in (("reward", "train/reward"), ("held out", "eval/reward")):
        points = s.data.series(key)
        if len(points) < 2:
            continue
        values = [value for _, value in points]
        room = max(8, width - _LABEL - 34)
        drawn = f"{sparkline(_thinned(values, room))} " if pictures else ""
        span = f"{values[0]:.3f} → {values[-1]:.3f}, best {max(values):.3f}"
        yield Text.assemble(set_cell_size(name, _LABEL), (drawn, "cyan"), span)


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """At most so many, each the mean of its stretch."""
    n = min(most, len(values))
    bounds = [round(i * len(values) / n) for i in range(n + 1)]
    return [fmean(values[a:b]) for a, b in itertools.pairwise(bounds)]


def _time(s: Snapshot) -> Iterator[Text]:
    recent = _recent(s)
    if steps_s := _steps_s(recent):
        means = {lap: [row[f"time/{lap}_s"] for row in recent if f"time/{lap}_s" in row] for lap in Lap}
        parts = [f"{lap} {_seconds(fmean(values))}" for lap, values in means.items() if values]
        yield _line("time of a step", ": ".join(filter(None, [_seconds(fmean(steps_s)), ", ".join(parts)])))
    last = recent[-1] if recent else {}
    sides = [(side, last.get(f"throughput/{side}_tokens_per_s")) for side in ("sampled", "trained")]
    if speeds := [f"{side} {speed:,.0f} tokens/s" for side, speed in sides if speed is not None]:
        yield _line("speed", ", ".join(speeds))
    if "staleness/mean" in last:
        stale = f"{last['staleness/mean']:.2f} updates, at most {last.get('staleness/max', 0):.0f}"
        waited = {"trainer": "time/waiting_for_rollouts_s", "engine": "time/waiting_for_trainer_s"}
        waits = [f"{who} waited {_seconds(last[key])}" for who, key in waited.items() if key in last]
        yield _line("staleness", ", ".join([stale, *waits]))
    memory = {key.removeprefix("memory/").removesuffix("_gib"): x for key, x in last.items() if key[:7] == "memory/"}
    if memory:
        yield _line("memory", ", ".join(f"{what.replace('_', ' ')} {x:.1f} GiB" for what, x in memory.items()))


def _faults(s: Snapshot) -> Iterator[Text]:
    """By kind, of the last step and the one under way; errors of model and grader and the world's faults apart."""
    mine = [figures for step, figures in s.train.items() if step >= s.last_step]
    errors = sum((figures.errors for figures in mine), Counter[str]())
    faults = sum((figures.faults for figures in mine), Counter[str]())
    by_whom: dict[str, list[str]] = {"model's errors": [], "grader's errors": []}
    for kind, n in errors.most_common():
        of_grader = kind.removeprefix("grader: ")
        by_whom["model's errors" if of_grader == kind else "grader's errors"].append(f"{of_grader} {n}")
    yield from (_line(whose, ", ".join(told)) for whose, told in by_whom.items() if told)
    if faults:
        yield _line("no grade", "; ".join(f"{n} × {cause}" for cause, n in faults.most_common(3)), "red")
    if tied := s.data.steps.get(s.last_step, {}).get("groups/tied_share"):
        yield _line("tied groups", f"{tied:.0%} of step {s.last_step}: all rewards equal, nothing to learn")
    if s.warning:
        yield _line("last warning", s.warning, "yellow")
    for note in s.notes[:2]:
        yield _line("the folder", note, "yellow")


def _recent(s: Snapshot) -> list[Mapping[str, float]]:
    return [s.data.steps[step] for step in s.data.train_steps[-_RECENT_STEPS:]]


def _steps_s(recent: Sequence[Mapping[str, float]]) -> list[float]:
    return [row["time/step_s"] for row in recent if "time/step_s" in row]


def _line(name: str, text: str, style: str = "") -> Text:
    return Text(f"{set_cell_size(name, _LABEL)}{one_line(text)}", style=style)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else clock(seconds)


def _foot(s: Snapshot) -> Text:
    now = time.time()
    age = f"last written {clock(max(0.0, now - s.last_written))} ago" if s.last_written else "nothing is written yet"
    return Text(f"{time.strftime('%H:%M:%S', time.localtime(now))} · {age}", style="dim")


# ---- episodes


def _episodes(s: Snapshot, room: int) -> list[Text]:
    """The newest in full as far as there is room, then the ones before."""
    lines: list[Text] = []
    for rollout in s.episodes:
        if room - len(lines) < 3:
            break
        lines += _episode(rollout, room - len(lines))
    return lines


def _episode(rollout: Rollout, room: int) -> list[Text]:
    """Its head, the question, and of what follows the end: how it came to its answer."""
    episode = rollout.episode
    reward = "no grade" if rollout.reward is None else f"reward {rollout.reward:.3f}"
    head = f"{reward} · {episode.stop_reason} · {episode.num_tool_calls} calls · {episode.num_tokens:,} tokens"
    lines = [Text.assemble((head, "bold"), f" · {one_line(episode.task_id)}")]
    prompt = len(rollout.task.messages)
    lines += [line for m in episode.messages[:prompt][-1:] for line in message_lines(m)]
    said = [line for m in episode.messages[prompt:] for line in message_lines(m)]
    left = max(0, room - len(lines))
    if len(said) > left:
        cut = len(said) - left + 1
        said = [Text(f"  … {cut} lines before", style="dim"), *said[cut:]][: max(0, left)]
    return lines + said


def message_lines(message: Message) -> Iterator[Text]:
    """A line for each thing that a message says: reasoning, words, calls; clean."""
    if message.reasoning:
        yield Text(f"  thinks  {one_line(message.reasoning)}", style="dim italic")
    if message.role == "tool":
        yield Text(f"   gives  {one_line(message.content)}", style="dim")
        return
    if message.content or not message.tool_calls:
        mark, style = ("says", "green") if message.role == "assistant" else ("asked", "cyan")
        yield Text(f"  {mark:>6}  {one_line(message.content)}", style=style)
    for call in message.tool_calls:
        yield Text(f"   calls  {call_text(call.name, call.arguments)}", style="magenta")


def call_text(name: str, arguments: str) -> str:
    """`search(query="…")`, as one writes it; the arguments as they are where they are no object."""
    try:
        value = json.loads(arguments)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return one_line(f"{name}({arguments})")
    given = ", ".join(f"{key}={json.dumps(x, ensure_ascii=False)}" for key, x in value.items())
    return one_line(f"{name}({given})")


def one_line(text: str) -> str:
    """Clean, without ends of lines, no longer than any screen."""
    return _cleaned(text[:_MOST_CHARS])


@functools.lru_cache(maxsize=1024)
def _cleaned(text: str) -> str:
    """What stands on a screen is drawn again several times a second."""
    return " ".join(clean(text).split())


def _at(s: Snapshot, *keys: str) -> str:
    value: object = s.data.config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return one_line(str(value)) if value is not None else ""
