"""New namespaces and a root of its own for a worker, without any program's help: what bubblewrap does.

*Covered*: users, mounts, processes, network (not even a loopback that is up), IPC, host name, cgroups. The root is an
empty read-only tmpfs in which only what `WorkerSettings` names appears, read-only, at its own path; there is no /proc
and no /sys. *Not covered*: kernels before 5.12 (`mount_setattr`); where user namespaces are forbidden, `unshare` says
so.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NoReturn

from graders.sandbox import kernel
from graders.sandbox.protocol import WorkerSettings

SCRATCH = "/scratch"
NOBODY = 65534
NOBODY_INSIDE = 1
"""What `NOBODY` is called inside."""
_FLAGS = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWCGROUP
)
# Any folder that is always there: the new root is mounted over it for a moment.
_BASE = "/dev"
_OLD_ROOT = "/old-root"


def die_with_parent(parent: int | None) -> None:
    """SIGKILL when the thread that started this process ends. To be said again after each change of user."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def enter(settings: WorkerSettings) -> None:
    """Return in a new process, the first one of new namespaces; this process waits for it and ends as it does."""
    user, group = os.getuid(), os.getgid()
    mapper = _start_mapper() if settings.nobody else None
    if settings.nobody:
        os.setgroups([])
    kernel.unshare(_FLAGS)
    if mapper is not None:
        _finish_mapper(*mapper)
    else:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    die_with_parent(settings.parent)
    worker = os.fork()
    if worker:
        _end_as(worker)
    # The parent stands outside of the process namespace, so it can't be asked for; the pipe's end covers the gap.
    die_with_parent(None)
    _build_root(settings)


def _start_mapper() -> tuple[int, int]:
    """A process that stays outside: only from there can two users be mapped, root and nobody."""
    read_end, write_end = os.pipe()
    parent = os.getpid()
    mapper = os.fork()
    if mapper:
        os.close(read_end)
        return mapper, write_end
    code = 1
    try:
        os.close(write_end)
        if os.read(read_end, 1):
            for kind in ("uid_map", "gid_map"):
                Path(f"/proc/{parent}/{kind}").write_text(f"0 0 1\n{NOBODY_INSIDE} {NOBODY} 1\n")
            code = 0
    finally:
        os._exit(code)


def _finish_mapper(mapper: int, write_end: int) -> None:
    os.write(write_end, b"x")
    os.close(write_end)
    _, status = os.waitpid(mapper, 0)
    if status:
        raise OSError(1, "the users of the new namespace could not be mapped")


def _end_as(worker: int) -> NoReturn:
    for fd in (0, 1):
        os.close(fd)
    _, status = os.waitpid(worker, 0)
    os._exit(abs(os.waitstatus_to_exitcode(status)))


def _build_root(settings: WorkerSettings) -> None:
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", _BASE, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m,nr_inodes=4096")
    Path(_BASE + _OLD_ROOT).mkdir()
    kernel.pivot_root(_BASE, _BASE + _OLD_ROOT)
    os.chdir("/")
    for source, target in settings.binds:
        _bind(_OLD_ROOT + source, target, devices=False)
    for device in settings.devices:
        _bind(_OLD_ROOT + device, device, devices=True)
    for points_to, link in settings.links:
        Path(link).symlink_to(points_to)
    Path(SCRATCH).mkdir()
    kernel.unmount(_OLD_ROOT)
    Path(_OLD_ROOT).rmdir()
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("", "/", "", flags)


def _bind(source: str, target: str, *, devices: bool) -> None:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    if Path(source).is_dir():
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    kernel.mount(source, target, "", kernel.MS_BIND | kernel.MS_REC)
    kernel.make_read_only(target, devices=devices)
