"""The `python` grader: the user's own `grade(sample, item) -> float`, in a sandbox."""

from __future__ import annotations

import ast
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from typing import Literal

from pydantic import Field, field_validator

from envs.errors import UserError
from envs.types import Episode, Task
from graders.hosted.view import hosted_sample, item_of
from graders.sandbox.isolation import Imports, choose, import_paths
from graders.sandbox.pool import Outcome, Pool
from graders.sandbox.protocol import SOURCE_NAME, Limits
from graders.settings import Continuous, Name
from graders.types import Grade, GraderErrorKind

_ARGUMENTS = ("sample", "item")
_KEY = "grader.source"
_MAX_SOURCE_BYTES = 256_000
# A call might end it too, by an exception; then the imports after it were for nothing, as in a `try`.
_ENDS = (ast.Return, ast.Raise, ast.Assert)


class PythonConfig(Continuous):
    """The user's own `grade(sample, item) -> float`, in a sandbox."""

    type: Literal["python"]
    name: Name = "python"
    source: str = Field(min_length=1, description="Python source that defines grade(sample, item).")
    image_tag: str | None = Field(default=None, description="Read and ignored: the environment is this machine's.")
    isolation: Literal["required", "none"] = Field(
        default="required", description="none runs the source unprotected where no isolation can be had."
    )

    @field_validator("source")
    @classmethod
    def _is_small(cls, source: str) -> str:
        if len(source.encode()) >= _MAX_SOURCE_BYTES:
            raise ValueError(f"expected less than {_MAX_SOURCE_BYTES // 1000} kB of source")
        return source

    def check_texts(self) -> None:
        check_source(self.source)


class PythonGrader:
    """Runs the source anew for each episode, its state gone with its process.

    What the source does wrong (an exception, a limit, a value that is no score: see `sandbox.scores`) scores 0 and is
    counted, whatever it wrote before; what the sandbox does wrong is `WorldError`. `UserError` where the source can't
    be a grader, or where this machine can't isolate it and `isolation: none` does not allow to run it all the same, or
    where the source imports a package that is not installed here, outside any `try`: every grading would end there. Not
    covered: submodules that do not exist.
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
        payload = json.dumps({"sample": hosted_sample(episode), "item": item_of(task)}).encode()
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


def check_source(source: str) -> Imports:
    """Compile the source, run nothing, and return what each grading is sure to import, in order: what stands at the top
    level and in `grade` itself, up to where either might end, and under no condition. Raises `UserError` with the line.
    """
    try:
        tree = ast.parse(source, SOURCE_NAME)
        compile(source, SOURCE_NAME, "exec", dont_inherit=True)
    except SyntaxError as e:
        raise UserError(f"{_KEY}, line {e.lineno}: {e.msg}") from e
    except (ValueError, RecursionError, MemoryError) as e:
        raise UserError(f"{_KEY}: can't be compiled: {e or type(e).__name__}") from e
    grade = _check_grade(tree)
    top, ends = _sure_imports(tree.body)
    return top if ends else [*top, *_sure_imports(grade.body)[0]]


def _check_grade(tree: ast.Module) -> ast.FunctionDef:
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
    return grade


def _sure_imports(statements: Sequence[ast.stmt]) -> tuple[list[tuple[str, list[str]]], bool]:
    """What these import if they run at all, and whether they might end before their last."""
    found: list[tuple[str, list[str]]] = []
    for statement in statements:
        match statement:
            case ast.Import():
                found += [(alias.name, []) for alias in statement.names]
            case ast.ImportFrom(level=0, module=str(module)):
                found.append((module, [alias.name for alias in statement.names]))
            case ast.Try() | ast.With():
                found += _sure_imports(statement.body)[0]
        if any(isinstance(node, _ENDS) for node in _nodes(statement, leave_out=_only_defined)):
            return found, True
    return found, False


def _only_defined(node: ast.AST, field: str) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and field == "body"


def _nodes(tree: ast.AST, *, leave_out: Callable[[ast.AST, str], bool]) -> Iterator[ast.AST]:
    """The tree and all within it, in no order, but for the fields of nodes that `leave_out` names. A source may be
    nested deeper than Python calls functions."""
    left = [tree]
    while left:
        node = left.pop()
        yield node
        for name, value in ast.iter_fields(node):
            if not leave_out(node, name):
                children = value if isinstance(value, list) else [value]
                left += [child for child in children if isinstance(child, ast.AST)]


def _check_imports(source: str) -> None:
    nodes = _nodes(ast.parse(source), leave_out=_done_without)
    needed = sorted((line, name.partition(".")[0]) for node in nodes for line, name in _imported_by(node))
    missing = {name: line for line, name in reversed(needed) if not _can_be_imported(name)}
    if missing:
        names = ", ".join(reversed(missing))
        raise UserError(
            f"{_KEY}, line {min(missing.values())}: imports what is not installed here: {names}; install it beside "
            "this project, or import it inside a try that does without"
        )


def _imported_by(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield node.lineno, node.module


def _done_without(node: ast.AST, field: str) -> bool:
    """Whether the imports there may fail: a `try` goes on, or they are for type checkers."""
    if field != "body":
        return False
    if isinstance(node, ast.If):
        return any("TYPE_CHECKING" in (getattr(n, "id", ""), getattr(n, "attr", "")) for n in ast.walk(node.test))
    return isinstance(node, ast.Try) and bool(node.handlers)


def _can_be_imported(name: str) -> bool:
    return name in sys.stdlib_module_names or PathFinder.find_spec(name, import_paths()) is not None


def _said(outcome: Outcome, key: str) -> object:
    """What the grading wrote under a key. The source could have written anything there."""
    try:
        result = json.loads(outcome.result)
    except (ValueError, RecursionError):
        return None
    value = result.get(key) if isinstance(result, dict) else None
    # A text may hold halves of characters, which nothing that is written later could take.
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _score_of(outcome: Outcome) -> float | None:
    value = _said(outcome, "score")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
