"""One-file HTML pages: no network, no server, and no script but that by which a run's page loads itself anew."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from envs.types import Message
from trainer.reports.comparison import Comparison
from trainer.runs.files import write_atomically
from trainer.types import Rollout

_MAX_TEXT_CHARS = 4000
"""A longer message is cut on the page; the whole stands in the JSONL file."""
_MAX_QUESTION_CHARS = 600


def render_page(template: str, **values: Any) -> str:
    """The HTML of `template`, a file of `templates/` or of `transcripts/`."""
    here = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader([here / "templates", here / "transcripts"]),
        # Everything a model, a tool or a config wrote is untrusted text.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals |= {"script_of": _script, "refresh_s": 0}
    return templates.get_template(template).render(**values)


def _script(name: str) -> dict[str, Any]:
    """A file of `templates/` and the digest by which the page's policy knows it."""
    text = (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "digest": digest}


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render `template` and put the page in place at once."""
    write_atomically(path, render_page(template, **values))
    return path


def pairs_shown(comparison: Comparison) -> list[dict[str, Any]]:
    """What the macro `pairs` reads: the tasks that changed most, with a typical rollout of each policy."""
    out = []
    for pair in comparison.pairs:
        task = pair.rollouts[0].task
        item = {k: v for k, v in task.item.items() if isinstance(v, str | int | float | bool)}
        means = " → ".join(f"{mean:.2f}" for mean in pair.means)
        out.append(
            {
                "task_id": pair.task_id,
                "change": f"mean reward {means} ({pair.means[-1] - pair.means[0]:+.2f})",
                "question": cut(task.messages[-1].content if task.messages else "", _MAX_QUESTION_CHARS),
                "prompt": [message(m) for m in task.messages],
                "item": cut(json.dumps(item, ensure_ascii=False), _MAX_QUESTION_CHARS) if item else "",
                "sides": [shown(e.name, r) for e, r in zip(comparison.evaluations, pair.rollouts, strict=True)],
            }
        )
    return out


def shown(heading: str, rollout: Rollout) -> dict[str, Any]:
    """A graded rollout as a page shows it, without its prompt."""
    assert rollout.grade is not None
    episode = rollout.episode
    parts = "  ".join(f"{name} {value:+.3f}" for name, value in rollout.grade.parts.items())
    told = [
        f"reward {rollout.grade.reward:.3f}",
        f"{episode.num_tool_calls} calls",
        f"{episode.num_tokens:,} tokens",
        str(episode.stop_reason),
        parts,
    ]
    return {
        "heading": heading,
        "facts": " · ".join(filter(None, told)),
        "explanation": cut(rollout.grade.explanation),
        "messages": [message(m) for m in episode.messages[len(rollout.task.messages) :]],
    }


def message(m: Message) -> dict[str, Any]:
    """What the page's macro `transcript` reads."""
    return {
        "role": m.role,
        "name": m.name,
        "reasoning": cut(m.reasoning),
        "content": cut(m.content),
        "calls": [cut(f"{c.name}({c.arguments})") for c in m.tool_calls],
    }


def cut(text: object, limit: int = _MAX_TEXT_CHARS) -> str:
    """The text, and how much of it was left out."""
    whole = str(text or "").strip()
    return whole if len(whole) <= limit else f"{whole[:limit]} … [{len(whole) - limit:,} more characters]"
