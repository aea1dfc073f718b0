"""The parent's side of the zygote: starts it, hands it calls from any thread, and reads each child to its end.

Invariant: every call ends with the child's wait status or with an exception, within its time; a zygote that died or
does not answer is dropped, and the next call starts another.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FRAME = struct.Struct("!cI")  # kind and length of what follows, as in tools/zygote.py
_STATUS = struct.Struct("!id")  # wait status and CPU seconds, as there
_CALLS, _ROOT = "calls", "root"  # folders of its home, as there
#: What `Sandbox.require` knows: three that are tried out, and how they come about.
GUARANTEES = ("files", "network", "processes", "landlock") + tuple(
    f"{kind} namespace" for kind in ("user", "network", "ipc", "uts", "mount", "pid")
)

_START_S = 120.0  # the zygote's imports, from a cold and slow disk
_CHILD_S = 60.0  # from the call to the code's first line, on a busy machine
_END_S = 10.0  # from killing a child, or closing a zygote, to the word that it has ended
_KEPT_OUTPUT = 2048  # bytes of what the code prints

_log = logging.getLogger(__name__)


@dataclass
class Reply:
    """What came back from one child.

    Attributes:
        frames: what it sent, frame after frame.
        printed: the beginning of its standard output and error.
        exit_code: as of `subprocess`: negative for a signal; None while it has not ended.
        cpu_s: seconds of CPU time that it took.
        stopped: why it was killed: "time", "size", or "" if it was not.
    """

    frames: bytearray = field(default_factory=bytearray)
    printed: bytearray = field(default_factory=bytearray)
    exit_code: int | None = None
    cpu_s: float = 0.0
    stopped: str = ""

    @property
    def confined(self) -> bool:
        """Whether the child got as far as the code's first line."""
        return self.frames[:1] == b"C"

    def add(self, data: bytes, printed: bool) -> None:
        if printed:
            self.printed += data[: _KEPT_OUTPUT - len(self.printed)]
        else:
            self.frames += data


class _Zygote:
    """One zygote: its process, its control socket and its folder."""

    def __init__(self) -> None:
        self.home = tempfile.mkdtemp(prefix="llmi-code-")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.greeted = False
        self.holds: frozenset[str] = frozenset()
        for folder in (_CALLS, _ROOT):
            os.mkdir(os.path.join(self.home, folder))
        environment = {
            "HOME": self.home,
            "MPLCONFIGDIR": os.path.join(self.home, "matplotlib"),
            "MPLBACKEND": "Agg",
            "PYTHONHASHSEED": "0",
            "PYTHONUTF8": "1",
            "TZ": "UTC",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a process that forks has one thread
        } | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        # Not `-I`, which would ignore PYTHONHASHSEED: the order of sets would differ from start to start.
        command = [sys.executable, "-s", "-P", str(Path(__file__).with_name("zygote.py"))]
        with theirs, open(Path(self.home, "log"), "wb") as log:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), self.home],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.home,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def greet(self) -> None:
        """Wait until it has its imports.

        Raises:
            RuntimeError: it ended, or is not ready in time.
        """
        self.control.settimeout(_START_S)
        try:
            hello = self.control.recv(1024)
        except TimeoutError:
            raise RuntimeError(f"the code tool's zygote was not ready within {_START_S:.0f} s") from None
        if not hello:
            said = Path(self.home, "log").read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"the code tool's zygote did not start: {said[-1]}")
        said = json.loads(hello)
        namespaces = [f"{kind} namespace" for kind in said["namespaces"]]
        self.holds = frozenset([*said["held"], *namespaces, *(["landlock"] if said["landlock"] else [])])
        self.control.settimeout(_END_S)
        self.greeted = True

    def close(self) -> None:
        """End it and its children, and delete its folder. May be called again."""
        self.control.close()
        if not self.greeted:  # it would first finish its imports
            self.process.kill()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the kernel kills its children then
            self.process.wait()
        _remove(self.home)


