"""Linux namespaces for model-written code: its own users, processes, mounts, network, IPC and host name.

The zygote enters all but the process namespace once; each child gets a process and a mount namespace of its own when
it is forked. What the kernel refuses is left out: `usable` finds out by trying, in a child that ends. Only the standard
library is imported here, because the zygote loads this file by its path.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable, Iterable, Sequence

USER, PID, MOUNT = "user", "pid", "mount"
_FLAGS = {
    USER: 0x10000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    MOUNT: 0x00020000,
    PID: 0x20000000,
}
#: Of children, when they are forked.
_OF_CHILD = (PID, MOUNT)

_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DETACH = 2
_RDONLY_ATTR, _RECURSIVE, _AT_FDCWD = 1, 0x8000, -100
#: System calls: mount_setattr, and by machine clone and pivot_root.
_MOUNT_SETATTR = 442
_CLONE, _PIVOT_ROOT = {"x86_64": (56, 155), "aarch64": (220, 41)}.get(platform.machine(), (0, 0))
#: What is there of the system beside what is readable.
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
#: The folder of a call, as its code sees it: in memory, of so many bytes and files at most.
FOLDER, _FOLDER_LIMITS = "/scratch", "size=256m,nr_inodes=4096,mode=700"

_libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, as os.fork does


def usable(try_out: Callable[[list[str]], None]) -> list[str]:
    """The kinds of namespaces that this kernel gives to this process, in the order in which they are entered.

    Args:
        try_out: enters those kinds and raises OSError if it cannot work in them; it is called in children.
    """
    held: list[str] = []
    for kind in _FLAGS:
        pid = os.fork()
        if pid == 0:
            try:
                try_out([*held, kind])
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            held.append(kind)
    return held


def enter(kinds: Iterable[str], root: str, readable: Iterable[str], writable: str) -> None:
    """Move this process, which has one thread, into new namespaces of these kinds; `pid` is for `fork`.

    In a mount namespace it sees a small root of its own: what is `readable`, read-only; the folder `writable`; an empty
    `FOLDER` and `/proc`.

    Args:
        root: an empty folder, on which the new root is mounted.

    Raises:
        OSError: the kernel refuses one; this process is of no use then.
    """
    kinds, uid, gid = set(kinds), os.getuid(), os.getgid()
    if USER in kinds:
        _call(_libc.unshare(_FLAGS[USER]), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if flags := sum(_FLAGS[kind] for kind in kinds - {USER, PID}):
        _call(_libc.unshare(flags), "unshare")
    if MOUNT in kinds:
        _new_root(root, readable, writable)


def fork(kinds: Sequence[str]) -> int:
    """`os.fork` into new namespaces of those of `kinds` that a child has for itself. Raises OSError."""
    flags = sum(_FLAGS[kind] for kind in _OF_CHILD if kind in kinds)
    if not flags:
        return os.fork()
    _python.PyOS_BeforeFork()
    pid = _python.syscall(_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)
    number = ctypes.get_errno()
    if pid == 0:
        _python.PyOS_AfterFork_Child()
        return 0
    _python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


def settle(kinds: Sequence[str], folder: str) -> str:
    """Make a child's own mounts, where it may have some; returns the folder that it may write to.

    Args:
        folder: for a child that has no mounts of its own; one in `writable` of `enter`.
    """
    if MOUNT not in kinds:
        return folder
    _call(_libc.umount2(os.path.dirname(folder).encode(), _DETACH), "umount")
    _mount("tmpfs", FOLDER, "tmpfs", _NOSUID | _NODEV, _FOLDER_LIMITS)
    if PID in kinds:
        _libc.mount(b"proc", b"/proc", b"proc", _NOSUID | _NODEV | _NOEXEC, None)  # refused where /proc is masked
    return FOLDER


def _new_root(root: str, readable: Iterable[str], writable: str) -> None:
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in (*sorted(readable), *_DEVICES):
        if os.path.exists(path) and not os.path.exists(root + path):
            _bind(path, root)
            _read_only(root + path)
    for folder in (FOLDER, "/proc"):
        os.makedirs(root + folder, exist_ok=True)
    _bind(writable, root)
    os.chdir(root)
    _call(_libc.syscall(_PIVOT_ROOT, b".", b"."), "pivot_root")
    _call(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    _read_only("/", recursive=False)


def _bind(path: str, root: str) -> None:
    if os.path.isdir(path):
        os.makedirs(root + path)
    else:
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.close(os.open(root + path, os.O_CREAT))
    _mount(path, root + path, None, _BIND | _REC)


def _read_only(path: str, recursive: bool = True) -> None:
    attributes = (ctypes.c_uint64 * 4)(_RDONLY_ATTR, 0, 0, 0)  # struct mount_attr
    flags = _RECURSIVE if recursive else 0
    _call(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, 32), f"mount_setattr {path}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = (None if text is None else text.encode() for text in (source, target, kind))
    _call(_libc.mount(*given, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def _call(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
