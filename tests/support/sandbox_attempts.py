"""Attempts to break out of the sandbox, as data: what each tries, and what contains it.

`attempt(it)` returns 1.0 where it got what it wanted, 0.0 or an exception where not. It runs inside; `it` names what it
goes after. Only the standard library: the table also runs under a Python that has nothing installed.
"""

# ruff: noqa: E501 (a table)

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    name: str
    contained_by: str
    code: str
    says: str = ""
    """What the error or the sandbox must say."""
    endless: bool = False
    """Ends by a limit of time only."""


_CONNECT = """
import socket
def attempt(it):
    with socket.socket({kind}) as s:
        s.settimeout(1)
        s.{action}
    return 1.0
"""
_TRIES = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def attempt(it):
    return float(any(f() != -1 for f in (FUNCTIONS)))
"""
_OPENS = """
import os
def attempt(it):
    for path, flags in PATHS:
        try:
            os.close(os.open(path, flags))
        except OSError:
            continue
        return 1.0
    return 0.0
"""
# A folder that holds the packages in its depth is there as the mounts' way and may be opened: it must show nothing else.
_READS = """
import os
def attempt(it):
    def leads(path):
        return any((kept + '/').startswith(path + '/') for kept in it['packages'])
    def is_read(path):
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError:
            return False
        if not leads(path):
            return True
        if path in it['packages']:
            return False
        inner = [os.path.join(path, name) for name in os.listdir(path)]
        return any(not leads(path) or is_read(path) for path in inner)
    return float(any(map(is_read, (PATHS))))
