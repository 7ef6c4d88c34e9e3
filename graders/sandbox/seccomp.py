"""The system-call filter of a grading: a list of what may be called, written as classic BPF by hand.

*Covered*: everything outside `syscalls` fails with EPERM, under the processor's native numbers only (a 32-bit or x32
call ends the process). Threads may be made, processes not; signals reach the own process only, also those that a file
descriptor would send (`F_SETOWN`, `F_SETSIG`). *Not covered*: pointers can't be followed, so paths and addresses are
for the namespaces and landlock.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable

from graders.sandbox import kernel, syscalls

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SET_MODE_FILTER = 1
_KILL = 0x80000000
_ALLOW = 0x7FFF0000
_EPERM = 0x00050000 | 1
_ENOSYS = 0x00050000 | 38
_X32_BIT = 0x40000000
_LOAD = 0x20
_AND = 0x54
_JUMP_IF_EQUAL = 0x15
_JUMP_IF_AT_LEAST = 0x35
_RETURN = 0x06
_NUMBER_AT = 0
_ARCHITECTURE_AT = 4
_ARGUMENTS_AT = 16
# A thread shares its creator's namespaces: with any of the flags of new ones, `clone` is refused.
_THREAD = 0x00010000
_THREAD_OR_NEW = _THREAD | 0x7E020000 | 0x80

# SOCK_STREAM with any of its flags: a datagram socket could name another address.
_STREAMS = (1, 1 | 0x80000, 1 | 0x800, 1 | 0x80800)
_UNIX = 1

_FIRST_ARGUMENT = 0
_SECOND_ARGUMENT = 1
_ALLOWED_VALUES: dict[str, tuple[int, tuple[int, ...]]] = {
    # Is it a terminal, how large, how much to read, close on exec, non-blocking; not TIOCSTI, not FIOSETOWN.
    "ioctl": (_SECOND_ARGUMENT, (0x5401, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421)),
    # Duplicates, flags, locks; not F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ.
    "fcntl": (_SECOND_ARGUMENT, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),
    # Names of the thread and of memory.
    "prctl": (_FIRST_ARGUMENT, (15, 16, 0x53564D41)),
    "prlimit64": (_FIRST_ARGUMENT, (0,)),
}


def program(*, threads: bool, scratch: bool, pid: int) -> bytes:
    """The filter of the process `pid`, as `struct sock_filter`s."""
    architecture = kernel.MACHINES.index(kernel.MACHINE)
    plain = {**syscalls.ALWAYS, **(syscalls.WITH_SCRATCH if scratch else {})}
    own = {"kill": (_FIRST_ARGUMENT, (pid,)), "tgkill": (_FIRST_ARGUMENT, (pid,))}
    code = [
        _op(_LOAD, _ARCHITECTURE_AT),
        *_unless_equal_return(_ARCHITECTURES[kernel.MACHINE], _KILL),
        _op(_LOAD, _NUMBER_AT),
    ]
    if kernel.MACHINE == "x86_64":
        code += [_op(_JUMP_IF_AT_LEAST, _X32_BIT, 0, 1), _op(_RETURN, _KILL)]
    for numbers in plain.values():
        code += _if_equal(numbers[architecture], [_op(_RETURN, _ALLOW)])
    for numbers in syscalls.ABSENT.values():
        code += _if_equal(numbers[architecture], [_op(_RETURN, _ENOSYS)])
    for name, (argument, values) in {**_ALLOWED_VALUES, **own}.items():
        code += _if_equal(syscalls.BY_ARGUMENT[name][architecture], _check_argument(argument, values))
    pair = [_op(_LOAD, _ARGUMENTS_AT), *_unless_equal_return(_UNIX, _EPERM), *_check_argument(1, _STREAMS)]
    code += _if_equal(syscalls.BY_ARGUMENT["socketpair"][architecture], pair)
    if threads:
        masked = [_op(_LOAD, _ARGUMENTS_AT), _op(_AND, _THREAD_OR_NEW), *_allow_if((_THREAD,))]
        code += _if_equal(syscalls.BY_ARGUMENT["clone"][architecture], masked)
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


def _check_argument(argument: int, values: Iterable[int]) -> list[bytes]:
    """The kernel reads these arguments as 32 bits too: their lower half decides (both machines are little-endian)."""
    return [_op(_LOAD, _ARGUMENTS_AT + 8 * argument), *_allow_if(values)]


def _allow_if(values: Iterable[int]) -> list[bytes]:
    allowed = [op for value in values for op in (_op(_JUMP_IF_EQUAL, value, 0, 1), _op(_RETURN, _ALLOW))]
    return [*allowed, _op(_RETURN, _EPERM)]
