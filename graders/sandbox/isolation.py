"""Which walls this machine can put up, and how a worker is started behind them.

Each way is tried for real: a worker starts, gives up its rights in a process of its own, and says whether that worked.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path

from envs.errors import UserError
from graders.sandbox.kernel import MACHINES
from graders.sandbox.protocol import HEADER, Limits, WorkerSettings, frame

Imports = Sequence[tuple[str, Sequence[str]]]
"""Modules that a source surely imports, each with the names that it takes from it."""


class Isolation(StrEnum):
    """From the strongest to none."""

    NAMESPACES = "namespaces"
    """The worker enters new namespaces by itself; gradings add seccomp, landlock, limits and a scratch folder."""
    BUBBLEWRAP = "bubblewrap"
    """The same, but `bwrap` makes the namespaces: it may be allowed to where others are not."""
    LANDLOCK = "landlock"
    """No namespaces: landlock, seccomp and limits alone. No scratch folder, no threads."""
    NONE = "none"
    """A process of its own with limits of memory, CPU and wall time."""


# The worker is told its own source, so that nothing of the repository needs to be visible to it.
_PACKAGE = "graders.sandbox"
_MODULES = (
    *("protocol", "kernel", "landlock", "syscalls"),
    *("seccomp", "namespaces", "scores", "grading", "worker"),
)
_BOOT = """
import json, os, sys, types
def read(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            os._exit(0)
        data += part
    return data
boot = json.loads(read(int.from_bytes(read(4), "big")))
for name, source in boot["modules"]:
    module = types.ModuleType(name)
    module.__path__ = []
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    exec(compile(source, name, "exec"), module.__dict__)
sys.modules["graders.sandbox.worker"].main(boot["settings"])
"""
_FLAGS = ("-s", "-S", "-P", "-B")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_LIBRARY_FOLDERS = ("/lib", "/lib32", "/lib64", "/libx32")
_LOADER_CACHE = "/etc/ld.so.cache"
# Processes are counted by user within a user namespace since then; before, over the whole machine.
_COUNTS_IN_NAMESPACE = (5, 14)
_CORES = 2


def choose(*, or_none: bool = False) -> Isolation:
    """The strongest that works; NONE only where no other does and `or_none`. Raises `UserError` where none does."""
    faults: list[str] = []
    for isolation in (*_order(), *([Isolation.NONE] if or_none else [])):
        if (fault := try_out(isolation)) is None:
            return isolation
        faults.append(f"{isolation}: {fault}")
    raise UserError(
        "the python grader: this machine offers no way to isolate its source ("
        + "; ".join(faults)
        + "). Allow user namespaces, install bubblewrap, use a kernel with landlock (5.13), or set "
        "`isolation: none` on the grader to run the source unprotected, if you trust it"
    )


@functools.cache
def try_out(isolation: Isolation) -> str | None:
    """Why this way does not work here; None where it does."""
    if sys.platform != "linux":
        return "needs Linux"
    if isolation is not Isolation.NONE and platform.machine() not in MACHINES:
        return f"needs one of the processors {', '.join(MACHINES)}"
    if isolation is Isolation.BUBBLEWRAP and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if isolation is Isolation.LANDLOCK and not _has_landlock():
        return "the kernel has no landlock, or it is turned off"
    start = boot_frame(isolation, "def grade(sample, item): return 0", [], Limits())
    try:
        return _first_answer(isolation, start)
    except OSError as e:
        return str(e)


def _first_answer(isolation: Isolation, start: bytes) -> str | None:
    """Start a worker, hear what keeps it from working, and end it."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command(isolation),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(isolation),
            cwd="/",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(Limits().start_s, process.kill)
        timer.start()
        try:
            process.stdin.write(start)
            process.stdin.flush()
            # The end of its input would end the worker: it is closed after the answer.
            header = process.stdout.read(HEADER.size)
            answer = process.stdout.read(HEADER.unpack(header)[0]) if len(header) == HEADER.size else b""
        finally:
            timer.cancel()
        if answer:
            fault: str | None = json.loads(answer)["fault"]
            return fault
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "the worker ended before it answered"


def boot_frame(isolation: Isolation, source: str, imports: Imports, limits: Limits) -> bytes:
    """What a worker is told first: its own program and its settings."""
    modules = [["graders", ""], [_PACKAGE, ""]]
    modules += [[f"{_PACKAGE}.{name}", _program_of(name)] for name in _MODULES]
    binds, links = _visible()
    settings = WorkerSettings(
        isolation=isolation,
        source=source,
        imports=[(name, list(attributes)) for name, attributes in imports],
        sys_path=import_paths(),
        binds=binds,
        links=links,
        devices=[device for device in _DEVICES if Path(device).exists()],
        nobody=isolation is Isolation.NAMESPACES and os.geteuid() == 0,
        threads=_allows_threads(isolation),
        parent=os.getpid(),
        limits=asdict(limits),
    )
    return frame(json.dumps({"modules": modules, "settings": asdict(settings)}).encode())


def _program_of(module: str) -> str:
    return (Path(__file__).parent / f"{module}.py").read_text()


def command(isolation: Isolation) -> list[str]:
    """The program that becomes a worker. It reads its boot frame from standard input."""
    # The virtual environment's own python is a link that would not be there; its packages come by sys.path.
    python = [getattr(sys, "_base_executable", sys.executable), *_FLAGS, "-c", _BOOT]
    if isolation is not Isolation.BUBBLEWRAP:
        return python
    binds, links = _visible()
    out = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-user",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
    ]
    out += ["--unshare-cgroup-try", "--die-with-parent", "--as-pid-1", "--new-session", "--cap-add", "CAP_SYS_ADMIN"]
    for source, target in binds:
        out += ["--ro-bind", source, target]
    for device in _DEVICES:
        out += ["--dev-bind-try", device, device]
    for points_to, link in links:
        out += ["--symlink", points_to, link]
    return [*out, "--dir", "/scratch", "--remount-ro", "/", "--chdir", "/", "--", *python]


