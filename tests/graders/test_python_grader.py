"""The `python` grader: what it scores, what it refuses, and what it says went wrong. It runs in the real sandbox."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Iterator

import pytest

from envs.errors import UserError, WorldError
from envs.types import Episode, Message, StopReason, Task, Turn
from graders.build import build_scorer
from graders.sandbox import isolation
from graders.sandbox.isolation import Isolation
from graders.sandbox.protocol import Limits
from graders.types import Grade, GraderErrorKind
from graders.user import python
from graders.user.python import PythonConfig, PythonGrader

TASK = Task(task_id="t", messages=(Message(role="user", content="How much?"),), item={"answer": 42, "mode": "honest"})
HAS_WALLS = any(isolation.try_out(way) is None for way in Isolation if way is not Isolation.NONE)
needs_walls = pytest.mark.skipif(not HAS_WALLS, reason="this machine offers no isolation at all")
SOURCE = """
import decimal, fractions, json, math, sys, time
import numpy as np, sympy

def grade(sample, item):
    return BEHAVIOURS[item["mode"]](sample, item)

def fails(sample, item):
    print("on the way")
    raise KeyError("gold")

def deep(sample, item):
    return deep(sample, item)

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no words")

def unprintable(sample, item):
    raise Unprintable

def halves(sample, item):
    raise ValueError("\\ud800 half a character")

