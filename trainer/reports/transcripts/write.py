"""The transcript viewer: one HTML file beside the report with every rollout of a run. No server, no network.

A file of its own and not a part of `report.html`: it weighs some kilobytes a rollout, tens of megabytes for a long run,
where the report is opened and mailed about at a hundred kilobytes; and it needs a script, which the report forbids
itself.

The page holds a small index of all rollouts and, in chunks, everything else: JSON, deflated, in base64. The browser
unpacks a chunk when one of its rollouts is looked at. Nothing that a model, a tool or a config wrote stands in the page
as HTML or as script text, and the page's own policy admits its one script and style sheet by their hashes only.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from envs.errors import UserError
from envs.reading.json_text import write_json
from trainer.learning.samples import Sample
from trainer.models.cache import resolve_model
from trainer.reports.pages import render_page
from trainer.reports.run_reader import read_run, records_of_step, steps_in
from trainer.reports.transcripts.records import TokenFigures, index_line, number, record, text
from trainer.runs.files import step_files, write_atomically

PAGE = "transcripts.html"
TOKEN_FIGURES = "tokens"
"""Folder in the run folder; a file a step."""

_CHUNK_CHARS = 200_000
"""JSON of one chunk: a dozen rollouts that share their prompts, unpacked in some milliseconds."""
_MAX_PAGE_BYTES = 256 * 2**20
_SETS = {"rollouts": "training", "evals": "held out"}


def write_token_figures(
    run_folder: Path, step: int, samples: Sequence[Sample], logprobs: Sequence[Sequence[float] | None]
) -> Path:
    """Keep what the update of `step` knew of each token: `tokens/step-000001.jsonl`, a line a training row.

    `logprobs` are those of the step's `Update`, one entry per sample. Call it on the main process after the update. A
    step that is done again overwrites its file.
    """
    path = run_folder / TOKEN_FIGURES / f"step-{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    rows = [
        {
            "rollout_id": sample.rollout_id,
            "row": sample.row,
            "advantage": number(sample.advantage),
            "logprobs": None if ours is None else [number(x) for x in ours],
        }
        for sample, ours in zip(samples, logprobs, strict=True)
    ]
    write_atomically(path, "".join(write_json(row) + "\n" for row in rows))
    return path


def write_transcripts(
    run_folder: Path, decode: Callable[[int], str] | None, *, max_bytes: int = _MAX_PAGE_BYTES
) -> Path:
    """Write `transcripts.html` into the run folder from what lies there, and return its path.

    `decode` gives the text of one token id; without it ids are shown. Where the page would grow over `max_bytes`,
    evaluations and evenly spread training steps are kept, and the page names how many steps it leaves out. Raises
    `FileNotFoundError` where there is no such folder.

    *Covered*: runs that are young, interrupted, damaged or of an older version; ranks' files; any text.
    *Not covered*: a rollout that fills a whole browser's memory; reading while the same step is being written.
    """
    data = read_run(run_folder)
    notes: list[str] = []
    steps = [(kind, step) for kind in _SETS for step in steps_in(run_folder / kind)]
    packed: dict[tuple[str, int], _Packed] = {}
    size = 0
    for kind, step in _by_importance(steps):
        if size > max_bytes:
            break
        packed[kind, step] = _pack_step(run_folder, kind, step, notes)
        size += sum(map(len, packed[kind, step].chunks))
    if left_out := len(steps) - len(packed):
        notes.append(f"{left_out} of {len(steps)} steps are left out: the page would be too large for a browser")
    if not any(p.lines for p in packed.values()):
        notes.append("there are no rollouts in this run folder yet")
    _note_missing_figures(packed, notes)
    ids = sorted({i for p in packed.values() for i in p.token_ids})
    if decode is None and ids:
        notes.append("the tokenizer was not at hand: tokens are shown by their ids")
    # By step; the evaluation after a step follows that step's rollouts.
    ordered = [packed[key] for key in sorted(packed, key=lambda key: (key[1], key[0] == "evals"))]
    index: dict[str, Any] = _columns(ordered)
    html = _render(
        title=text(data.info.get("run_id")) or run_folder.resolve().name,
        index=_deflated(index | {"notes": notes}),
        texts=_deflated({} if decode is None else {i: decode(i) for i in ids}),
        chunks=[chunk for p in ordered for chunk in p.chunks],
    )
    path = run_folder / PAGE
    write_atomically(path, html)
    return path


def run_decoder(run_folder: Path) -> Callable[[int], str]:
    """The text of a token id, by the tokenizer of the model that the run's config names; for people only.

    Raises `UserError` where the config or the model is not to be had. While a run goes on, `Chat.decode` serves.
    """
    from tokenizers import Tokenizer

    model = data if isinstance(data := read_run(run_folder).config.get("model"), dict) else {}
    if not model.get("name"):
        raise UserError(f"{run_folder / 'config.yaml'}: names no model; expected model.name")
    path = resolve_model(text(model["name"])) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: is missing; a fast tokenizer is needed")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda token_id: str(tokenizer.decode([token_id], skip_special_tokens=False))


@dataclass(slots=True, kw_only=True)
class _Packed:
    """The rollouts of one step."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    """Of the index, with each rollout's chunk (counted within the step) and its place there."""
    chunks: list[str] = field(default_factory=list)
    token_ids: set[int] = field(default_factory=set)
    num_figures: int = 0


