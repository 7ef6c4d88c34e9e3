"""Imports point one way: scripts → trainer → graders → envs; and what loads torch or vllm does so when it is needed."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

LAYERS = ["envs", "graders", "trainer", "scripts"]
"""Each may import itself and what stands before it."""
HEAVY = ("torch", "vllm", "transformers", "peft", "trl", "accelerate", "datasets")


def imported(path: Path) -> set[str]:
    """Top-level names of all modules imported, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_itself_and_those_below(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    above = {*LAYERS[LAYERS.index(layer) + 1 :], "tests"}
    for path in files:
        assert not imported(path) & above, f"{path} imports from above"


@pytest.mark.parametrize("layer", ["envs", "graders"])
def test_worlds_and_judgement_know_neither_torch_nor_vllm(layer):
    # A sentence-embedding model is a tool of worlds and graders alike; it loads torch with the first text.
    for path in {*(ROOT / layer).rglob("*.py")} - {ROOT / "envs/embedding.py"}:
        assert not imported(path) & {"torch", "vllm", "transformers", "peft", "trl", "accelerate"}, path


def rooms_of(layer: str) -> dict[str, set[str]]:
    """Files and folders of a layer, and which of the others each imports."""
    rooms: dict[str, set[str]] = {}
    for path in (ROOT / layer).rglob("*.py"):
        own = path.relative_to(ROOT / layer).parts[0].removesuffix(".py")
        modules = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        others = {module.split(".")[1] for module in modules if module.startswith(f"{layer}.")}
        rooms.setdefault(own, set()).update(others - {own})
    return rooms


@pytest.mark.parametrize("layer", ["envs", "graders"])
def test_rooms_of_a_layer_do_not_import_each_other_in_a_circle(layer):
    rooms = rooms_of(layer)
    assert len(rooms) > 10
    graphlib.TopologicalSorter(rooms).prepare()


@pytest.mark.parametrize(("layer", "most"), [("envs", 18), ("graders", 12), ("trainer", 10)])
def test_a_room_has_no_more_files_than_one_sees_at_a_glance(layer, most):
    folders = [ROOT / layer, *(path for path in (ROOT / layer).rglob("*") if (path / "__init__.py").exists())]
    for folder in folders:
        limit = most if folder == ROOT / layer else 12
        assert len([*folder.glob("*.py")]) <= limit, folder


LIGHT = [
    "envs",
    "envs.embedding",
    "envs.finance.world",
    "envs.remote.world",
    "graders",
    "graders.build",
    "trainer.types",
    "trainer.config",
    "trainer.prepare",
    "trainer.train",
]


def test_importing_one_after_the_other_loads_nothing_heavy():
    code = f"""
import importlib, sys
for module in {LIGHT!r}:
    importlib.import_module(module)
    print(module, *[name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines() == LIGHT


def test_package_files_hold_no_code():
    for path in (p for layer in ("envs", "graders", "trainer") for p in (ROOT / layer).rglob("__init__.py")):
        for node in ast.parse(path.read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert is_docstring or isinstance(node, ast.Import | ast.ImportFrom), f"{path}:{node.lineno}"


def test_the_rooms_keep_their_contracts():
    """Those of `[tool.importlinter]` in pyproject.toml: no arrow up, no circle, nothing heavy where it has no place."""
    run = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and "3 kept, 0 broken" in done.stdout, done.stdout + done.stderr
