"""The kernel's calls that Python does not have, through ctypes. Numbers of x86_64 and of the generic table (aarch64).

*Covered*: every failure is an `OSError` with the kernel's errno, ENOSYS where the kernel is too old for a call.
*Not covered*: other processors.
"""

from __future__ import annotations

import ctypes
import os
import platform

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63

MACHINES = ("x86_64", "aarch64")
MACHINE = platform.machine()
_NUMBERS = {
    "pivot_root": (155, 41),
    "capset": (126, 91),
    "seccomp": (317, 277),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}

# The process's own symbols hold libc; no search for a file, which would start a compiler.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def syscall(name: str, *arguments: object) -> int:
    """A call by the name in `_NUMBERS`. Integers are passed as longs, everything else as ctypes does."""
    if MACHINE not in MACHINES:
        raise OSError(38, f"{name}: the system calls of {MACHINE} are not known here")
    number = _NUMBERS[name][MACHINES.index(MACHINE)]
    passed = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    return _checked(name, _libc.syscall(ctypes.c_long(number), *passed))


def prctl(option: int, *values: int) -> int:
    padded = (*values, 0, 0, 0, 0)[:4]
    return _checked("prctl", _libc.prctl(option, *map(ctypes.c_ulong, padded)))


def unshare(flags: int) -> None:
    _checked("unshare", _libc.unshare(flags))


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = [os.fsencode(text) if text else None for text in (source, target, kind)]
    _checked(f"mount {target}", _libc.mount(*texts, ctypes.c_ulong(flags), os.fsencode(data) if data else None))


def unmount(target: str) -> None:
    """Lazily: what is open there stays until it is closed."""
    _checked(f"umount {target}", _libc.umount2(os.fsencode(target), MNT_DETACH))


def pivot_root(new: str, old: str) -> None:
    syscall("pivot_root", os.fsencode(new), os.fsencode(old))


def make_read_only(target: str, *, devices: bool = False) -> None:
    """A mount and all below it: read-only, no set-uid programs, no device nodes unless `devices`."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | (0 if devices else MS_NODEV), 0, 0, 0)
    size = ctypes.sizeof(attributes)
    syscall("mount_setattr", _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, attributes, size)


def drop_capabilities() -> None:
    """All of this process's own; the ambient ones go with the permitted."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    syscall("capset", header, (ctypes.c_uint32 * 6)())


def bar_capabilities() -> None:
    """No program that this process or a child of it starts can get one back. Its present ones stay."""
    for capability in range(_LAST_CAPABILITY + 1):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            return  # past the last one that this kernel knows, or there is none to drop


def _checked(what: str, result: int) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