def _pack_step(run_folder: Path, kind: str, step: int, notes: list[str]) -> _Packed:
    rows: dict[str, dict[str, Any]] = {}
    for row in records_of_step(run_folder / kind, step, notes, dict, what="rollout"):
        episode = row.get("episode")
        if isinstance(episode, dict) and episode.get("rollout_id"):
            rows[text(episode["rollout_id"])] = row
    figures = _read_figures(run_folder, step, notes) if kind == "rollouts" else {}
    packed = _Packed()
    chunk: list[str] = []
    # Rollouts of one task side by side: they are read together, and deflate finds what they share.
    for rollout_id in sorted(rows, key=_natural):
        known = figures.get(rollout_id)
        whole = record(rows[rollout_id], known)
        line = {"set": _SETS[kind], "step": step, "chunk": len(packed.chunks), "place": len(chunk)}
        packed.lines.append(index_line(rows[rollout_id], known) | line)
        packed.token_ids.update(i for row in whole["rows"] for i in row["ids"])
        packed.num_figures += any(row["trainer"] is not None for row in whole["rows"])
        chunk.append(write_json(whole, separators=(",", ":")))
        if sum(map(len, chunk)) > _CHUNK_CHARS:
            packed.chunks.append(_base64("[" + ",".join(chunk) + "]"))
            chunk = []
    if chunk:
        packed.chunks.append(_base64("[" + ",".join(chunk) + "]"))
    return packed


def _columns(ordered: Sequence[_Packed]) -> dict[str, Any]:
    """The index by column, which deflates better and parses faster than a list of objects."""
    lines, before = [], 0
    for packed in ordered:
        lines += [line | {"chunk": line["chunk"] + before} for line in packed.lines]
        before += len(packed.chunks)
    return {"rollouts": {name: [line[name] for line in lines] for name in (lines[0] if lines else ())}}


def _note_missing_figures(packed: Mapping[tuple[str, int], _Packed], notes: list[str]) -> None:
    training = [p for (kind, _), p in packed.items() if kind == "rollouts"]
    if training and not any(p.num_figures for p in training):
        notes.append("this run kept no figures of its updates: advantages and ratios can't be shown")


# ---- reading the run folder


def _by_importance(steps: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Evaluations first, then training steps so that any number of the first ones is spread evenly."""
    training = [key for key in steps if key[0] == "rollouts"]
    order = sorted(range(len(training)), key=lambda i: (_bits_reversed(i), i))
    spread = [training[-1], *(training[i] for i in order if i != len(training) - 1)] if training else []
    return [key for key in steps if key[0] != "rollouts"] + spread


def _bits_reversed(i: int) -> int:
    """The van der Corput order: 0, a half, a quarter, three quarters …"""
    return int(f"{i:032b}"[::-1], 2)


def _read_figures(run_folder: Path, step: int, notes: list[str]) -> dict[str, TokenFigures]:
    folder = run_folder / TOKEN_FIGURES
    advantages: dict[str, float | None] = {}
    logprobs: dict[str, dict[int, list[float]]] = {}
    rows = records_of_step(folder, step, notes, dict, what="training row") if step_files(folder, step) else ()
    for row in rows:
        rollout_id = text(row.get("rollout_id"))
        advantages[rollout_id] = number(row.get("advantage"))
        if isinstance(row.get("row"), int) and isinstance(row.get("logprobs"), list):
            logprobs.setdefault(rollout_id, {})[row["row"]] = row["logprobs"]
    return {k: TokenFigures(advantage=a, logprobs=logprobs.get(k, {})) for k, a in advantages.items()}


def _natural(rollout_id: str) -> list[tuple[int, str]]:
    """Sorts -2 before -10."""
    parts = re.split(r"([0-9]{1,18})", rollout_id)
    # What the pattern captured stands at the odd places.
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


# ---- writing the page


def _deflated(value: object) -> str:
    return _base64(write_json(value, separators=(",", ":")))


def _base64(json_text: str) -> str:
    # Python escapes all that is not ASCII: lone surrogates too come through.
    return base64.b64encode(zlib.compress(json_text.encode("ascii"), 6)).decode("ascii")


def _render(**values: Any) -> str:
    script, style = _asset("viewer.js"), _asset("viewer.css")
    return render_page(
        "viewer.html",
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
        **values,
    )


@functools.cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(source: str) -> Markup:
    """As a content security policy names it. What is hashed stands between the tags to the last character."""
    return Markup("sha256-") + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
