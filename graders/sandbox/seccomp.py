"""The system-call filters of gradings and workers: a list of what may be called, written as classic BPF by hand.

*Covered*: everything outside `syscalls` fails with EPERM, under the processor's native numbers only (a 32-bit or x32
call ends the process). A grading makes threads, not processes; its signals reach the own process only, also those that
a file descriptor would send (`F_SETOWN`, `F_SETSIG`). No program is started and no socket made, by a worker neither.
Locks of files are granted and never made. *Not covered*: pointers can't be followed, so paths and addresses are for the
namespaces and landlock.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from graders.sandbox import kernel, syscalls

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SET_MODE_FILTER = 1
_KILL = 0x80000000
_ALLOW = 0x7FFF0000
_GRANT = 0x00050000  # the call returns 0 and is not made
_EPERM = _GRANT | 1
_ENOSYS = _GRANT | 38
_X32_BIT = 0x40000000
_LOAD = 0x20
_AND = 0x54
_JUMP_IF_EQUAL = 0x15
_JUMP_IF_AT_LEAST = 0x35
_RETURN = 0x06
_NUMBER_AT = 0
_ARCHITECTURE_AT = 4
_ARGUMENTS_AT = 16
# A thread shares its creator's namespaces: with any of the flags of new ones, `clone` is refused. It shares the table
# of open files too, or each thread might open as many as the limit says, with buffers that nothing counts.
_THREAD = 0x00010000 | 0x00000400
_NEW = 0x7E020000 | 0x80

# SOCK_STREAM with any of its flags: a datagram socket could name another address.
_STREAMS = (1, 1 | 0x80000, 1 | 0x800, 1 | 0x80800)
_UNIX = 1

_FIRST_ARGUMENT = 0
_SECOND_ARGUMENT = 1
_THIRD_ARGUMENT = 2
_FOURTH_ARGUMENT = 3
_FLAGS_OF_OPEN = {"open": _SECOND_ARGUMENT, "openat": _THIRD_ARGUMENT}
_FORBIDDEN_FLAGS = {
    # MAP_HUGETLB: pages that the machine set aside for somebody else.
    "mmap": (_FOURTH_ARGUMENT, 0x40000),
    # MSG_OOB: no program needs it, and its code has let sandboxes be left.
    "sendto": (_FOURTH_ARGUMENT, 1),
    "recvfrom": (_FOURTH_ARGUMENT, 1),
    # CLOSE_RANGE_UNSHARE: a thread's own table of open files.
    "close_range": (_THIRD_ARGUMENT, 2),
}
# Of O_TMPFILE, the bit that is not O_DIRECTORY's.
_UNNAMED_FILE = 0o20000000
# Is it a terminal, how large, how much to read, close on exec, non-blocking; not TIOCSTI, not FIOSETOWN.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421)
# Duplicates, flags, whether there is a lock; not F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ.
_FCNTLS = (0, 1, 2, 3, 4, 5, 36, 1030, 1032)
# F_SETLK and F_SETLKW, the process's and the open file's.
_LOCKS = (6, 7, 37, 38)
# Names of the thread and of memory.
_PRCTLS = (15, 16, 0x53564D41)
# A grading becomes one by these.
_PRCTLS_OF_WORKER = (*_PRCTLS, kernel.PR_SET_PDEATHSIG, kernel.PR_SET_DUMPABLE, kernel.PR_SET_NO_NEW_PRIVS)


def of_grading(*, threads: bool, scratch: bool, truncation: bool, pid: int) -> bytes:
    """The filter of the process `pid`, as `struct sock_filter`s. Without `truncation` no file is cut short by opening
    it: to be given up where nothing else rules that."""
    checks = {
        **_checks(scratch=scratch, truncation=truncation),
        "prctl": _check_argument(_FIRST_ARGUMENT, _PRCTLS),
        "kill": _check_argument(_FIRST_ARGUMENT, (pid,)),
        "tgkill": _check_argument(_FIRST_ARGUMENT, (pid,)),
    }
    if threads:
        flags = _op(_LOAD, _ARGUMENTS_AT), _op(_AND, _THREAD | _NEW)
        checks["clone"] = [*flags, *_allow_if((_THREAD,))]
    return _filter({**syscalls.ALWAYS, **(syscalls.WITH_SCRATCH if scratch else {})}, checks)


def of_worker(*, scratch: bool, truncation: bool) -> bytes:
    """The filter of a worker, and of its gradings until they install their own: what these may call, and what it takes
    to make them. It holds what the packages do while they are imported."""
    checks = {
        **_checks(scratch=scratch, truncation=truncation),
        "prctl": _check_argument(_FIRST_ARGUMENT, _PRCTLS_OF_WORKER),
        "kill": [_op(_RETURN, _ALLOW)],
        "tgkill": _check_argument(_FIRST_ARGUMENT, (os.getpid(),)),
        "clone": [_op(_LOAD, _ARGUMENTS_AT), _op(_AND, _NEW), *_allow_if((0,))],
        "unshare": _check_argument(_FIRST_ARGUMENT, (kernel.CLONE_NEWNS,)),
    }
    allowed = {**syscalls.ALWAYS, **syscalls.WORKER, **(syscalls.WITH_SCRATCH if scratch else {})}
    return _filter(allowed, checks)


def _checks(*, scratch: bool, truncation: bool) -> dict[str, list[bytes]]:
    """What decides over a call by one of its arguments, for gradings and workers alike."""
    forbidden = (0 if scratch else _UNNAMED_FILE) | (0 if truncation else os.O_TRUNC)
    granted = [op for value in _LOCKS for op in (_op(_JUMP_IF_EQUAL, value, 0, 1), _op(_RETURN, _GRANT))]
    return {
        **{name: _check_flags(argument, forbidden) for name, argument in _FLAGS_OF_OPEN.items()},
        **{name: _check_flags(argument, flags) for name, (argument, flags) in _FORBIDDEN_FLAGS.items()},
        "ioctl": _check_argument(_SECOND_ARGUMENT, _IOCTLS),
        "fcntl": [_load(_SECOND_ARGUMENT), *granted, *_allow_if(_FCNTLS)],
        "prlimit64": _check_argument(_FIRST_ARGUMENT, (0,)),
        "socketpair": [
            _load(_FIRST_ARGUMENT),
            *_unless_equal_return(_UNIX, _EPERM),
            *_check_argument(_SECOND_ARGUMENT, _STREAMS),
        ],
    }


def _filter(allowed: syscalls.Numbers, checks: dict[str, list[bytes]]) -> bytes:
    architecture = kernel.MACHINES.index(kernel.MACHINE)
    code = [
        _op(_LOAD, _ARCHITECTURE_AT),
        *_unless_equal_return(_ARCHITECTURES[kernel.MACHINE], _KILL),
        _op(_LOAD, _NUMBER_AT),
    ]
    if kernel.MACHINE == "x86_64":
        code += [_op(_JUMP_IF_AT_LEAST, _X32_BIT, 0, 1), _op(_RETURN, _KILL)]
    for table, answer in ((allowed, _ALLOW), (syscalls.GRANTED, _GRANT), (syscalls.ABSENT, _ENOSYS)):
        for numbers in table.values():
            code += _if_equal(numbers[architecture], [_op(_RETURN, answer)])
    for name, check in checks.items():
        code += _if_equal(syscalls.BY_ARGUMENT[name][architecture], check)
    code.append(_op(_RETURN, _EPERM))
    return b"".join(code)


def install(code: bytes) -> None:
    """On this thread and all that it starts, for ever. Needs `no_new_privs`."""
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count, padding, a pointer.
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    kernel.syscall("seccomp", _SET_MODE_FILTER, 0, header)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _if_equal(number: int | None, then: list[bytes]) -> list[bytes]:
    """`then` must return: the accumulator no longer holds the number after it."""
    return [] if number is None else [_op(_JUMP_IF_EQUAL, number, 0, len(then)), *then]


def _unless_equal_return(value: int, action: int) -> list[bytes]:
    return [_op(_JUMP_IF_EQUAL, value, 1, 0), _op(_RETURN, action)]


def _load(argument: int) -> bytes:
    """The kernel reads these arguments as 32 bits too: their lower half decides (both machines are little-endian)."""
    return _op(_LOAD, _ARGUMENTS_AT + 8 * argument)


def _check_argument(argument: int, values: Iterable[int]) -> list[bytes]:
    return [_load(argument), *_allow_if(values)]


def _check_flags(argument: int, forbidden: int) -> list[bytes]:
    return [_load(argument), _op(_AND, forbidden), *_allow_if((0,))]


def _allow_if(values: Iterable[int]) -> list[bytes]:
    allowed = [op for value in values for op in (_op(_JUMP_IF_EQUAL, value, 0, 1), _op(_RETURN, _ALLOW))]
    return [*allowed, _op(_RETURN, _EPERM)]
