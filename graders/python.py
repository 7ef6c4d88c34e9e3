"""The `python` grader: the user's own `grade(sample, item) -> float`, in a sandbox."""

from __future__ import annotations

import ast
import json
import math
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder

from envs.errors import UserError
from envs.types import Episode, Task
from graders.config import PythonConfig
from graders.sample import item_of, sample_of
from graders.sandbox.isolation import choose, import_paths
from graders.sandbox.limits import Limits
from graders.sandbox.pool import Outcome, Pool
from graders.sandbox.protocol import SOURCE_NAME
from graders.types import Grade, GraderErrorKind

_ARGUMENTS = ("sample", "item")
_KEY = "grader.source"


class PythonGrader:
    """Runs the source anew for each episode, its state gone with its process.

    What the source does wrong (an exception, a limit, a value that is no score: see `sandbox.scores`) scores 0 and is
    counted; what the sandbox does wrong is `WorldError`. `UserError` where the source can't be a grader, or where this
    machine can't isolate it and `isolation: none` does not allow to run it all the same, or where the source imports a
    package that is not installed here, outside any `try`: every grading would end there. Not covered: submodules that
    do not exist.
    """

    def __init__(self, config: PythonConfig, *, limits: Limits | None = None, num_workers: int | None = None) -> None:
        imports = check_source(config.source)
        _check_imports(config.source)
        self._name = config.name
        self._limits = limits or Limits()
        isolation = choose(or_none=config.isolation == "none")
        self._pool = Pool(config.source, imports, isolation=isolation, limits=self._limits, num_workers=num_workers)

    def check(self, task: Task) -> None:
        try:
            json.dumps(item_of(task))
        except (TypeError, ValueError) as e:
            raise UserError(f"task {task.task_id!r}: the python grader needs an item that is JSON: {e}") from e

    async def grade(self, task: Task, episode: Episode) -> Grade:
        payload = json.dumps({"sample": sample_of(episode), "item": item_of(task)}).encode()
        outcome = await self._pool.run(payload)
        score = _score_of(outcome)
        explanation = self._fault_of(outcome) if score is None else f"{self._name}: {score:g}"
        errors = (GraderErrorKind.PYTHON_GRADER_RUNTIME,) if score is None else ()
        if printed := outcome.output.strip():
            explanation += f"\nprinted: {printed}"
        return Grade(reward=score or 0.0, parts={self._name: score or 0.0}, explanation=explanation, errors=errors)

    async def aclose(self) -> None:
        await self._pool.aclose()

    def _fault_of(self, outcome: Outcome) -> str:
        if outcome.timed_out:
            return f"{self._name}: ran longer than {self._limits.wall_s:g} s"
        if (error := _said(outcome, "error")) is not None:
            return f"{self._name}: {error}"
        if outcome.signal == signal.SIGXCPU:
            return f"{self._name}: used more than {self._limits.cpu_s} s of CPU time"
        if outcome.signal:
            return f"{self._name}: ended by {signal.Signals(outcome.signal).name}"
        return f"{self._name}: ended without a valid result"


def check_source(source: str) -> list[str]:
    """Compile the source, run nothing, and return the modules that it imports. Raises `UserError` with the line."""
    try:
        tree = ast.parse(source, SOURCE_NAME)
        compile(source, SOURCE_NAME, "exec", dont_inherit=True)
    except SyntaxError as e:
        raise UserError(f"{_KEY}, line {e.lineno}: {e.msg}") from e
    except (ValueError, RecursionError, MemoryError) as e:
        raise UserError(f"{_KEY}: can't be compiled: {e or type(e).__name__}") from e
    _check_grade(tree)
    return _imports_of(tree)


def _check_grade(tree: ast.Module) -> None:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    top = [node for node in functions if node in tree.body and node.name == "grade"]
    if not top:
        elsewhere = [node.lineno for node in functions if node.name == "grade"]
        hint = f"; the one of line {elsewhere[0]} is not at the top level" if elsewhere else ""
        last_line = tree.body[-1].end_lineno if tree.body else 1
        raise UserError(f"{_KEY}, line {last_line}: expected a function grade(sample, item) by the end{hint}")
    grade = top[-1]
    if isinstance(grade, ast.AsyncFunctionDef):
        raise UserError(f"{_KEY}, line {grade.lineno}: grade must not be async")
    arguments = grade.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    enough = len(positional) >= len(_ARGUMENTS) or arguments.vararg
    if required > len(_ARGUMENTS) or not enough or None in arguments.kw_defaults:
        raise UserError(f"{_KEY}, line {grade.lineno}: expected grade(sample, item), two arguments by position")
    if tuple(argument.arg for argument in positional[: len(_ARGUMENTS)]) == _ARGUMENTS[::-1]:
        raise UserError(
            f"{_KEY}, line {grade.lineno}: grade(item, sample) is called as grade(sample, item); swap the two"
        )


def _imports_of(tree: ast.Module) -> list[str]:
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names[node.module] = None
            # A submodule, or a name that there is no module for.
            names.update((f"{node.module}.{alias.name}", None) for alias in node.names)
    return list(names)


def _check_imports(source: str) -> None:
    missing = {
        name: line for name, line in _needed_imports(ast.parse(source)) if not _can_be_imported(name.partition(".")[0])
    }
    if missing:
        line = next(iter(missing.values()))
        names = ", ".join(dict.fromkeys(name.partition(".")[0] for name in missing))
        raise UserError(
            f"{_KEY}, line {line}: imports what is not installed here: {names}; install it beside this project, or "
            "import it inside a try that does without"
        )


def _needed_imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Module and line of each import, but for those that a `try` may do without and those for type checkers."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield node.module, node.lineno
    for name, value in ast.iter_fields(node):
        is_optional = isinstance(node, ast.Try) and node.handlers and name == "body"
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and name == "body"
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not is_optional and not is_for_types:
                yield from _needed_imports(child)


def _can_be_imported(name: str) -> bool:
    return name in sys.stdlib_module_names or PathFinder.find_spec(name, import_paths()) is not None


def _said(outcome: Outcome, key: str) -> object:
    """What the grading wrote under a key. The source could have written anything there."""
    try:
        result = json.loads(outcome.result)
    except (ValueError, RecursionError):
        return None
    return result.get(key) if isinstance(result, dict) else None


def _score_of(outcome: Outcome) -> float | None:
    value = _said(outcome, "score")
    if outcome.timed_out or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