BEHAVIOURS = {
    "halves": halves,
    "honest": lambda sample, item: float(sample["output_text"] == str(item["answer"])),
    "half": lambda sample, item: 0.5,
    "one": lambda sample, item: 1,
    "numpy": lambda sample, item: np.float32(0.25) * np.ones((300, 300)).mean(dtype=np.float32),
    "negative": lambda sample, item: -3.5,
    "fails": fails,
    "deep": deep,
    "unprintable": unprintable,
    "none": lambda sample, item: None,
    "nan": lambda sample, item: math.nan,
    "inf": lambda sample, item: math.inf,
    "true": lambda sample, item: True,
    "equal": lambda sample, item: np.array(sample["output_text"]) == str(item["answer"]),
    "array of no axes": lambda sample, item: np.array(0.25),
    "decimal": lambda sample, item: decimal.Decimal("0.25"),
    "fraction": lambda sample, item: fractions.Fraction(1, 4),
    "sympy": lambda sample, item: sympy.Rational(1, 4),
    "complex": lambda sample, item: 1j,
    "dict": lambda sample, item: {"score": 1.0},
    "text": lambda sample, item: "1.0",
    "array": lambda sample, item: np.ones(2),
    "huge": lambda sample, item: 10**400,
    "exit": lambda sample, item: sys.exit(3),
    "sleeps": lambda sample, item: time.sleep(60),
}
"""
LIMITS = Limits(wall_s=10)


def episode(answer: str) -> Episode:
    message = Message(role="assistant", content=answer)
    return Episode(
        rollout_id="r", task_id="t", messages=(*TASK.messages, message), turns=(Turn(message=message),),
        stop_reason=StopReason.ANSWERED,
    )  # fmt: skip


def config(source: str, **settings: object) -> PythonConfig:
    return PythonConfig.model_validate({"type": "python", "source": textwrap.dedent(source), **settings})


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for the whole file, since workers belong to a loop. Never the current one: that is pytest-asyncio's."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def grader(loop: asyncio.AbstractEventLoop) -> object:
    if not HAS_WALLS:
        pytest.skip("this machine offers no isolation at all")
    made = PythonGrader(config(SOURCE, name="mine"), limits=LIMITS, num_workers=1)
    yield made
    loop.run_until_complete(made.aclose())


def graded(loop: asyncio.AbstractEventLoop, grader: PythonGrader, mode: str, answer: str = "42") -> Grade:
    task = Task(task_id="t", messages=TASK.messages, item={"answer": 42, "mode": mode})
    return loop.run_until_complete(grader.grade(task, episode(answer)))


@pytest.mark.parametrize(
    ("mode", "answer", "score"),
    [("honest", "42", 1.0), ("honest", "41", 0.0), ("half", "", 0.5), ("one", "", 1.0), ("numpy", "", 0.25),
     ("negative", "", -3.5), ("true", "", 1.0), ("equal", "42", 1.0), ("equal", "41", 0.0),
     ("array of no axes", "", 0.25), ("decimal", "", 0.25), ("fraction", "", 0.25), ("sympy", "", 0.25)],
)  # fmt: skip
def test_it_scores_what_the_source_returns(loop, grader, mode, answer, score):
    grade = graded(loop, grader, mode, answer)
    assert (grade.reward, grade.parts, grade.errors) == (score, {"mine": score}, ())


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("fails", "KeyError: 'gold'"),
        ("fails", 'raise KeyError("gold")'),
        ("fails", "printed: on the way"),
        ("deep", "RecursionError"),
        ("unprintable", "Unprintable"),
        ("none", "grade gave NoneType; expected a number"),
        ("nan", "grade gave nan; expected a finite number"),
        ("inf", "grade gave inf; expected a finite number"),
        ("text", "grade gave str; expected a number"),
        ("array", "grade gave ndarray; expected a number"),
        ("complex", "grade gave complex; expected a number"),
        ("dict", "grade gave dict; expected a number"),
        ("huge", "grade gave inf; expected a finite number"),
        ("exit", "SystemExit: 3"),
        ("halves", "ValueError: ? half a character"),
    ],
)
def test_an_exception_or_a_bad_value_gives_0_and_says_why(loop, grader, mode, says):
    grade = graded(loop, grader, mode)
    assert (grade.reward, grade.parts) == (0.0, {"mine": 0.0})
    assert grade.errors == (GraderErrorKind.PYTHON_GRADER_RUNTIME,)
    assert says in grade.explanation and len(grade.explanation) < 8_000


@needs_walls
async def test_a_source_that_takes_too_long_gives_0_and_names_the_limit():
    grader = PythonGrader(config(SOURCE), limits=Limits(wall_s=0.5), num_workers=1)
    try:
        task = Task(task_id="t", messages=TASK.messages, item={"mode": "sleeps"})
        grade = await grader.grade(task, episode(""))
    finally:
        await grader.aclose()
    assert grade.reward == 0 and grade.errors == (GraderErrorKind.PYTHON_GRADER_RUNTIME,)
    assert "longer than 0.5 s" in grade.explanation


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def grade(sample, item):\n  return (", r"grader\.source, line 2"),
        ("x = 1\n\ny = 2", r"line 3: expected a function grade\(sample, item\)"),
        ("class A:\n  def grade(self, item): pass", "line 2 is not at the top level"),
        ("\nasync def grade(sample, item): return 1", "line 2: grade must not be async"),
        ("def grade(sample): return 1", "line 1: expected grade"),
        ("def grade(sample, item, more): return 1", "line 1: expected grade"),
        ("def grade(sample, item, *, more): return 1", "line 1: expected grade"),
        (
            "x = 1\ndef grade(item, sample): return 1",
            r"line 2: grade\(item, sample\) is called as grade\(sample, item\)",
        ),
        ("def grade(item, sample, /, k=1): return 1", "line 1: .* swap the two"),
        ("x = " + "(" * 5000 + ")" * 5000, r"grader\.source"),
    ],
)
def test_a_source_that_is_no_grader_is_refused_when_it_is_built(source, says):
    with pytest.raises(UserError, match=says):
        PythonGrader(config(source))


def test_a_source_with_a_nul_is_no_text_of_a_config():
    with pytest.raises(ValueError, match="holds a NUL character"):
        config("def grade(sample, item): return '\0'")
    with pytest.raises(UserError, match=r"grader\.source"):
        python.check_source("def grade(sample, item): return '\0'")


def test_the_arguments_of_grade_may_have_any_names_but_each_others():
    for names in ("s, i", "item, row", "x, sample", "*args", "sample, item, extra=None", "item, *more"):
        python.check_source(f"def grade({names}): return 1")


def test_building_a_grader_runs_nothing_of_its_source(tmp_path):
    witness = tmp_path / "ran"
    python.check_source(f"open({str(witness)!r}, 'w')\ndef grade(sample, item): return 1")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("body", "sure"),
    [
        ("import numpy.linalg as la, json", ["numpy.linalg", "json"]),
        ("from scipy import stats, special", ["scipy: stats special"]),
        ("from scipy.stats import *", ["scipy.stats: *"]),
        ("try:\n    import numpy\nexcept ImportError:\n    import array", ["numpy"]),
        ("with open('x'):\n    import numpy", ["numpy"]),
        ("def helper():\n    import numpy", []),
        ("if False:\n    import numpy", []),
        ("for n in []:\n    import numpy", []),
        ("while 0:\n    import numpy\nimport json", ["json"]),
        ("f = lambda: __import__('numpy')", []),
        ("raise SystemExit\nimport numpy", []),
        ("if len('x'):\n    raise SystemExit\nimport numpy", []),
        ("import json\nassert json\nimport numpy", ["json"]),
    ],
)
def test_only_imports_that_every_grading_comes_to_are_done_before(body, sure):
    def shown(source: str) -> list[str]:
        return [": ".join(filter(None, (name, " ".join(names)))) for name, names in python.check_source(source)]

    assert shown(f"{body}\ndef grade(sample, item): return 1") == sure
    inside = f"def grade(sample, item):\n{textwrap.indent(body, '    ')}\n    return 1"
    # Inside of a function there is no `import *`.
    assert "*" in body or shown(inside) == sure


@pytest.mark.parametrize(
    "deep", ["x = " + "1 + " * 2_500 + "1", "if 0: pass\n" + "elif 0: pass\n" * 900, "x = " + "(" * 90 + ")" * 90]
)
def test_a_source_may_be_nested_as_deep_as_python_takes_it(deep):
    source = f"import json\n{deep}\nimport no_such_package\ndef grade(sample, item): return 1"
    assert python.check_source(source)[0] == ("json", [])
    with pytest.raises(UserError, match="not installed here: no_such_package"):
        PythonGrader(config(source))


def test_what_follows_a_way_out_of_grade_is_not_imported_before():
    source = "import json\ndef grade(s, i):\n import re\n if not s: return 0\n import numpy\n return 1"
    assert python.check_source(source) == [("json", []), ("re", [])]


@needs_walls
def test_an_item_that_is_no_json_is_named_before_training(grader):
    with pytest.raises(UserError, match=r"task 'odd'.*JSON"):
        grader.check(Task(task_id="odd", messages=(), item={"x": object()}))
    grader.check(TASK)


def test_without_any_isolation_it_is_refused_unless_asked_for_by_name(monkeypatch):
    source = "def grade(sample, item): return 1"
    works = Isolation.NONE
    monkeypatch.setattr(isolation, "try_out", lambda way: None if way is works else "not here")
    with pytest.raises(UserError, match=r"no way to isolate.*isolation: none"):
        PythonGrader(config(source))
    assert PythonGrader(config(source, isolation="none"))._pool.isolation is Isolation.NONE


async def test_unprotected_it_grades_all_the_same(monkeypatch):
    real = isolation.try_out
    monkeypatch.setattr(isolation, "try_out", lambda way: real(way) if way is Isolation.NONE else "not here")
    grader = PythonGrader(config(SOURCE, isolation="none"), limits=LIMITS, num_workers=1)
    try:
        assert (await grader.grade(TASK, episode("42"))).reward == 1
    finally:
        await grader.aclose()


@needs_walls
async def test_a_sandbox_that_fails_is_the_worlds_fault(monkeypatch):
    grader = PythonGrader(config(SOURCE), limits=LIMITS, num_workers=1)
    monkeypatch.setattr("graders.sandbox.pool.command", lambda way: ["/bin/false"])
    try:
        with pytest.raises(WorldError, match="sandbox of the python grader failed 2 times"):
            await grader.grade(TASK, episode("42"))
    finally:
        await grader.aclose()


@needs_walls
async def test_the_hosted_services_json_loads_unchanged():
    hosted = {"type": "python", "name": "g", "source": "def grade(sample, item): return 1.0", "image_tag": "2025-05-08"}
    grader = build_scorer(PythonConfig.model_validate(hosted), judge=None)
    try:
        assert (await grader.grade(TASK, episode(""))).parts == {"g": 1.0}
    finally:
        await grader.aclose()


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    import no_such_package\nexcept ImportError:\n    no_such_package = None",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import no_such_package",
        "import os.path, xml.etree.ElementTree, numpy.linalg",
    ],
)
def test_an_import_that_the_source_can_do_without_is_no_fault(source):
    PythonGrader(PythonConfig(type="python", source=f"{source}\ndef grade(sample, item): return 1"))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "import json\nimport no_such_package.inner as x",
            "line 2: imports what is not installed here: no_such_package;",
        ),
        ("try:\n    pass\nfinally:\n    from no_such_package import x", "line 4: imports what"),
        ("try:\n    x = 1\nexcept KeyError:\n    import no_such_package", "line 4: imports what"),
        # A module of the trainer's own folder is none of the sandbox's.
        ("import tests", "line 1: imports what is not installed here: tests"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_line(source, told):
    with pytest.raises(UserError, match=told):
        PythonGrader(PythonConfig(type="python", source=f"{source}\ndef grade(sample, item): return 1"))