def environment(isolation: Isolation) -> dict[str, str]:
    """All variables of a worker: none is the trainer's but the one that Python may need to find its libraries."""
    cores = str(_CORES if _allows_threads(isolation) else 1)
    numbers = dict.fromkeys(
        ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), cores
    )
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    # The same source gives the same score in every worker; each memory arena would take 64 MB of address space.
    fixed = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    scratch = {} if isolation is Isolation.NONE else {"HOME": "/scratch", "TMPDIR": "/scratch"}
    return {**kept, **fixed, **scratch, **numbers}


def _order() -> tuple[Isolation, ...]:
    """Root can make gradings another user in its own namespaces; an ordinary user may be forbidden them, bwrap not."""
    namespaced = (Isolation.NAMESPACES, Isolation.BUBBLEWRAP)
    return (*(namespaced if os.geteuid() == 0 else reversed(namespaced)), Isolation.LANDLOCK)


def _allows_threads(isolation: Isolation) -> bool:
    """Whether the number of a grading's threads can be limited: else it has one."""
    if isolation is Isolation.NONE:
        return True
    major, minor = (int(part) for part in platform.release().split("-")[0].split(".")[:2])
    is_counted = isolation is Isolation.NAMESPACES or (isolation is Isolation.BUBBLEWRAP and os.geteuid() != 0)
    return is_counted and (major, minor) >= _COUNTS_IN_NAMESPACE


def _has_landlock() -> bool:
    from graders.sandbox import landlock

    return landlock.abi() > 0


def import_paths() -> list[str]:
    """The standard library and the installed packages, `.pth` files (editable installs) left out."""
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"])
    zipped = library.parent / f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    folders = [str(zipped), str(library), str(library / "lib-dynload"), paths["purelib"], paths["platlib"]]
    return list(dict.fromkeys(folders))


def _visible() -> tuple[list[list[str]], list[list[str]]]:
    """What gradings may read (where it is, where they see it), and the links beside it."""
    binds: list[list[str]] = []
    links: list[list[str]] = []
    wanted = ["/usr", sys.base_prefix, sys.base_exec_prefix, *import_paths()[1:]]
    for path in sorted({str(Path(path).absolute()) for path in wanted}, key=len):
        # A Python whose prefix is the root itself is found by its library.
        if path == "/":
            continue
        if Path(path).exists() and not any(Path(path).is_relative_to(target) for _, target in binds):
            binds.append([os.path.realpath(path), path])
    for path in _LIBRARY_FOLDERS:
        if Path(path).is_symlink():
            links.append([str(Path(path).readlink()), path])
        elif Path(path).is_dir():
            binds.append([path, path])
    if Path(_LOADER_CACHE).is_file():
        binds.append([_LOADER_CACHE, _LOADER_CACHE])
    return binds, links
