"""Scripts in processes of their own, at once: each is forked from one that has loaded what they all load.

That is settings, graders and pages, and neither torch nor vLLM: `Ended.loaded` tells what a script loaded besides.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tests.support import ROOT

HEAVY = ("torch", "transformers", "vllm", "peft", "trl", "accelerate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a script."""

    returncode: int
    stdout: str
    stderr: str
    loaded: tuple[str, ...]
    """Of the packages that take long."""


def run_script(name: str, *arguments: object, environment: Mapping[str, str] = MappingProxyType({})) -> Ended:
    """`python scripts/NAME.py ARGUMENTS` from the repository's root, without standard input."""
    argv = [str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        code = _ask(folder, dict(environment), argv)
        out, err, loaded = ((Path(folder) / part).read_text() for part in ("out", "err", "loaded"))
    return Ended(returncode=code, stdout=out, stderr=err, loaded=tuple(loaded.split()))


@contextmanager
def script_at_work(
    name: str, *arguments: object, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[subprocess.Popen[str]]:
    """As `run_script`, in a process that is anew, to be asked and signalled meanwhile; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, f"scripts/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignored, and nohup one of them.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(is_true: Callable[[], bool], process: subprocess.Popen[str] | None = None, most_s: float = 300.0) -> None:
    end = time.monotonic() + most_s
    while not is_true():
        assert time.monotonic() < end, "it has not come to that"
        if process is not None:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _ask(folder: str, environment: dict[str, str], argv: list[str]) -> int:
    process = _server()
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps([folder, environment, argv]) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.scripts"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


def _serve() -> None:
    import optuna.storages  # noqa: F401

    import trainer.prepare
    import trainer.reports.comparison_page
    import trainer.reports.run_report
    import trainer.sweeps.sweep  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        folder, environment, argv = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment)
            os._exit(_run(Path(folder), argv))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(folder: Path, argv: list[str]) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    code: object = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    (folder / "loaded").write_text(" ".join(name for name in HEAVY if name in sys.modules))
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


if __name__ == "__main__":
    _serve()
