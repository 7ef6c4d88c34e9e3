"""One-file HTML pages: no network, no server, no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from envs.types import Message
from trainer.rollout import Rollout
from trainer.run_files import write_atomically

_MAX_TEXT_CHARS = 4000
"""A longer message is cut on the page; the whole stands in the JSONL file."""


def render_page(template: str, **values: Any) -> str:
    """The HTML of `template`, which lies beside this file."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Everything a model, a tool or a config wrote is untrusted text.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(**values)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render `template` and put the page in place at once."""
    write_atomically(path, render_page(template, **values))
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One rollout as a page shows it."""

    heading: str
    facts: str
    explanation: str
    messages: Sequence[dict[str, Any]]
    """Those after the prompt."""


def shown(heading: str, rollout: Rollout) -> Shown:
    """Of a graded rollout."""
    assert rollout.grade is not None
    episode = rollout.episode
    parts = "  ".join(f"{name} {value:+.3f}" for name, value in rollout.grade.parts.items())
    facts = [
        f"reward {rollout.grade.reward:.3f}",
        f"{episode.num_tool_calls} calls",
        f"{episode.num_tokens:,} tokens",
        str(episode.stop_reason),
        parts,
    ]
    return Shown(
        heading=heading,
        facts=" · ".join(filter(None, facts)),
        explanation=cut(rollout.grade.explanation),
        messages=[message(m) for m in episode.messages[len(rollout.task.messages) :]],
    )


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
    whole = str(text or "").strip()
    return whole if len(whole) <= limit else f"{whole[:limit]} … [{len(whole) - limit:,} more characters]"
