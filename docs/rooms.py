"""Draws the rooms of this repository and what each imports into docs/architecture.md: `python docs/rooms.py`.

Arrows that follow from others are left out: where reports import runs, and runs import config, reports may import
config too. What may import what is `[tool.importlinter]` in pyproject.toml, which `make check` holds.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/rooms.py -->\n", "<!-- end of the drawing -->\n"


def room_of(module: str) -> str:
    """`trainer.runs` of `trainer.runs.files`, `envs` of all its modules; empty for others' modules."""
    layer, _, rest = module.partition(".")
    if layer not in ("envs", "graders", "trainer"):
        return ""
    return f"trainer.{rest.partition('.')[0]}" if layer == "trainer" and rest else layer


def imports() -> dict[str, set[str]]:
    """Of each room the other rooms that it imports, anywhere in its files."""
    found: dict[str, set[str]] = {}
    for layer in ("envs", "graders", "trainer"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            if own == "trainer.__init__":
                continue
            rooms = found.setdefault(own, set())
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [f"trainer.{alias.name}" for alias in node.names] if node.module == "trainer" else []
                    rooms |= {room_of(name) for name in names or [node.module]} - {"", own}
    return found


def direct(found: dict[str, set[str]]) -> dict[str, list[str]]:
    """The arrows that follow from no others. Raises `graphlib.CycleError` where rooms import each other in a circle."""
    reach: dict[str, set[str]] = {}
    for room in graphlib.TopologicalSorter(found).static_order():
        reach[room] = set().union(*({other} | reach[other] for other in found[room]))
    return {room: sorted(o for o in others if not any(o in reach[p] for p in others)) for room, others in found.items()}


def drawing() -> str:
    """Mermaid, and the numbers that go with it."""
    found = imports()
    kept = direct(found)
    lines = ["```mermaid", "flowchart TD"]
    for room in sorted(kept):
        name = room.removeprefix("trainer.")
        folder = ROOT / room.replace(".", "/")
        lines.append(f"    {name}[{name}]" if folder.is_dir() else f"    {name}({name})")
    lines += [f"    {room} --> {other}".replace("trainer.", "") for room in sorted(kept) for other in kept[room]]
    shown = sum(map(len, kept.values()))
    told = f"{len(found)} rooms, {shown} arrows; {sum(map(len, found.values())) - shown} more follow from these."
    return "\n".join([*lines, "```", "", told, ""])


def page() -> str:
    """docs/architecture.md with the drawing of today."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + drawing() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page())