class Sandbox:
    """Runs requests in children of a zygote; thread-safe. The zygote starts at once, in the background."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._zygote: _Zygote | None = _Zygote()
        self._closed = False

    def call(self, request: Mapping[str, Any], timeout_s: float, max_bytes: int) -> Reply:
        """Run one request (tools/zygote.py says what is in it) in a folder of its own.

        Args:
            request: JSON-ready; `cwd` is added.
            timeout_s: wall time, from the code's first line.
            max_bytes: how much the child may send.

        Raises:
            RuntimeError: the sandbox failed, not the code; or it is closed.
        """
        zygote = self._running()
        cwd = tempfile.mkdtemp(dir=os.path.join(zygote.home, _CALLS))
        try:
            reply = self._talk(zygote, json.dumps({**request, "cwd": cwd}).encode(), timeout_s, max_bytes)
        finally:
            _remove(cwd)
        if self._closed:  # a child that close() killed
            raise RuntimeError("the code tool was closed during a call")
        if reply.exit_code == -signal.SIGKILL and reply.cpu_s >= request["cpu_s"]:
            reply.exit_code = -signal.SIGXCPU
        if reply.exit_code == -signal.SIGKILL and not reply.stopped:
            raise RuntimeError("the kernel killed the code's process: the machine is out of memory")
        if not reply.confined:
            said = reply.printed.decode(errors="replace").strip() or f"it ended with {reply.exit_code}"
            raise RuntimeError(f"the code tool could not confine a process: {said}")
        return reply

    def require(self, names: Collection[str]) -> frozenset[str]:
        """Wait for the zygote; which of `GUARANTEES` hold on this machine, as it has found out.

        Raises:
            ValueError: one of `names` is no guarantee.
            RuntimeError: one of `names` does not hold.
        """
        if unknown := sorted(set(names) - set(GUARANTEES)):
            raise ValueError(f"code: unknown guarantee {unknown[0]!r}: known are {', '.join(GUARANTEES)}")
        holds = self._running().holds
        if missing := [name for name in GUARANTEES if name in names and name not in holds]:
            self.close()
            raise RuntimeError(
                f"the code tool cannot protect {' and '.join(missing)} on this machine (kernel {os.uname().release}), "
                "which its option `require` asks for; run it on a newer kernel, or require less"
            )
        return holds

    def close(self) -> None:
        """End the zygote and everything it runs; later calls raise."""
        with self._lock:
            self._closed = True
            if self._zygote:
                self._drop(self._zygote)

    def _running(self) -> _Zygote:
        with self._lock:
            if self._closed:
                raise RuntimeError("the code tool is closed")
            if self._zygote and self._zygote.greeted and self._zygote.process.poll() is not None:
                self._drop(self._zygote)
            zygote = self._zygote = self._zygote or _Zygote()
            if not zygote.greeted:
                try:
                    zygote.greet()
                except RuntimeError:
                    self._drop(zygote)
                    raise
            return zygote

    def _drop(self, zygote: _Zygote) -> None:
        zygote.close()
        if self._zygote is zygote:
            self._zygote = None

    def _lost(self, zygote: _Zygote, why: str) -> RuntimeError:
        with self._lock:
            zygote.process.kill()
            self._drop(zygote)
        return RuntimeError(f"the code tool's zygote {why}; the next call starts another")

    def _talk(self, zygote: _Zygote, request: bytes, timeout_s: float, max_bytes: int) -> Reply:
        conversation, child_conversation = socket.socketpair()
        status, zygote_status = socket.socketpair()
        output, child_output = os.pipe()
        with conversation, status, open(output, "rb", buffering=0):
            theirs = [child_conversation.fileno(), child_output, zygote_status.fileno()]
            try:
                with child_conversation, zygote_status, open(child_output, "wb", buffering=0):
                    socket.send_fds(zygote.control, [b"call"], theirs)
                conversation.settimeout(_CHILD_S)
                with suppress(ConnectionError):  # the child has ended: its status will say how
                    conversation.sendall(FRAME.pack(b"R", len(request)) + request)
            except OSError as error:
                raise self._lost(zygote, f"takes no calls ({error})") from error
            conversation.setblocking(False)
            os.set_blocking(output, False)
            reply = _read(conversation, output, status, timeout_s, max_bytes)
        if reply.exit_code is None:
            raise self._lost(zygote, "does not end a call" if reply.stopped else "died")
        return reply


def _read(conversation: socket.socket, output: int, status: socket.socket, timeout_s: float, max_bytes: int) -> Reply:
    """Read a child until its wait status comes; kill it when it is late or sends too much."""
    reply, running, deadline = Reply(), False, time.monotonic() + _CHILD_S
    with selectors.DefaultSelector() as ready:
        for source in (conversation, output, status):
            ready.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select(max(0.0, deadline - time.monotonic())):
                data = _receive(key.fd)
                if key.fileobj is status:
                    if data:
                        status_, reply.cpu_s = _STATUS.unpack(data)
                        reply.exit_code = os.waitstatus_to_exitcode(status_)
                    for fd in (conversation.fileno(), output):  # what it sent before it ended
                        while data := _receive(fd):
                            reply.add(data, printed=fd == output)
                    return reply
                if not data:
                    ready.unregister(key.fileobj)
                reply.add(data, printed=key.fileobj is output)
            late = time.monotonic() >= deadline
            if reply.stopped:
                if late:
                    return reply
            elif late or len(reply.frames) > max_bytes:
                reply.stopped = "time" if late else "size"
                status.shutdown(socket.SHUT_WR)  # the zygote kills the child
                deadline = time.monotonic() + _END_S
            elif reply.confined and not running:
                running, deadline = True, time.monotonic() + timeout_s


def _receive(fd: int) -> bytes:
    """What there is to read, b"" at the end or if there is nothing."""
    try:
        return os.read(fd, 1 << 16)
    except (BlockingIOError, ConnectionError):
        return b""


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # folders in folders in folders
        subprocess.run(["rm", "-rf", "--", folder], check=False)
