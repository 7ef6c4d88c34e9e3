"""The user's own Python: found by its name in a config, and called without holding up the event loop."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from envs.errors import AgentRFTError, UserError, nearest
from envs.limits.threads import THREADS

TARGET_PATTERN = r"^[^:]+:[A-Za-z_][\w.]*$"
_EXPECTED = "expected `package.module:Name` or `path/to/file.py:name`"


def load_target(target: str, *, key: str) -> Any:
    """What `target` names: `package.module:Name`, or `path/to/file.py:name` from the working directory.

    A file is loaded once, whoever names it, and finds the modules in its own folder. Raises `UserError` that names the
    key and what was expected: no such file or module, an error while it is imported (with its place), no such name.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"{key} {target!r}: {_EXPECTED}")
    where = f"{key} {target!r}"
    found: Any = _load_file(Path(place), where) if place.endswith(".py") else _load_module(place, where)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            hint = nearest(part, [name for name in dir(found) if not name.startswith("_")])
            raise UserError(f"{where}: {place} has no {part!r}{hint}") from None
    return found


def file_of(target: str) -> Path | None:
    """The file in which a target stands; None where it can't be found, and for code that is not Python's."""
    place = target.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    _make_importable(Path.cwd())
    try:
        spec = importlib.util.find_spec(place)
    except (Exception, SystemExit):
        # A package above it is imported for that, and may fail as it likes; whoever loads the target will tell.
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _load_file(path: Path, where: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"{where}: no file {path}")
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # Annotations and pickles look their module up there.
    sys.modules[name] = module
    _make_importable(path.parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise UserError(f"{where}: {_cause(e, path)}") from e
    return module


def _load_module(name: str, where: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:
        raise UserError(f"{where}: {_cause(e, None)}") from e


def _make_importable(folder: Path) -> None:
    """Last in line, so that nothing there hides an installed package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _cause(error: BaseException, path: Path | None) -> str:
    """What went wrong while the user's module was imported, and where in it."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if path and f.filename == str(path)] or [
        f for f in frames if "importlib" not in f.filename and f.filename != __file__
    ]
    place = f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""
    return f"can't be imported: {type(error).__name__}: {error}{place}"


@contextlib.contextmanager
def looked_at(where: str) -> Iterator[None]:
    """Before a run, what the user's own code raises is theirs to mend: a `UserError` with the place. Ours pass."""
    try:
        yield
    except AgentRFTError:
        raise
    except (Exception, SystemExit) as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        raise UserError(f"{where}: raised {type(e).__name__}: {e} ({frame.filename}, line {frame.lineno})") from e


def make(target: Any, kwargs: Mapping[str, Any], *, where: str) -> Any:
    """Call the user's class or factory; its own errors pass through. Raises `UserError` where `kwargs` do not fit."""
    try:
        inspect.signature(target).bind(**kwargs)
    except TypeError as e:
        raise UserError(f"{where}: kwargs: {e}") from None
    except ValueError:
        # A class of C code without a signature: the call itself will tell.
        pass
    return target(**kwargs)


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """What of `offered` the function takes by name: all of it where it has `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(offered)
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if name in by_name}


def required(function: Callable[..., Any]) -> list[str]:
    """The parameters that have to be given."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]


def required_by_name(function: Callable[..., Any], where: str) -> list[str]:
    """As `required`. Raises `UserError` for one that can be given by position only."""
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
            raise UserError(f"{where}: parameter {p.name!r} is given by its name; expected none before a /")
    return required(function)


def check_order(function: Callable[..., Any], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """For a function that is called with arguments by position, so that its parameters may have any names.

    Gives its own names of them, none where they can't be known. Raises `UserError` where it does not take so many, or
    names them as we do in another order: it would read one as the other.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        # C code without a signature: the first call will tell.
        return ()
    called = f"{where} is called as {where.rpartition(' ')[2]}({', '.join(names)})"
    try:
        signature.bind(*names)
    except TypeError as e:
        raise UserError(f"{called}, but: {e}") from None
    given = tuple(signature.parameters)[: len(names)]
    if given != names and sorted(given) == sorted(names):
        raise UserError(f"{called}, but: its parameters are {', '.join(given)}, in this order")
    return given


def forgets_to_return(function: Callable[..., Any]) -> bool:
    """Whether it comes to its end and has no `return` that says something, or that it says nothing; False where that
    can't be known."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return False
    if not any(
        one.opname.startswith("RETURN_") and one.opname != "RETURN_GENERATOR" for one in dis.get_instructions(code)
    ):
        # It only raises, or never ends.
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return False
    waiting: list[ast.AST] = list(ast.iter_child_nodes(tree.body[0]))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Return):
            return False
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call gives a coroutine; partials and callable objects included."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def call_user(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call sync code in a worker thread, async code on this event loop.

    Raises `WorldError` where calls that never return have left no thread.
    """
    return await call_as(_name_of(function), function, *args, **kwargs)


async def call_as(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """As `call_user`; `name` is what a call that hangs is known by."""
    with ends_no_process(name):
        if is_async(function):
            return await function(*args, **kwargs)
        value = await THREADS.run(name, function, *args, **kwargs)
        # Callable objects and lambdas may hide a coroutine function; what they return is awaited here, on the loop.
        return await value if inspect.isawaitable(value) else value


@contextlib.contextmanager
def ends_no_process(name: str) -> Iterator[None]:
    """`sys.exit` of the user's own code is an error like others: the run would end as if it were done."""
    try:
        yield
    except SystemExit as e:
        raise RuntimeError(f"{name} called sys.exit({e.code!r})") from e


@contextlib.contextmanager
def raised_by(name: str) -> Iterator[None]:
    """What the user's own code raises in a run says in its traceback whose it is; our errors say it in their words."""
    try:
        with ends_no_process(name):
            yield
    except AgentRFTError:
        raise
    except Exception as e:
        e.add_note(f"raised by {name}")
        raise


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name.rpartition("<locals>.")[2]
