"""What a process that runs model-written code may not do, made with what every Linux user has: no root, no packages.

After `confine` the process has no capability, starts no process, opens no socket, signals, traces and reschedules
nobody else, not through the owner of a pipe either, changes no file's owner or mode (seccomp), and sees only the
folders it is given (Landlock, where the kernel has it). None of this can be undone by the process. Only the standard
library is imported here, because the zygote loads this file by its path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import select
import signal
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAP_DAC_READ_SEARCH = 1 << 2  # kept where held: root in a container may not own the Python it runs

# Landlock (linux/landlock.h): its system calls have the same numbers on every architecture.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ, _READ_AND_LIST, _ON_FILES = 0b101, 0b1101, 0b1100_0000_0000_0111  # execute, read; + list; what a file can have
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by the ABI that brought them

# Denied system calls: their numbers on x86-64 and on arm64, None where it has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # processes
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # other processes
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    # network, and memory or messages that outlive the process or escape its limits
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # the kernel's wider surface
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "syslog": (103, 116),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # what all processes of a user or of the machine share
    "sync": (162, 81),
    "syncfs": (306, 267),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    # changes to files that Landlock does not see
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "truncate": (76, 45),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    "futimesat": (261, None),
}
# Calls that depend on an argument: clone (only threads), tgkill (only oneself, and not SIGKILL, which tells of the
# kernel's out-of-memory killer), prlimit64 (only oneself), fcntl and ioctl (not to name the process that a file
# signals); and clone3, whose arguments a filter cannot read, so that the C library falls back to clone.
_BY_ARGUMENT = {"clone": (56, 220), "clone3": (435, 435), "tgkill": (234, 131), "prlimit64": (302, 261)}
_BY_COMMAND = {"fcntl": (72, 25), "ioctl": (16, 29)}
_COMMANDS = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902, 0x5412)}  # F_SETOWN and its kin; FIOSETOWN, TIOCSTI
_CLONE_THREAD = 0x10000
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH

_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _FIRST, _SECOND, _THIRD = 0, 4, 16, 24, 32  # offsets in struct seccomp_data: arguments


def _call(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def limit(address_space: int, cpu_s: int, file_bytes: int) -> None:
    """Limit this process for good: bytes of address space, seconds of CPU time, bytes a file; and no core dump.

    At `cpu_s` it gets SIGXCPU, a second later SIGKILL: the first of a process namespace does not see the former.
    """
    for what, soft, hard in (
        (resource.RLIMIT_AS, address_space, address_space),
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        if (most := resource.getrlimit(what)[1]) != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies.

    Args:
        parent: the reading end of a pipe whose other end only the parent has. (In a process namespace of one's own the
            parent has no number that would tell.)
    """
    _call(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if select.select([parent], [], [], 0)[0]:  # it has died before
        os._exit(1)


def landlock_abi() -> int:
    """The kernel's version of Landlock, 0 if it has none."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, 0, 1))


def confine(readable: Iterable[str], writable: str) -> None:
    """Confine this process for the rest of its life, as the module says.

    Args:
        readable: files and folders that it may read; those that do not exist are left out.
        writable: the one folder where it may also write.

    Raises:
        OSError: the kernel refuses; the code must not be run then.
    """
    program = _filter(os.getpid())
    _call(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _drop_capabilities()
    if abi := landlock_abi():
        _landlock(abi, readable, writable)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
    _call(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def _drop_capabilities() -> None:
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    held = ctypes.create_string_buffer(24)
    _call(_libc.capget(header, held), "capget")
    keep = struct.unpack("6I", held.raw)[1] & _CAP_DAC_READ_SEARCH
    _call(_libc.capset(header, struct.pack("6I", keep, keep, 0, 0, 0, 0)), "capset")


def _landlock(abi: int, readable: Iterable[str], writable: str) -> None:
    rights = _FS_RIGHTS[max(known for known in _FS_RIGHTS if known <= abi)]
    ruleset = _call(_libc.syscall(_LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0), "landlock")
    for path in readable:
        if os.path.exists(path):
            _landlock_allow(ruleset, path, _READ_AND_LIST if os.path.isdir(path) else _READ)
    _landlock_allow(ruleset, os.devnull, rights & _ON_FILES)
    _landlock_allow(ruleset, writable, rights)
    _call(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)


def _landlock_allow(ruleset: int, path: str, rights: int) -> None:
    folder = os.open(path, os.O_PATH)
    rule = struct.pack("=Qi", rights, folder)
    _call(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock: {path}")
    os.close(folder)


def _filter(pid: int) -> bytes:
    """The seccomp filter of the process `pid`: a deny-list, as classic BPF (struct sock_filter, 8 bytes each)."""
    if platform.machine() not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no system call filter for {platform.machine()}")
    column, arch = _MACHINES[platform.machine()]
    denied = _ERRNO | errno.EPERM
    steps = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if column == 0:  # the x32 calls, at the upper numbers
        steps += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, denied)]
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, denied)]
    steps += [(_EQUAL, 0, 3, _BY_ARGUMENT["tgkill"][column]), (_LOAD, 0, 0, _THIRD), (_EQUAL, 0, 1, signal.SIGKILL)]
    steps += [(_RETURN, 0, 0, denied), (_LOAD, 0, 0, _NUMBER)]
    for name, commands in _COMMANDS.items():
        steps += [(_EQUAL, 0, 2 * len(commands) + 2, _BY_COMMAND[name][column]), (_LOAD, 0, 0, _SECOND)]
        steps += [step for command in commands for step in ((_EQUAL, 0, 1, command), (_RETURN, 0, 0, denied))]
        steps += [(_LOAD, 0, 0, _NUMBER)]
    own = {"clone": (_BITS, _CLONE_THREAD), "tgkill": (_EQUAL, pid), "prlimit64": (_EQUAL, 0)}
    for name, (test, value) in own.items():
        steps += [(_EQUAL, 0, 4, _BY_ARGUMENT[name][column]), (_LOAD, 0, 0, _FIRST), (test, 0, 1, value)]
        steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, denied)]
    steps += [(_EQUAL, 0, 1, _BY_ARGUMENT["clone3"][column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (_RETURN, 0, 0, _ALLOW)])
