"""One grading: a fresh process of the worker gives up all rights, then runs the user's source.

*Covered*, in this order: a mount namespace with an empty scratch folder of limited size, resource limits, another user
(where the trainer is root), no capabilities, no new privileges, landlock, the system-call filter. Nothing of it can be
taken back. *Not covered*: what the user's own source does to its own grading.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import traceback
import types
from typing import Any, NoReturn

from graders.sandbox import kernel, landlock, seccomp
from graders.sandbox.namespaces import NOBODY_INSIDE, SCRATCH, die_with_parent
from graders.sandbox.protocol import (
    FAILED,
    MARK_BYTES,
    MAX_RESULT_BYTES,
    READY,
    SOURCE_NAME,
    Limits,
    WorkerSettings,
    read_frame,
    write_all,
)
from graders.sandbox.scores import score_of

RESULT_FD = 3
_MAX_ERROR_CHARS = 2_000
_MAX_FRAMES = 8


def run(
    settings: WorkerSettings, code: types.CodeType | None, *, scratch: bool, in_fd: int, result_fd: int, output_fd: int
) -> NoReturn:
    """In the new process: never returns. Without `code` it only tries whether all can be given up.

    The frame with the payload is read here and not in the worker, whose memory all later gradings are born with. What
    is written to `result_fd`: FAILED and why where the rights could not be given up, else READY, a mark, and once more
    the mark and the result.
    """
    try:
        parent = os.getppid()
        payload = b"" if code is None else read_frame(in_fd)
        _keep_only(result_fd, output_fd)
        try:
            confine(settings, parent, scratch=scratch)
            if code is None:
                _try_reading(settings)
        except OSError as e:
            write_all(RESULT_FD, FAILED + str(e).encode())
        else:
            mark = os.urandom(MARK_BYTES)
            write_all(RESULT_FD, READY + mark)
            if code is not None and payload is not None:
                write_all(RESULT_FD, mark + result_of(code, payload))
    finally:
        os._exit(0)


def confine(settings: WorkerSettings, parent: int, *, scratch: bool) -> None:
    limits = Limits(**settings.limits)
    isolated = settings.isolation != "none"
    if scratch:
        _mount_scratch(limits, settings.nobody)
    elif isolated:
        os.chdir("/")
    _set_limits(limits, scratch=scratch, isolated=isolated)
    if not isolated:
        os.setsid()
        die_with_parent(parent)
        return
    if settings.nobody:
        os.setresgid(NOBODY_INSIDE, NOBODY_INSIDE, NOBODY_INSIDE)
        os.setresuid(NOBODY_INSIDE, NOBODY_INSIDE, NOBODY_INSIDE)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    die_with_parent(parent)
    if landlock.abi():
        landlock.restrict(readable=readable(settings), writable=[SCRATCH] if scratch else [])
    program = seccomp.of_grading(
        threads=settings.threads, scratch=scratch, truncation=truncation_is_ruled(settings), pid=os.getpid()
    )
    seccomp.install(program)


def readable(settings: WorkerSettings) -> list[str]:
    """Everything that may be read, at the paths where it is seen."""
    place = 1 if settings.isolation != "landlock" else 0
    return [bind[place] for bind in settings.binds] + settings.devices


def truncation_is_ruled(settings: WorkerSettings) -> bool:
    """Whether mounts or landlock keep files from being cut short; else the system-call filter must."""
    return settings.isolation != "landlock" or landlock.rules_truncation()


def result_of(code: types.CodeType, payload: bytes) -> bytes:
    """The score, or what went wrong, as JSON."""
    try:
        module = types.ModuleType("grader")
        # `dataclass` and `typing` look their class's module up.
        sys.modules["grader"] = module
        arguments = json.loads(payload)
        exec(code, module.__dict__)
        result: dict[str, Any] = {
            "score": score_of(module.__dict__["grade"](arguments["sample"], arguments["item"]), "grade")
        }
    except BaseException as e:  # SystemExit and KeyboardInterrupt are the user's too
        result = {"error": _explain(e)}
    for stream in (sys.stdout, sys.stderr):
        # The source may have closed or replaced it.
        with contextlib.suppress(Exception):
            stream.flush()
    return json.dumps(result).encode()[:MAX_RESULT_BYTES]


def _explain(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != SOURCE_NAME:
        frames = frames.tb_next
    try:
        lines = traceback.format_exception(type(error), error, frames, limit=-_MAX_FRAMES)
        return "".join(lines)[-_MAX_ERROR_CHARS:].strip()
    except BaseException:  # the error's own text may raise, or be larger than the memory left
        return type(error).__name__


def _keep_only(result_fd: int, output_fd: int) -> None:
    null_fd = os.open("/dev/null", os.O_RDONLY)
    for fd, place in ((null_fd, 0), (output_fd, 1), (output_fd, 2), (result_fd, RESULT_FD)):
        os.dup2(fd, place)
    os.closerange(RESULT_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _mount_scratch(limits: Limits, nobody: bool) -> None:
    owner = NOBODY_INSIDE if nobody else 0
    kernel.unshare(kernel.CLONE_NEWNS)
    data = f"mode=700,size={limits.scratch_bytes},nr_inodes={limits.scratch_inodes}"
    if nobody:
        data += f",uid={owner},gid={owner}"
    kernel.mount("tmpfs", SCRATCH, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, data)
    os.chdir(SCRATCH)


def _set_limits(limits: Limits, *, scratch: bool, isolated: bool) -> None:
    amounts = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.scratch_bytes if scratch or not isolated else 0,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        # Counted by user, the trainer's own where there is no user namespace.
        resource.RLIMIT_SIGPENDING: limits.threads,
    }
    if isolated:
        # Without a user namespace it would count all of the user's processes; then no threads are allowed at all.
        amounts[resource.RLIMIT_NPROC] = limits.threads
    for kind, amount in amounts.items():
        resource.setrlimit(kind, (amount, amount))
    # The soft limit's SIGXCPU can be ignored, the hard one's SIGKILL can't.
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 1))


def _try_reading(settings: WorkerSettings) -> None:
    if settings.isolation != "none":
        for path in readable(settings):
            os.close(os.open(path, os.O_RDONLY))
