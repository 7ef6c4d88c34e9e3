"""One rollout of a run folder as the transcript viewer takes it: a line of its index and a record with the rest.

The run may be of an older version, interrupted or damaged, and everything in it was written by a model, a tool or a
config: whatever types lie in the file, text and finite numbers come out. No HTML is made here or anywhere else; the
viewer sets text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Fact = tuple[str, str]
"""Name and value, as a person reads them."""

UNKNOWN_TOOL, MALFORMED_CALL = "(unknown tool)", "(malformed call)"
"""Stand in the list of tools for names that a model made up: there may be thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFigures:
    """What one step's update knew of one rollout; see `transcripts.write_token_figures`."""

    advantage: float | None = None
    logprobs: Mapping[int, Sequence[float]] = field(default_factory=dict)
    """By row: the trainer's log-probabilities of the trainable tokens; rows without a gradient are missing."""


def index_line(row: Mapping[str, Any], figures: TokenFigures | None) -> dict[str, Any]:
    """What the list shows, sorts and filters by."""
    episode = _mapping(row.get("episode"))
    turns = _mappings(episode.get("turns"))
    return {
        "id": text(episode.get("rollout_id")),
        "task": text(episode.get("task_id")),
        "reward": number(_mapping(row.get("grade")).get("reward")),
        "stop": text(episode.get("stop_reason")),
        "tools": sorted({tool for turn in turns for tool in _tools(turn)}),
        "calls": sum(len(_calls(turn)) + (turn.get("malformed") is True) for turn in turns),
        "tokens": int(sum(number(turn.get("num_tokens")) or 0 for turn in turns)),
        "latency_s": number(episode.get("latency_s")),
        "advantage": number(figures.advantage) if figures else None,
    }


def record(row: Mapping[str, Any], figures: TokenFigures | None) -> dict[str, Any]:
    """Everything that is shown of a rollout once it is chosen."""
    episode, task = _mapping(row.get("episode")), _mapping(row.get("task"))
    grade, watch = _mapping(row.get("grade")), _mapping(row.get("watch"))
    item = _mapping(task.get("item"))
    num_prompt = len(_mappings(task.get("messages")))
    return {
        "facts": _facts(row, episode),
        "error": text(episode.get("error")),
        "grades": [_grade("grade", grade)] * bool(grade) + [_grade("watching grader", watch)] * bool(watch),
        "item": json.dumps(item, ensure_ascii=False, indent=2) if item else "",
        "num_prompt": num_prompt,
        "messages": _messages(episode, num_prompt),
        "rows": [_row(ledger, i, figures) for i, ledger in enumerate(_mappings(row.get("ledgers")))],
    }


