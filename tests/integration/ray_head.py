"""A Ray cluster of a test's own, as a user starts one: `ray start --head`, on free ports and in its own folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running head node: the environment of its clients, and the address that takes jobs."""

    env: dict[str, str]
    jobs: str

    def python(self, code: str) -> str:
        """Run a few lines in a process that has joined the cluster; returns what they print."""
        code = f"import ray\nfrom ray import serve\nray.init(log_to_driver=False)\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def ray_head(dashboard: bool = False) -> Iterator[Head]:
    """Start one, with its dashboard if it must take jobs; at the end only its own processes are ended."""
    folder = Path(tempfile.mkdtemp(prefix="llmi-ray-", dir="/tmp"))  # short: Ray puts sockets into it
    gcs, jobs, agent, grpc, client = free_ports(5)
    # Once somebody's Ray has made a token, every later one asks for it; nothing here leaves this machine.
    env = dict(os.environ, RAY_AUTH_MODE="disabled", PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    env.pop("RAY_ADDRESS", None)
    options = {
        "port": gcs,
        "include-dashboard": str(dashboard).lower(),
        "dashboard-port": jobs,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": grpc,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "num-cpus": 4,
        "object-store-memory": 256 << 20,
        "temp-dir": folder,
    }
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--disable-usage-stats",
        *(f"--{k}={v}" for k, v in options.items()),
    ]
    try:
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Head(env | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}, f"http://127.0.0.1:{jobs}")
    finally:
        end(str(folder))
        shutil.rmtree(folder, ignore_errors=True)


def end(folder: str) -> None:
    """Kill the processes whose command line holds `folder`, and all that they started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if folder in " ".join(process.cmdline()):
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
    for process in found.values():
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(list(found.values()), timeout=20)


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as open_:
        sockets = [open_.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [s.getsockname()[1] for s in sockets]
