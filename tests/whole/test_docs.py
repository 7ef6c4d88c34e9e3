"""What the pages say of the tests holds."""

from __future__ import annotations

import ast
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from tests.support import ROOT
from trainer.config import RunConfig, reference

PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])


def names_in(path: Path) -> set[str]:
    nodes = ast.parse(path.read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    files = {path.stem: names_in(path) for path in ROOT.glob("tests/**/*.py")}
    for file, test in re.findall(r"\b(?:(test_\w+)\.py(?:::)?)?(test_\w+)?", page.read_text()):
        assert not file or file in files, f"{page.name} names {file}.py"
        if test:
            known = files[file] if file else {*files, *(name for names in files.values() for name in names)}
            assert test in known, f"{page.name} names {test}"


def test_the_page_of_the_config_is_fresh_and_explains_every_key():
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == reference.page(), "write it anew: python -m trainer.config.reference > docs/config.md"
    assert {*RunConfig.model_fields} <= {*re.findall(r"`(\w+)`", page)}
    rows = [line for line in page.splitlines() if re.match(r"\| `\w+` \|", line)]
    assert len(rows) > 200 and not [row for row in rows if row.endswith("|  |")], "a key without a description"
    explained = re.findall(r"^#+ `([^`]+)`$", page, re.M)
    assert len(explained) == len({*explained}) > 40
    for kind in ("world: {type: remote}", "grader: {type: multi}", "world.user: {type: engine}"):
        assert kind in explained


def test_the_drawing_of_the_rooms_is_fresh_and_all_of_them_are_told():
    rooms = SourceFileLoader("rooms", str(ROOT / "docs" / "rooms.py")).load_module()
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert page == rooms.page(), "draw it anew: python docs/rooms.py"
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("trainer/*/__init__.py")}
    assert {"envs", "graders", *folders} == {*re.findall(r"^\| `([\w/]+)` \| ", page, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_the_pages_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links {link}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_the_pages_for_contributors_name_exist(page):
    named = re.findall(r"`([\w/]+/[\w.]+\.(?:py|md|lock))`", (ROOT / page).read_text())
    assert len(named) >= 1
    for name in named:
        assert any((ROOT / folder / name).exists() for folder in ("", "trainer")), f"{page} names {name}"


@pytest.mark.parametrize("page", ["compatibility.md", "borders.md"])
def test_every_case_of_the_pages_of_cases_names_its_tests(page):
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| ")]
    cases = [row for row in rows if not row.startswith("| | case")]
    without = [row for row in cases if not re.search(r"`test_\w+`[^|]*\|$", row)]
    assert len(cases) > 40 and all("no test" in row for row in without)
