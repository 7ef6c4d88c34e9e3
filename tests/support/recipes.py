"""The recipes of docs/adding.md, followed in a copy of the repository."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

from tests.support import ROOT

PAGE = (ROOT / "docs" / "adding.md").read_text()


def recipe(heading: str) -> list[tuple[str, str, str]]:
    """Its pieces of code: the file, where in it (nothing for a new file), and the text."""
    part = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python (\S+) ?(.*)\n((?:.*\n)*?)```$", part, re.M)


def apply(tree: Path, heading: str) -> set[str]:
    """Follow the recipe in a copy of the repository; the files of the repository that it touches."""
    for file, where, text in recipe(heading):
        path = tree / file
        if not where:
            assert not path.exists()
            path.write_text(text)
            continue
        source = path.read_text()
        place, name = re.fullmatch(r"(above|at the end of) (\w+)", where).groups()
        [node] = [n for n in ast.parse(source).body if name in map(ast.unparse, targets_of(n))]
        line = node.lineno - 1 if place == "above" else node.value.end_lineno - 1
        lines = source.splitlines(keepends=True)
        path.write_text("".join([*lines[:line], text, *lines[line:]]))
    return {file for file, _, _ in recipe(heading) if "/" in file}


def targets_of(node: ast.stmt) -> list[ast.expr]:
    return [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []


def copied(folder: Path) -> Path:
    for name in ("envs", "graders", "trainer"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