"""


def _connect(kind: str, action: str) -> str:
    return _CONNECT.format(kind=kind, action=action)


def _calls(*functions: str) -> str:
    return _TRIES.replace("FUNCTIONS", " ".join(f"lambda: {f}," for f in functions))


def _opens(*paths: str) -> str:
    return _OPENS.replace("PATHS", f"[{', '.join(paths)}]")


def _reads(*paths: str) -> str:
    return _READS.replace("PATHS", " ".join(f"{path}," for path in paths))


_NET = "network namespace; seccomp (no `socket`)"
_NEW_PROCESS = "seccomp (no `fork`, `vfork`, `execve`; `clone` for threads only)"
_FILES = "mount namespace (not there); landlock"
_READ_ONLY = "read-only mounts; landlock"
_NO_PROC = "mount and process namespaces (no /proc); landlock"
_SECCOMP = "seccomp"
_SIGNALS = "process namespace; another user; seccomp (own process only)"

ATTEMPTS = [
    Attempt(name="connect over IPv4", contained_by=_NET, code=_connect("2, 1", "connect(('127.0.0.1', it['port4']))")),
    Attempt(name="connect over IPv6", contained_by=_NET, code=_connect("10, 1", "connect(('::1', it['port6']))")),
    Attempt(name="send a datagram", contained_by=_NET, code=_connect("2, 2", "sendto(b'x', ('127.0.0.1', it['udp']))")),
    Attempt(name="connect to a unix socket", contained_by=_NET, code=_connect("1, 1", "connect(it['unix'])")),
    Attempt(
        name="connect to an abstract socket", contained_by=_NET, code=_connect("1, 1", "connect('\\0' + it['abstract'])")
    ),
    Attempt(
        name="datagram from a socket pair to an abstract socket",
        contained_by="seccomp (`socketpair` for unix streams only); network namespace",
        code="import socket\ndef attempt(it):\n a, b = socket.socketpair(1, 2)\n"
        " a.sendto(b'x', '\\0' + it['abstract_datagrams'])\n return 1.0",
    ),
    Attempt(
        name="look up a name, bind a port",
        contained_by=_NET,
        code="import socket\ndef attempt(it):\n"
        " for f in (lambda: socket.getaddrinfo('example.com', 80), lambda: socket.create_server(('', 0))):\n"
        "  try: f()\n  except OSError: continue\n  return 1.0\n return 0.0",
    ),
    Attempt(
        name="fork bomb",
        contained_by=_NEW_PROCESS,
        says="PermissionError|BlockingIOError",
        code="import os\ndef attempt(it):\n while True:\n  if os.fork() == 0: os.kill(os.getpid(), 19)\n return 1.0",
    ),
    Attempt(
        name="fork, vfork, clone and clone3 as raw calls",
        contained_by=_NEW_PROCESS,
        code=_calls(
            "libc.fork()", "libc.vfork()", "libc.syscall(it['clone'], 17, 0, 0, 0, 0)",
            "libc.syscall(435, ctypes.create_string_buffer(88), 88)",
        ).replace("libc.syscall(it", "libc.syscall(IT").replace("def attempt(it):", "def attempt(it):\n    global IT; IT = it"),
    ),
    Attempt(
        name="run a program",
        contained_by=_NEW_PROCESS,
        says="PermissionError|BlockingIOError",
        code="import subprocess\ndef attempt(it):\n subprocess.run(['/bin/ls', '/'])\n return 1.0",
    ),
    Attempt(
        name="become another program",
        contained_by="seccomp (no `execve`); landlock (nothing may be executed)",
        says="PermissionError",
        code="import os\ndef attempt(it):\n os.execv('/usr/bin/id', ['id'])",
    ),
    Attempt(
        name="thread bomb",
        contained_by="limit of processes (or no threads at all)",
        says="can't start new thread",
        code="import threading, time\ndef attempt(it):\n for _ in range(300):\n"
        "  threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n return 1.0",
    ),
    Attempt(
        name="fill the memory",
        contained_by="limit of address space",
        says="MemoryError",
        code="def attempt(it):\n held = []\n for _ in range(64): held.append(b'x' * (1 << 24))\n return 1.0",
    ),
    Attempt(
        name="fill shared memory",
        contained_by="limit of address space; seccomp (no `memfd_create`, `shmget`)",
        code="import ctypes, mmap, os\ndef attempt(it):\n libc = ctypes.CDLL(None)\n"
        " if libc.shmget(0, 1 << 20, 0o1600) != -1 or libc.memfd_create(b'x', 0) != -1: return 1.0\n"
        " mmap.mmap(-1, 1 << 30)\n return 1.0",
        says="MemoryError|Cannot allocate",
    ),
    Attempt(
        name="raise the limits",
        contained_by="hard limits; no capabilities",
        says="ValueError|PermissionError",
        code="import resource\ndef attempt(it):\n resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n return 1.0",
    ),
    Attempt(
        name="read the trainer's /proc/PID/environ",
        contained_by=_NO_PROC,
        code=_opens(*(f"(f'/proc/{pid}/environ', 0)" for pid in ("{it[\"trainer\"]}", "1", "self", "{os.getppid()}"))),
    ),
    Attempt(
        name="read and write the trainer's /proc/PID/mem",
        contained_by=_NO_PROC,
        code=_opens(*(f"(f'/proc/{pid}/mem', {flags})" for pid in ("{it[\"trainer\"]}", "1", "self") for flags in (0, 2))),
    ),
    Attempt(
        name="leave through /proc/PID/root, fd and cwd",
        contained_by=_NO_PROC,
        code=_opens(*(f"(f'/proc/{pid}/{what}', 0)" for pid in ("{it[\"trainer\"]}", "1", "self") for what in ("root", "cwd", "fd"))),
    ),
    Attempt(name="change kernel settings", contained_by=_NO_PROC, code=_opens("('/proc/sys/kernel/core_pattern', 1)", "('/sys/kernel', 0)")),
    Attempt(name="read the trainer's files", contained_by=_FILES, code=_opens("(it['secret'], 0)", "(os.path.dirname(it['secret']), 0)")),
    Attempt(name="write the trainer's files", contained_by=_FILES, code=_opens("(it['secret'], 1)", "(it['secret'], 0o1001)")),
    Attempt(name="read the repository", contained_by=_FILES, code=_reads("it['repository']", "*it['beside the packages']")),
    Attempt(name="read /etc/shadow and home folders", contained_by=_FILES, code=_reads("'/etc/shadow'", "'/etc/passwd'", "'/home'", "'/root'", "'/root/.bashrc'")),
    Attempt(
        name="read the trainer's environment variables",
        contained_by="a clean environment",
        code="import os, ctypes\ndef attempt(it):\n libc = ctypes.CDLL(None)\n libc.getenv.restype = ctypes.c_char_p\n"
        " return float('SANDBOX_SECRET' in os.environ or libc.getenv(b'SANDBOX_SECRET') is not None)",
    ),
    Attempt(
        name="ptrace",
        contained_by="seccomp; process namespace; another user",
        code=_calls("libc.ptrace(16, os.getppid(), 0, 0)", "libc.ptrace(16, 1, 0, 0)", "libc.ptrace(0, 0, 0, 0)"),
    ),
    Attempt(
        name="process_vm_readv and process_vm_writev",
        contained_by="seccomp; process namespace; another user",
        code="import ctypes, os\ndef attempt(it):\n libc = ctypes.CDLL(None)\n b = ctypes.create_string_buffer(8)\n"
        " v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
        " return float(any(f(p, v, 1, v, 1, 0) != -1 for p in (os.getpid(), os.getppid(), it['trainer'])\n"
        "  for f in (libc.process_vm_readv, libc.process_vm_writev)))",
    ),
    Attempt(
        name="links out of the scratch folder",
        contained_by="mount namespace (they point to nothing)",
        code="import os\ndef attempt(it):\n"
        " for n, target in enumerate((it['secret'], '/etc/shadow', '../../../..' + it['secret'])):\n"
        "  os.symlink(target, f'l{n}')\n  try: open(f'l{n}').read()\n  except OSError: pass\n  else: return 1.0\n"
        " try: os.link('/usr/bin/env', 'hard')\n except OSError: return 0.0\n return 1.0",
    ),
    Attempt(
        name="write to /usr and to the packages",
        contained_by=_READ_ONLY,
        code=_opens("('/usr/escaped', 0o101)", "(os.__file__, 1)", "(os.path.dirname(os.__file__) + '/escaped.py', 0o101)", "('/escaped', 0o101)"),
    ),
    Attempt(
        name="change modes and times of files outside",
        contained_by="read-only mounts; seccomp where there are none",
        code="import os\ndef attempt(it):\n for f in (lambda: os.chmod(os.__file__, 0o666), lambda: os.utime(os.__file__),\n"
        "  lambda: os.truncate(it['secret'], 0), lambda: os.chmod(it['secret'], 0o666), lambda: os.setxattr('.', 'user.x', b'x')):\n"
        "  try: f()\n  except OSError: continue\n  return 1.0\n return 0.0",
    ),
    Attempt(
        name="mount, unshare, setns, pivot_root",
        contained_by="seccomp; no capabilities; landlock",
        code=_calls("libc.mount(b't', b'/usr', b'tmpfs', 0, 0)", "libc.unshare(0x10000000)", "libc.unshare(0x20000)",
                    "libc.umount2(b'/usr', 2)", "libc.setns(0, 0)", "libc.syscall(155, b'.', b'.')", "libc.syscall(428, -100, b'/', 1)"),
    ),
    Attempt(name="chroot", contained_by="seccomp; no capabilities", says="PermissionError", code="import os\ndef attempt(it):\n os.chroot('.')\n return 1.0"),
    Attempt(
        name="a pickle as the result",
        contained_by="results are JSON numbers; nothing is unpickled",
        code="import os, pickle\nclass P:\n def __reduce__(self): return os.system, ('touch ' + PATH,)\n"
        "def attempt(it):\n global PATH\n PATH = it['witness']\n os.write(3, pickle.dumps(P()))\n return P()",
        says=r"\A\Z|no valid",
    ),
    Attempt(
        name="write replies to every file descriptor",
        contained_by="the worker's pipe is closed in gradings",
        code="import os\ndef attempt(it):\n for fd in range(256):\n  try: os.write(fd, b'\\0\\0\\0\\x0d{\"ready\":true}')\n"
        "  except OSError: pass\n os._exit(0)",
    ),
    Attempt(
        name="use inherited file descriptors",
        contained_by="gradings keep only standard streams and the result's pipe",
        code="import os\ndef attempt(it):\n def is_open(fd):\n  try: os.fstat(fd)\n  except OSError: return False\n  return True\n"
        " return float(any(map(is_open, range(4, 4096))))",
    ),
    Attempt(
        name="signals to the trainer, the worker and everyone",
        contained_by=_SIGNALS,
        code="import os\ndef attempt(it):\n for pid in (it['trainer'], it['worker'], os.getppid(), -1, 0):\n"
        "  for number in (9, 15, 19):\n   try: os.kill(pid, number)\n   except OSError: continue\n   return 1.0\n return 0.0",
    ),
    Attempt(
        name="signals by way of a file descriptor",
        contained_by="seccomp (no `F_SETOWN`, `F_SETSIG`)",
        says="PermissionError",
        code="import fcntl, os\ndef attempt(it):\n r, w = os.pipe()\n fcntl.fcntl(r, fcntl.F_SETOWN, it['trainer'])\n return 1.0",
    ),
    Attempt(
        name="endless output", contained_by="limit of time; only its end is kept", endless=True,
        code="def attempt(it):\n while True: print('x' * 10000)",
    ),
    Attempt(
        name="a huge result", contained_by="results are JSON numbers of limited size",
        code="import os\ndef attempt(it):\n for _ in range(100): os.write(3, b'1' * 65536)\n return 1.0",
    ),
    Attempt(
        name="an endless traceback", contained_by="only its end is kept; limit of memory", says="xxx|ValueError|MemoryError",
        code="def attempt(it):\n def f(n):\n  if n: f(n - 1)\n  raise ValueError('x' * 10_000_000)\n f(500)",
    ),
    Attempt(
        name="a full disk", contained_by="size of the scratch folder's tmpfs", says="No space left|PermissionError",
        code="def attempt(it):\n for n in range(40):\n  with open(f'f{n}', 'wb') as f: f.write(b'x' * (1 << 20))\n return 1.0",
    ),
    Attempt(
        name="one file over the limit", contained_by="limit of file size", says="File too large|No space|PermissionError",
        code="def attempt(it):\n with open('f', 'wb') as f: f.truncate(1 << 40)\n return 1.0",
    ),
    Attempt(
        name="very many files", contained_by="number of the tmpfs's inodes", says="No space left|PermissionError",
        code="def attempt(it):\n for n in range(2000): open(f'f{n}', 'w').close()\n return 1.0",
    ),
    Attempt(name="an infinite loop", contained_by="limit of CPU time", endless=True, code="def attempt(it):\n while True: pass"),
    Attempt(name="sleep for ever", contained_by="limit of wall time", endless=True, code="import time\ndef attempt(it):\n time.sleep(1e6)"),
    Attempt(
        name="ignore every signal", contained_by="SIGKILL at the limit", endless=True,
        code="import signal, time\ndef attempt(it):\n for s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except OSError: pass\n while True:\n  try: time.sleep(1e6)\n  except BaseException: pass",
    ),
    Attempt(
        name="bpf, io_uring, keyctl, userfaultfd, perf_event_open, open_by_handle_at", contained_by=_SECCOMP,
        code=_calls("libc.syscall(321, 0, 0, 0)", "libc.syscall(425, 1, ctypes.create_string_buffer(256))", "libc.syscall(250, 0, -3, 1)",
                    "libc.syscall(323, 1)", "libc.syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
                    "libc.syscall(304, 0, 0, 0)", "libc.syscall(434, os.getpid(), 0)"),
    ),
    Attempt(
        name="system calls under x32 numbers", contained_by="seccomp (ends the process)", says="SIGSYS|no such machine",
        code="import ctypes, platform\ndef attempt(it):\n if platform.machine() != 'x86_64': raise OSError('no such machine')\n"
        " ctypes.CDLL(None).syscall(0x40000000 + 39)\n return 1.0",
    ),
    Attempt(
        name="become root, take capabilities", contained_by="seccomp; no capabilities; no new privileges",
        code=_calls("libc.setuid(0)", "libc.setgid(0)", "libc.setgroups(0, 0)", "libc.syscall(126, 0, 0)", "libc.prctl(8, 1)", "libc.prctl(1, 0)"),
    ),
    Attempt(
        name="device nodes", contained_by="seccomp (no `mknod`); devices are not there",
        code="import os\ndef attempt(it):\n for f in (lambda: os.mknod('m', 0o20666, os.makedev(1, 1)), lambda: os.mknod('n', 0o60666, os.makedev(254, 0)),\n"
        "  lambda: os.open('/dev/mem', 0), lambda: os.open('/dev/kmsg', 0), lambda: os.open('/dev/vda', 0), lambda: os.open('/dev/tty', 0)):\n"
        "  try: f()\n  except OSError: continue\n  return 1.0\n return 0.0",
    ),
    Attempt(name="end the process with os._exit", contained_by="no result, no score", code="import os\ndef attempt(it): os._exit(0)"),
    Attempt(name="sys.exit", contained_by="an exception like others", says="SystemExit", code="import sys\ndef attempt(it): sys.exit(0)"),
    Attempt(name="crash", contained_by="a process of its own", says="SIGSEGV", code="import ctypes\ndef attempt(it): ctypes.string_at(8)"),
    Attempt(
        name="leave a thread behind", contained_by="the process is killed with all its threads",
        code="import threading, time\ndef attempt(it):\n def go():\n  while True: time.sleep(0.01)\n"
        " threading.Thread(target=go).start()\n return 0.0",
    ),
    Attempt(
        name="leave state for the next grading", contained_by="a fresh process and scratch folder each time",
        code="import builtins, json, os, sys\ndef attempt(it):\n builtins.leaked = 1\n os.environ['LEAKED'] = '1'\n sys.modules['leaked'] = sys\n"
        " sys.path.append('leaked')\n json.dumps = lambda *_: '{\"score\": 0.75}'\n os.umask(0)\n open('leaked', 'w').write('x')\n return 0.0",
        says=r"\A\Z|0.75|PermissionError",
    ),
]  # fmt: skip

HONEST = """
import builtins, json, os, sys
def attempt(it):
    leaks = hasattr(builtins, 'leaked'), 'LEAKED' in os.environ, 'leaked' in sys.modules, 'leaked' in sys.path
    assert not any(leaks) and json.dumps([1]) == '[1]', leaks
    try:
        left = os.listdir(os.getcwd())
    except PermissionError:
        left = []
    assert not left, left
    return 0.25
"""