def text(value: object) -> str:
    """A string of any value; None is the empty one."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def number(value: object, digits: int = 7) -> float | None:
    """A finite number of so many significant digits (7: those of a float32); None for anything else."""
    # JSON's integers have no bound, floats have.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(f"{value:.{digits}g}")


def _facts(row: Mapping[str, Any], episode: Mapping[str, Any]) -> list[Fact]:
    turns = _mappings(episode.get("turns"))
    reasoning = sum(number(t.get("num_reasoning_tokens")) or 0 for t in turns)
    grader_s = number(_mapping(row.get("grade")).get("latency_s"))
    facts = [
        ("turns", str(len(turns))),
        ("latency", seconds(episode.get("latency_s"))),
        ("generating", seconds(math.fsum(number(t.get("generation_s")) or 0 for t in turns))),
        ("in tools", seconds(math.fsum(number(t.get("tools_s")) or 0 for t in turns))),
        ("waiting for the user", seconds(s) if (s := math.fsum(number(t.get("reply_s")) or 0 for t in turns)) else ""),
        ("grading", seconds(grader_s) if grader_s else ""),
        ("reasoning tokens", f"{reasoning:,.0f}" if reasoning else ""),
        ("training rows", str(n) if (n := len(_mappings(row.get("ledgers")))) > 1 else ""),
        ("drifted turns", text(row.get("num_drifted_turns") or "")),
        ("attempts", text(n) if (n := row.get("num_attempts") or 1) != 1 else ""),
    ]
    return [(name, value) for name, value in facts if value]


def seconds(value: object) -> str:
    """Empty where there is no number."""
    s = number(value)
    if s is None:
        return ""
    return f"{1000 * s:.3g} ms" if s < 1 else f"{s:.2f} s" if s < 100 else f"{s:,.0f} s"


def _grade(name: str, grade: Mapping[str, Any]) -> dict[str, Any]:
    """The sum first, then its parts; what else the grader told as facts."""
    errors, passed = grade.get("errors"), grade.get("passed")
    tokens = _mapping(grade.get("judge_tokens"))
    facts = [
        ("passed", "yes" if passed else "no") if isinstance(passed, bool) else ("", ""),
        ("errors", ", ".join(map(text, errors)) if isinstance(errors, list) else ""),
        ("judge tokens", ", ".join(f"{text(k)} {text(v)}" for k, v in tokens.items())),
    ]
    return {
        "name": name,
        "reward": number(grade.get("reward")),
        "parts": _numbers(grade.get("parts")),
        "scores": _numbers(grade.get("scores")),
        "explanation": text(grade.get("explanation")),
        "facts": [(name, value) for name, value in facts if value],
    }


def _numbers(value: object) -> list[tuple[str, float | None]]:
    return [(text(k), number(v)) for k, v in _mapping(value).items()]


def _messages(episode: Mapping[str, Any], num_prompt: int) -> list[dict[str, Any]]:
    """All messages; to the model's own and to tool results what the turn knows of them."""
    turns, turn = iter(_mappings(episode.get("turns"))), _mapping(None)
    results: list[Mapping[str, Any]] = []
    out = []
    for i, message in enumerate(_mappings(episode.get("messages"))):
        role, facts, error = text(message.get("role")), list[str](), ""
        if role == "assistant" and i >= num_prompt:
            turn = next(turns, {})
            results = _mappings(turn.get("results"))
            facts = [_tokens(turn.get("num_tokens")), seconds(turn.get("generation_s"))]
            error = "malformed call" if turn.get("malformed") is True else ""
        elif role == "tool" and results:
            result, *results = results
            facts = [_tokens(result.get("num_tokens")), seconds(result.get("latency_s"))]
            error = text(result.get("error"))
        elif role == "user" and turn.get("reply") is not None:
            facts = ["the simulated user", seconds(turn.get("reply_s"))]
        calls = _mappings(message.get("tool_calls"))
        out.append(
            {
                "role": role,
                "name": text(message.get("name")),
                "text": text(message.get("content")),
                "reasoning": text(message.get("reasoning")),
                "calls": [(text(c.get("name")), text(c.get("arguments"))) for c in calls],
                "facts": [f for f in facts if f],
                "error": error,
            }
        )
    return out


def _tokens(value: object) -> str:
    # Older runs did not count the tokens of a tool's output.
    return f"{n:,.0f} tokens" if (n := number(value)) else ""


def _row(ledger: Mapping[str, Any], i: int, figures: TokenFigures | None) -> dict[str, Any]:
    """A training row. Log-probabilities of the trainer that do not fit the row's tokens are not shown."""
    logprobs = [number(x) for x in _sequence(ledger.get("logprobs"))]
    ours = figures.logprobs.get(i) if figures else None
    return {
        "ids": [x for x in _sequence(ledger.get("token_ids")) if isinstance(x, int)],
        "sampled": [run for run in _sequence(ledger.get("sampled")) if isinstance(run, list) and len(run) == 3],
        "logprobs": logprobs,
        "trainer": [number(x) for x in ours] if ours is not None and len(ours) == len(logprobs) else None,
    }


def _calls(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return _mappings(_mapping(turn.get("message")).get("tool_calls"))


def _tools(turn: Mapping[str, Any]) -> set[str]:
    unknown = {text(r.get("name")) for r in _mappings(turn.get("results")) if r.get("error") == "unknown_tool"}
    names = {text(call.get("name")) for call in _calls(turn)}
    malformed = {MALFORMED_CALL} if turn.get("malformed") is True else set()
    return {UNKNOWN_TOOL if name in unknown else name for name in names} | malformed


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [x for x in _sequence(value) if isinstance(x, dict)]
