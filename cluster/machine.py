"""What the machine is like: one function a check, each returns a `Finding` and changes nothing."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.jail import landlock_abi

GIB = 1 << 30
MEMORY_GIB = 10.0  # what examples/tiny.yaml may take at most
SHARED_GIB = 2.0  # Ray's object store, and room to spare
DISK_GIB = 5.0  # a run's checkpoints and its store
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `what` is so; if it is not `ok`, `fix` says what to do."""

    name: str
    ok: bool
    what: str
    fix: str = ""


def python_version(version: tuple[int, ...] = sys.version_info[:2]) -> Finding:
    what = f"Python {version[0]}.{version[1]} on {platform.system()} {platform.machine()}"
    return Finding("Python", version == (3, 11), what, "the locked packages are for Python 3.11: make .venv with it")


def system_libraries() -> Finding:
    """vLLM on CPUs loads libnuma and asks lscpu for the cores; Python's packages bring neither."""
    missing = []
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        missing.append("libnuma1")
    if not shutil.which("lscpu"):
        missing.append("util-linux")
    what = f"missing: {', '.join(missing)}" if missing else "libnuma and lscpu are there"
    return Finding("system libraries", not missing, what, f"as root: apt-get install {' '.join(missing)}")


def cores(cgroup: Path = CGROUP) -> Finding:
    """Cores that this process may use, by its affinity and its container's quota."""
    number = float(len(os.sched_getaffinity(0)))
    quota, period = [*_read(cgroup / "cpu.max").split(), "", ""][:2]
    if quota.isdigit() and period.isdigit():
        number = min(number, int(quota) / int(period))
    fix = "examples/tiny.yaml is made for two cores and will take longer"
    return Finding("cores", number >= 2, f"{number:g} can be used", fix)


def threads(environment: Mapping[str, str] = os.environ) -> Finding:
    value = environment.get("OMP_NUM_THREADS", "")
    if not value:
        return Finding("threads", True, "OMP_NUM_THREADS is not set: Ray sets it for each actor")
    ok = value.isdigit() and 1 <= int(value) <= len(os.sched_getaffinity(0))
    fix = "`unset OMP_NUM_THREADS`: more threads than cores slow each other down"
    return Finding("threads", ok, f"OMP_NUM_THREADS is {value}", fix)


def memory(cgroup: Path = CGROUP) -> Finding:
    """Memory that is free, within the container's limit if there is one (memory.max of cgroup v2)."""
    free = psutil.virtual_memory().available
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    fix = f"the example takes up to {MEMORY_GIB:g} GiB: end other programs or raise the container's limit"
    return Finding("memory", free >= MEMORY_GIB * GIB, f"{free / GIB:.1f} GiB free", fix)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    free = shutil.disk_usage(folder).free / GIB if folder.is_dir() else 0.0
    fix = "in a container: start it with `docker run --shm-size=8g`; else `mount -o remount,size=8g /dev/shm` as root"
    return Finding("shared memory", free >= SHARED_GIB, f"{free:.1f} GiB free in {folder}", fix)


def disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    ok = usage.free >= max(DISK_GIB * GIB, 0.05 * usage.total)
    what = f"{usage.free / GIB:.0f} of {usage.total / GIB:.0f} GiB free at {folder}"
    fix = f"make room: a run takes up to {DISK_GIB:g} GiB, and Ray refuses work on a disk that is 95 % full"
    return Finding("disk", ok, what, fix)


def port(number: int, use: str) -> Finding:
    """Free, or held by Ray itself, is well."""
    name = f"port {number}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
            return Finding(name, True, f"free ({use})")
        except OSError:
            holder = _holder(number)
    if "ray" in holder or "gcs_server" in holder:
        return Finding(name, True, f"held by {holder}: a Ray cluster runs here ({use})")
    return Finding(name, False, f"held by {holder}; {use} wants it", "end that program, or give another port")


def ray_tokens(cluster: bool, environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Finding:
    """Where a token file exists, Ray's clusters ask for the token, but its clients send it only if they are told to.

    Ray makes the file with the first cluster it starts. `cluster`: whether one runs here.
    """
    mode = environment.get("RAY_AUTH_MODE")
    token = Path(environment.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
    there = token.exists() or "RAY_AUTH_TOKEN" in environment
    if mode == "token" and not there:
        fix = "`ray get-auth-token --generate` makes one"
        return Finding("Ray tokens", False, f"RAY_AUTH_MODE is token, but there is no {token}", fix)
    if mode or not there:
        return Finding("Ray tokens", True, f"RAY_AUTH_MODE is {mode}" if mode else "no token, none asked for")
    told = "`ray job submit` and `ray status` need RAY_AUTH_MODE=token here"
    return Finding("Ray tokens", not cluster, f"a token is there: {told}", "`export RAY_AUTH_MODE=token`")


def sandbox() -> Finding:
    """What the code tool confines model-written code with."""
    abi = landlock_abi()
    if not Path("/proc/sys/kernel/seccomp").exists():
        return Finding("code sandbox", False, "this kernel has no seccomp", "the code tool does not run without it")
    fix = "boot a kernel of 5.13 or later with landlock among its `lsm=`: else model-written code sees your files"
    return Finding("code sandbox", abi > 0, f"Landlock ABI {abi} and seccomp" if abi else "no Landlock", fix)


def _holder(number: int) -> str:
    """Name and id of the process that listens on a port, as far as we may know."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == number
            if listens and connection.pid is not None:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "a process of somebody else"


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
