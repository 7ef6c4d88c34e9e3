"""What is measured of a rollout. An entry here is all that a new measure needs.

From it come the key in metrics.jsonl, the line on the terminal, the table before and after and that of a comparison,
the learning curve, the histogram, the row among a run's signs of health, the column of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from trainer.measures.masked import masked_by
from trainer.types import Rollout


class Place(StrEnum):
    """Where a measure is shown beside metrics.jsonl."""

    TABLE = "table"
    """The tables of policies side by side, before and after training among them. Read without tokens."""
    TAILS = "tails"
    """Quantiles over single rollouts, in a comparison."""
    HISTOGRAM = "histogram"
    CURVE = "curve"
    """Over the steps, in a run's report."""
    HEALTH = "health"
    """Small in a run that is well."""
    SWEEP = "sweep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure of a rollout; of a set of rollouts the mean over those that have it."""

    key: str
    """Its name in metrics.jsonl, after `train/` or `eval/`."""
    title: str
    """Over a picture."""
    label: str
    """In a table; two spaces before it where it is a part of the one above."""
    unit: str
    format: str
    of: Callable[[Rollout], float | None]
    """None where the rollout does not have it: masked, or a grader that does not say what passes."""
    better: int = 0
    """+1: higher is better; -1: lower is better; 0: it depends."""
    meaning: str = ""
    """For those who do not know it."""
    places: frozenset[Place] = frozenset()
    on_screen: str = ""
    """The format of the figure in a step's line on the terminal; empty where it is not there."""
    is_whole: bool = True
    """A rollout's own figure is a count."""
    if_any: bool = False
    """Left out of metrics.jsonl where it is 0 in every rollout."""
    is_logged: bool = True
    """Stands in metrics.jsonl."""

    @property
    def is_share(self) -> bool:
        return "%" in self.format

    def show(self, value: float) -> str:
        return self.format.format(value)

    def show_change(self, value: float) -> str:
        """With its sign; of shares in points."""
        return f"{100 * value:+z.1f}" if self.is_share else self.format.replace("{:", "{:+z").format(value)

    def verdict(self, change: float) -> str:
        """`better`, `worse` or nothing."""
        gain = change * self.better
        return "" if abs(gain) < 1e-9 else "better" if gain > 0 else "worse"

    def values(self, rollouts: Sequence[Rollout]) -> list[float]:
        """That of each rollout that has it, where it is a number."""
        return [v for r in rollouts if (v := self.of(r)) is not None and math.isfinite(v)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many rollouts of a set, the masked ones included."""

    key: str
    label: str
    meaning: str
    of: Callable[[Rollout], int]
    is_health: bool = True
    if_any: bool = False


def num_tool_errors(rollout: Rollout) -> int:
    """Malformed calls and calls that were answered with an error."""
    return sum(turn.malformed + sum(r.error is not None for r in turn.results) for turn in rollout.episode.turns)


def _graded(value: Callable[[Rollout], float]) -> Callable[[Rollout], float | None]:
    return lambda rollout: None if rollout.grade is None else float(value(rollout))


def _reward(rollout: Rollout) -> float | None:
    return None if rollout.grade is None else rollout.grade.reward


def _correct(rollout: Rollout) -> float | None:
    return None if rollout.grade is None or rollout.grade.passed is None else float(rollout.grade.passed)


def _num_special_in_tools(rollout: Rollout) -> int:
    return sum(result.num_special_tokens for turn in rollout.episode.turns for result in turn.results)


COUNTS = (
    Count(key="rollouts", label="rollouts", meaning="all that were asked for", of=lambda r: 1, is_health=False),
    Count(
        key="masked_rollouts",
        label="rollouts masked out",
        meaning="without a grade, not trained on",
        of=lambda r: masked_by(r) is not None,
    ),
    Count(
        key="retried_rollouts",
        label="rollouts retried",
        meaning="the world or the grading of earlier attempts failed",
        of=lambda r: r.num_attempts > 1,
    ),
    Count(
        key="unclosed_environments",
        label="environments that did not close",
        meaning="closing failed or took too long: what they hold on to may fill the machine",
        of=lambda r: len(r.unclosed),
        if_any=True,
    ),
)

CATALOGUE = (
    Measure(
        key="reward",
        title="Mean reward",
        label="mean reward",
        unit="reward",
        format="{:.3f}",
        of=_reward,
        better=+1,
        meaning="what the grader and the penalties give together",
        places=frozenset({Place.TABLE, Place.CURVE, Place.HISTOGRAM, Place.SWEEP}),
        on_screen="reward {:.3f}",
        is_whole=False,
    ),
    Measure(
        key="correct",
        title="Correct",
        label="correct",
        unit="share of rollouts",
        format="{:.1%}",
        of=_correct,
        better=+1,
        meaning="passed, where the grader says what passes",
        places=frozenset({Place.TABLE, Place.CURVE, Place.SWEEP}),
        on_screen="correct {:.0%}",
    ),
    Measure(
        key="answered",
        title="Ended with an answer",
        label="ended with an answer",
        unit="share of rollouts",
        format="{:.1%}",
        of=_graded(lambda r: r.episode.stop_reason.is_complete),
        better=+1,
        meaning="came to its own end: an answer, calls that are the answer, a game that is over",
        places=frozenset({Place.TABLE}),
    ),
    Measure(
        key="turns",
        title="Turns",
        label="turns per rollout",
        unit="turns per rollout",
        format="{:.2f}",
        of=_graded(lambda r: len(r.episode.turns)),
    ),
    Measure(
        key="user_turns",
        title="Replies of the user",
        label="replies of the user per rollout",
        unit="replies per rollout",
        format="{:.2f}",
        of=_graded(lambda r: sum(turn.reply is not None for turn in r.episode.turns)),
        meaning="what a simulated user said",
        if_any=True,
    ),
    Measure(
        key="tool_calls",
        title="Tool calls",
        label="tool calls per rollout",
        unit="calls per rollout",
        format="{:.2f}",
        of=_graded(lambda r: r.episode.num_tool_calls),
        better=-1,
        meaning="malformed ones included",
        places=frozenset({Place.TABLE, Place.TAILS, Place.CURVE, Place.HISTOGRAM, Place.SWEEP}),
        on_screen="{:.1f} calls",
    ),
    Measure(
        key="tool_errors",
        title="Tool errors",
        label="tool errors per rollout",
        unit="errors per rollout",
        format="{:.2f}",
        of=_graded(num_tool_errors),
        better=-1,
        meaning="malformed calls, and calls that were answered with an error",
        places=frozenset({Place.TABLE}),
        is_logged=False,
    ),
    Measure(
        key="invalid_calls",
        title="Invalid calls",
        label="invalid calls per rollout",
        unit="calls per rollout",
        format="{:.2f}",
        of=_graded(lambda r: r.episode.num_invalid_calls),
        better=-1,
        meaning="malformed ones, unknown tools, arguments that do not fit the schema",
        places=frozenset({Place.TABLE, Place.CURVE}),
    ),
    Measure(
        key="malformed_calls",
        title="Malformed calls",
        label="malformed calls per rollout",
        unit="calls per rollout",
        format="{:.3f}",
        of=_graded(lambda r: sum(turn.malformed for turn in r.episode.turns)),
        better=-1,
        meaning="attempts at a call that did not parse",
        places=frozenset({Place.HEALTH}),
    ),
    Measure(
        key="completion_tokens",
        title="Generated tokens",
        label="tokens per rollout",
        unit="tokens per rollout",
        format="{:,.1f}",
        of=_graded(lambda r: r.episode.num_tokens),
        better=-1,
        meaning="that the model generated",
        places=frozenset({Place.TABLE, Place.TAILS, Place.CURVE, Place.HISTOGRAM, Place.SWEEP}),
        on_screen="{:,.0f} tokens a rollout",
    ),
    Measure(
        key="reasoning_tokens",
        title="Reasoning tokens",
        label="  of which reasoning",
        unit="tokens per rollout",
        format="{:,.1f}",
        of=_graded(lambda r: r.episode.num_reasoning_tokens),
        better=-1,
        meaning="generated tokens that are reasoning, by the reasoning parser",
        places=frozenset({Place.TABLE, Place.HISTOGRAM, Place.SWEEP}),
    ),
    Measure(
        key="answer_tokens",
        title="Tokens of calls and answer",
        label="  of which calls, answer",
        unit="tokens per rollout",
        format="{:,.1f}",
        of=_graded(lambda r: r.episode.num_tokens - r.episode.num_reasoning_tokens),
        better=-1,
        meaning="the other generated tokens",
        places=frozenset({Place.TABLE}),
    ),
    Measure(
        key="episode_tokens",
        title="Tokens that training reads",
        label="tokens of the rows per rollout",
        unit="tokens per rollout",
        format="{:,.1f}",
        of=_graded(lambda r: sum(map(len, r.ledgers))),
        better=-1,
        meaning="of all its training rows, prompt and tool outputs included",
    ),
    Measure(
        key="episode_latency_s",
        title="Latency",
        label="latency per episode, s",
        unit="seconds per episode",
        format="{:.2f}",
        of=_graded(lambda r: r.episode.latency_s),
        better=-1,
        meaning="wall-clock time from the first turn to the end of the last",
        places=frozenset({Place.TABLE, Place.TAILS, Place.CURVE, Place.HISTOGRAM, Place.SWEEP}),
        is_whole=False,
    ),
    Measure(
        key="forks",
        title="Forked rows",
        label="forked rows per rollout",
        unit="rows per rollout",
        format="{:.3f}",
        of=_graded(lambda r: len(r.ledgers) - 1),
        better=-1,
        meaning="turns at which the template rewrote the earlier text",
        places=frozenset({Place.HEALTH}),
    ),
    Measure(
        key="drifted_turns",
        title="Drifted turns",
        label="drifted turns per rollout",
        unit="turns per rollout",
        format="{:.3f}",
        of=_graded(lambda r: r.num_drifted_turns),
        better=-1,
        meaning="raw text differs from what serving would render",
        places=frozenset({Place.HEALTH}),
    ),
    Measure(
        key="special_tokens_in_tools",
        title="Special tokens in tool outputs",
        label="special tokens in tool outputs per rollout",
        unit="tokens per rollout",
        format="{:.3f}",
        of=_graded(_num_special_in_tools),
        better=-1,
        meaning="outputs spell out tokens of the chat format: they could forge messages",
        places=frozenset({Place.HEALTH}),
    ),
    Measure(
        key="special_tokens_spelled",
        title="Special tokens spelled out",
        label="special tokens spelled out per rollout",
        unit="tokens per rollout",
        format="{:.3f}",
        of=_graded(lambda r: sum(turn.num_spelled_tokens for turn in r.episode.turns)),
        better=-1,
        meaning="written by the model in ordinary tokens, which serving's next prompt turns into the tokens themselves",
        places=frozenset({Place.HEALTH}),
    ),
)
"""All are per graded rollout; latencies in seconds of wall clock."""


def measure(key: str) -> Measure:
    """The one of that name; a wrong name is a mistake of ours."""
    return next(m for m in CATALOGUE if m.key == key)


def shown_in(place: Place) -> list[Measure]:
    return [m for m in CATALOGUE if place in m.places]
