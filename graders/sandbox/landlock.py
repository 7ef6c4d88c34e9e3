"""Landlock: which files a process may read and write, by the kernel's own rule set.

*Covered*, by ABI (what the kernel is too old for is left out): 1 reading, writing, making and removing files; 2 links
and renames across folders; 3 cutting files short; 4 binding and connecting TCP; 5 device ioctls; 6 abstract sockets and
signals to processes outside. Nothing may be executed anywhere. *Not covered*: `stat`, `chdir`, `chmod`, times and
locks of files outside, and whatever the kernel's ABI is too old for; seccomp and the mount namespace answer for those.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

from graders.sandbox import kernel

_VERSION_FLAG = 1
_PATH_BENEATH = 1
_READ = 1 << 2 | 1 << 3  # files, folders
_READ_FILE = 1 << 2
_WRITE_FILE = 1 << 1
_TRUNCATION_SINCE = 3
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, _TRUNCATION_SINCE: 1 << 14, 5: 1 << 15}
_NET_RIGHTS = 3  # bind, connect
_SCOPES = 3  # abstract unix sockets, signals
# Folders only; files take read, write and truncate.
_MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 14)) & ~(1 << 6 | 1 << 11)  # no devices
_TRUNCATE = 1 << 14


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """The kernel's version of landlock; 0 where it has none or it is turned off."""
    try:
        return kernel.syscall("landlock_create_ruleset", None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def rules_truncation() -> bool:
    """Whether the kernel's landlock knows that a file may be cut short: by opening it to read, among other ways."""
    return abi() >= _TRUNCATION_SINCE


def restrict(*, readable: Iterable[str], writable: Iterable[str]) -> None:
    """From now on this process reads below `readable` and `writable`, and writes below `writable` alone."""
    version = abi()
    handled = sum(bits for since, bits in _FILE_RIGHTS.items() if since <= version)
    rights = (ctypes.c_uint64 * 3)(handled, _NET_RIGHTS if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = kernel.syscall("landlock_create_ruleset", rights, size, 0)
    try:
        for path in readable:
            _allow(ruleset, path, _READ)
        for path in writable:
            _allow(ruleset, path, (_READ | _WRITE_FILE | _MAKE_AND_REMOVE | _TRUNCATE) & handled)
        kernel.syscall("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISCHR(mode):
            rights = _READ_FILE | _WRITE_FILE  # /dev/null takes what is written to it
        elif not stat.S_ISDIR(mode):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = _PathRule(rights, fd)
        kernel.syscall("landlock_add_rule", ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(fd)
