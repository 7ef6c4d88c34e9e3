"""More attempts, at what lies below Python: single system calls and their flags, descriptors, memory that is not counted.

A call "reaches the kernel" if it fails otherwise than by the filter: arguments that make no sense are enough.
"""

# ruff: noqa: E501 (a table)

from __future__ import annotations

from tests.support.sandbox_attempts import Attempt

_REACHES = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def attempt(it):
    reached = []
    for call in (CALLS):
        ctypes.set_errno(0)
        if libc.syscall(*map(ctypes.c_long, call)) != -1 or ctypes.get_errno() not in (1, 38):
            reached.append(call)
    return float(bool(reached))
"""
_SECCOMP = "seccomp"


def _numbers(*calls: str) -> str:
    """x86_64's, each with its arguments."""
    return _REACHES.replace("CALLS", " ".join(f"({call},)," for call in calls))


DEEP_ATTEMPTS = [
    Attempt(
        name="32-bit system calls from machine code of its own", contained_by="seccomp (ends the process)", says="SIGSYS|no such machine",
        code="import ctypes, mmap, platform\ndef attempt(it):\n if platform.machine() != 'x86_64': raise OSError('no such machine')\n"
        " m = mmap.mmap(-1, 4096, prot=7)\n m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"
        " return float(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() > 0)",
    ),
    Attempt(
        name="threads with tables of open files of their own", contained_by="seccomp (no CLOSE_RANGE_UNSHARE; threads share all)",
        code="import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef attempt(it):\n"
        " if libc.syscall(436, 1000, 1001, 2) != -1: return 1.0\n"
        " # A thread without CLONE_FILES, and without what makes a thread at all: the kernel would say EINVAL.\n"
        " libc.syscall(it['clone'], 0x10000, 0, 0, 0, 0)\n return float(ctypes.get_errno() == 22)",
    ),
    Attempt(
        name="memory in the buffers of socket pairs", contained_by="limit of open files; seccomp (no `setsockopt`)",
        code="import socket\ndef attempt(it):\n held, sent = [], 0\n while True:\n  try: a, b = socket.socketpair()\n  except OSError: break\n"
        "  held.append((a, b))\n  for s in (a, b):\n   s.setblocking(False)\n   try:\n    while True: sent += s.send(b'x' * 65536)\n"
        "   except OSError: pass\n return float(sent > 100_000_000)",
    ),
    Attempt(
        name="memory in the buffers of pipes", contained_by="limit of open files; seccomp (no `F_SETPIPE_SZ`)",
        code="import fcntl, os\ndef attempt(it):\n r, w = os.pipe()\n try: fcntl.fcntl(w, 1031, 1 << 20)\n except OSError: return 0.0\n return 1.0",
    ),
    Attempt(
        name="memory in signals that wait", contained_by="limit of pending signals",
        code="import ctypes, os, signal\nlibc = ctypes.CDLL(None)\ndef attempt(it):\n signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 64))\n"
        " return float(sum(libc.syscall(234, os.getpid(), os.getpid(), 40) == 0 for _ in range(5000)) > 200)",
    ),
    Attempt(
        name="memory in locks of files", contained_by="seccomp (locks are granted and never made)",
        code="import fcntl, os, struct\ndef attempt(it):\n fd = os.open(os.__file__, os.O_RDONLY)\n"
        " for n in range(1000): fcntl.lockf(fd, fcntl.LOCK_SH, 1, 2 * n)\n other = os.open(os.__file__, os.O_RDONLY)\n"
        " # F_OFD_GETLK sees the locks of the process as another's.\n"
        " asked = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0)\n"
        " return float(struct.unpack('hhqqi4x', fcntl.fcntl(other, 36, asked))[0] != fcntl.F_UNLCK)",
    ),
    Attempt(
        name="pages that the machine set aside", contained_by="seccomp (no MAP_HUGETLB)",
        code="import mmap\ndef attempt(it):\n mmap.mmap(-1, 2 << 20, flags=0x40022)\n return 1.0", says="PermissionError|not permitted",
    ),
    Attempt(
        name="bytes out of band", contained_by="seccomp (no MSG_OOB)", says="PermissionError",
        code="import socket\ndef attempt(it):\n a, b = socket.socketpair()\n a.send(b'xy', socket.MSG_OOB)\n b.recv(1, socket.MSG_OOB)\n return 1.0",
    ),
    Attempt(
        name="descriptors sent through a socket", contained_by="seccomp (no `sendmsg`)", says="PermissionError",
        code="import array, os, socket\ndef attempt(it):\n a, b = socket.socketpair()\n"
        " a.sendmsg([b'x'], [(1, 1, array.array('i', [os.open('/dev/null', 0)]))])\n return 1.0",
    ),
    Attempt(
        name="a descriptor of a process from a socket", contained_by="seccomp (no `pidfd_send_signal`, `pidfd_getfd`, `setns`)",
        code="import ctypes, socket, struct\nlibc = ctypes.CDLL(None, use_errno=True)\ndef attempt(it):\n a, b = socket.socketpair()\n"
        " try: fd = struct.unpack('i', a.getsockopt(1, 77, 4))[0]\n except OSError: return 0.0\n"
        " return float(any(libc.syscall(*call) != -1 for call in ((424, fd, 0, 0, 0), (438, fd, 3, 0), (308, fd, 0x20000000))))",
    ),
    Attempt(
        name="leases and notices of files", contained_by="seccomp (no F_SETLEASE, F_NOTIFY; no inotify, no fanotify)",
        code="import fcntl, os\ndef attempt(it):\n fd, folder = os.open(os.__file__, 0), os.open(os.path.dirname(os.__file__), 0)\n"
        " for f in ((fd, 1024, 0), (folder, 1026, 0x80000002)):\n  try: fcntl.fcntl(*f)\n  except OSError: continue\n  return 1.0\n return 0.0",
    ),
    Attempt(name="watches on files", contained_by=_SECCOMP, code=_numbers("294, 0", "253", "300, 0, 0", "301, 0, 0, 0, 0, 0")),
    Attempt(name="what others read, by the file cache", contained_by=_SECCOMP, code=_numbers("27, 0, 4096, 0", "327, 0, 0, 0, 0, 0, 8", "221, 0, 0, 0, 4", "187, 0, 0, 1", "451, 0, 0, 0, 0", "277, 0, 0, 0, 0")),
    Attempt(name="queues and semaphores that stay", contained_by=_SECCOMP, code=_numbers("240, 0, 66, 384, 0", "64, 0, 1, 896", "68, 0, 896", "29, 0, 4096, 896", "222, 0, 0, 0")),
    Attempt(name="another place in the schedule", contained_by=_SECCOMP, code=_numbers("144, 0, 1, 0", "142, 0, 0", "314, 0, 0, 0", "203, 0, 8, 0", "141, 0, 0, 5", "251, 1, 0, 0")),
    Attempt(name="the machine's name and clock", contained_by=_SECCOMP, code=_numbers("170, 0, 1", "171, 0, 1", "164, 0, 0", "227, 0, 0", "159, 0", "305, 0, 0")),
    Attempt(name="modules, kexec, swap, accounting, reboot", contained_by=_SECCOMP, code=_numbers("175, 0, 0, 0", "313, 0, 0, 0", "246, 0, 0, 0, 0", "167, 0, 0", "163, 0", "179, 0, 0, 0, 0", "169, 0, 0, 0", "103, 3, 0, 0")),
    Attempt(name="mounts by the newer calls", contained_by=_SECCOMP, code=_numbers("430, 0, 0", "431, 0, 0, 0, 0, 0", "432, 0, 0, 0", "429, 0, 0, 0, 0, 0", "428, -100, 0, 1", "433, -100, 0, 0", "442, -100, 0, 0, 0, 0", "457, 0, 0, 0, 0", "458, 0, 0, 0, 0", "467, -100, 0, 1, 0, 0")),
    Attempt(name="files by handles", contained_by=_SECCOMP, code=_numbers("303, -100, 0, 0, 0, 0", "304, 0, 0, 0")),
    Attempt(name="other processes' memory, files and pages", contained_by=_SECCOMP, code=_numbers("312, 1, 1, 0, 0, 0", "440, 0, 0, 0, 0, 0", "438, 0, 0, 0", "448, 0, 0", "274, 1, 0, 0", "256, 1, 0, 0, 0", "279, 1, 0, 0, 0, 0, 0")),
    Attempt(name="memory that is locked, secret or bound", contained_by=_SECCOMP, code=_numbers("447, 0", "149, 0, 4096", "151, 1", "325, 0, 4096, 0", "237, 0, 0, 0, 0, 0, 0", "238, 0, 0, 0", "330, 0, 0", "453, 0, 4096, 0", "216, 0, 0, 0, 0, 0")),
    Attempt(name="splices", contained_by=_SECCOMP, code=_numbers("275, 0, 0, 1, 0, 1, 0", "276, 0, 1, 1, 0", "278, 1, 0, 0, 0")),
    Attempt(name="a filter, rules or a domain of its own", contained_by=_SECCOMP, code=_numbers("317, 1, 0, 0", "317, 2, 0, 0", "157, 22, 2, 0, 0, 0", "157, 38, 1, 0, 0, 0", "444, 0, 0, 0", "446, 0, 0")),
    Attempt(name="outlive its worker, be dumped, be traced", contained_by=_SECCOMP, code=_numbers("157, 1, 0, 0, 0, 0", "157, 4, 1, 0, 0, 0", "157, 0x59616d61, -1, 0, 0, 0", "157, 36, 1, 0, 0, 0", "112", "109, 0, 0", "101, 0, 0, 0, 0")),
    Attempt(name="limits of other processes", contained_by="seccomp (own process only); process namespace", code="import resource\ndef attempt(it):\n for pid in (it['trainer'], it.get('worker', 1), 1):\n  try: resource.prlimit(pid, resource.RLIMIT_NOFILE)\n  except OSError: continue\n  return 1.0\n return 0.0"),
    Attempt(name="requests to devices", contained_by="seccomp (six requests)", code=_numbers("16, 0, 0x5412, 0", "16, 0, 0x5452, 0", "16, 0, 0x8901, 0", "16, 0, 0x40086602, 0", "16, 0, 0x40049409, 0", "16, 0, 0x40085203, 0", "16, 0, 0xb701, 0", "16, 0, 0x541e, 0")),
    Attempt(name="named pipes", contained_by="seccomp (no `mknod`)", says="PermissionError", code="import os\ndef attempt(it):\n os.mkfifo('fifo')\n return 1.0"),
    Attempt(
        name="an early score, then an end", contained_by="only what the mark precedes is a result",
        code="import os\ndef attempt(it):\n os.write(3, b'{\"score\": 1.0}')\n os._exit(0)", says=r"\A\Z",
    ),
    Attempt(
        name="an early score, then a crash", contained_by="a process that a signal ended has no result", says="SIGSEGV",
        code="import ctypes, os\ndef attempt(it):\n os.write(3, b'{\"score\": 1.0}')\n ctypes.string_at(8)",
    ),
    Attempt(
        name="another file in the place of the result's", contained_by="only what arrives in the pipe is a result", says=r"\A\Z",
        code="import os\ndef attempt(it):\n os.dup2(os.open('/dev/null', os.O_RDWR), 3)\n return 1.0",
    ),
    Attempt(
        name="the worker's own objects, up the frames", contained_by="the worker's descriptors are closed; it holds nothing of others",
        code="import os, sys\ndef attempt(it):\n frame = sys._getframe()\n while frame.f_back: frame = frame.f_back\n"
        " worker = next(f for f in walk(sys._getframe()) if type(f).__name__ == 'Worker')\n"
        " for fd in (worker._in, worker._out):\n  try: os.fstat(fd)\n  except OSError: continue\n  return 1.0\n"
        " return float(any(worker._result._view[1:]) or any(worker._output._view))\n"
        "def walk(frame):\n while frame:\n  yield from frame.f_locals.values()\n  frame = frame.f_back",
    ),
    Attempt(
        name="stop its own process", contained_by="SIGKILL at the limit", endless=True,
        code="import os\ndef attempt(it):\n os.kill(os.getpid(), 19)\n return 1.0",
    ),
    Attempt(
        name="folders nested without end", contained_by="number of the tmpfs's inodes", says="No space left|PermissionError",
        code="import os\ndef attempt(it):\n while True:\n  os.mkdir('x' * 200)\n  os.chdir('x' * 200)",
    ),
    Attempt(
        name="pieces of one byte in the pipes", contained_by="only its end is kept; a process of its own",
        code="import fcntl, os\ndef attempt(it):\n for fd in (1, 3): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT | os.O_NONBLOCK)\n"
        " for _ in range(20):\n  try: os.write(1, b'x')\n  except OSError: pass\n return 0.0",
    ),
]  # fmt: skip
