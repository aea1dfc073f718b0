"""The zygote of the code tool: a process with the plotting libraries imported that forks one child a call.

Run by its path (`python zygote.py CONTROL_FD HOME`), so that nothing of this project's is imported: it has one thread
and an environment of its own. `tools.code` sends, for each call, one message on the control socket with three file
descriptors: the *conversation* with the child, the *output* for whatever the code prints, and the *status* socket.
The child reads a request from the conversation and answers in frames; the zygote keeps the status socket and sends
the child's wait status when it has ended. When the other end of a status socket closes, its child is killed; when the
control socket closes, all are, and the zygote removes HOME and ends.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import io
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

FRAME = struct.Struct("!cI")  # kind, length of what follows
CONFINED, FIGURE, FAILED, DONE = b"C", b"F", b"E", b"D"
SOURCE = "<code>"
MAX_REASON = 400  # characters
MAX_FILE_BYTES = 64 << 20
# Room for both axes' labels in a small figure: matplotlib's own margins are made for 6.4 x 4.8 inches.
MARGINS = {"figure.subplot.left": 0.15, "figure.subplot.right": 0.96, "figure.subplot.bottom": 0.18}

jail = types.SimpleNamespace(**runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "jail.py")))


@dataclass(frozen=True)
class Child:
    pid: int
    pidfd: int
    status: socket.socket


class Zygote:
    """Forks children on request and reports how each ended."""

    def __init__(self, control: socket.socket, readable: list[str]):
        self.control = control
        self.readable = readable
        self.ready = selectors.DefaultSelector()
        self.ready.register(control, selectors.EVENT_READ, self.fork)
        self.children: dict[int, Child] = {}
        self.closed = False

    def serve(self) -> None:
        """Serve until the control socket closes; then end all children."""
        while not self.closed:
            for key, _ in self.ready.select():
                key.data()
        for child in list(self.children.values()):
            self.kill(child)
            self.reap(child)

    def fork(self) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(self.control, 16, 3)
        except ConnectionError:  # the owner died, or closed before it had read all
            message = b""
        if not message:
            self.closed = True
            return
        conversation, output, status = fds
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # out of memory or processes: the caller reads the end of a status that never came
            for fd in fds:
                os.close(fd)
            return
        if pid == 0:
            self.become_child(zygote, conversation, output, status)
        os.close(conversation)
        os.close(output)
        child = Child(pid, os.pidfd_open(pid), socket.socket(fileno=status))
        self.children[pid] = child
        self.ready.register(child.pidfd, selectors.EVENT_READ, functools.partial(self.reap, child))
        self.ready.register(child.status, selectors.EVENT_READ, functools.partial(self.kill, child))

    def kill(self, child: Child) -> None:
        if child.pid in self.children:
            with contextlib.suppress(KeyError):
                self.ready.unregister(child.status)
            os.kill(child.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # its session does not exist yet
                os.killpg(child.pid, signal.SIGKILL)

    def reap(self, child: Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        del self.children[child.pid]
        self.ready.unregister(child.pidfd)
        os.close(child.pidfd)
        with contextlib.suppress(KeyError):
            self.ready.unregister(child.status)
        with child.status, contextlib.suppress(OSError):  # the caller may have gone
            child.status.send(struct.pack("!i", status))

    def become_child(self, zygote: int, conversation: int, output: int, status: int) -> NoReturn:
        """Let go of what is the zygote's, and run one request. Exit status 1: the sandbox could not be made."""
        try:
            os.setsid()
            jail.die_with_parent(zygote)
            self.ready.close()
            self.control.close()
            os.close(status)
            for child in self.children.values():
                os.close(child.pidfd)
                child.status.close()
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            run_request(socket.socket(fileno=conversation), self.readable)
            os._exit(0)
        except BaseException as error:  # whatever it is must not return into the zygote's loop
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)


def run_request(conversation: socket.socket, readable: list[str]) -> None:
    """Read a request, confine this process, run the code and send its figures."""
    size = FRAME.unpack(conversation.recv(FRAME.size, socket.MSG_WAITALL))[1]
    request = json.loads(conversation.recv(size, socket.MSG_WAITALL))
    prepare(request)
    jail.limit(_address_space() + (request["memory_mib"] << 20), request["cpu_s"], MAX_FILE_BYTES)
    jail.confine(readable, request["cwd"])

    def send(kind: bytes, payload: bytes = b"") -> None:
        conversation.sendall(FRAME.pack(kind, len(payload)) + payload)

    send(CONFINED)
    failure = run_code(request["code"]) or send_figures(send, request)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the code may have replaced or closed them
            stream.flush()
    if failure:
        send(FAILED, " ".join(failure.split())[:MAX_REASON].encode("utf-8", "replace"))


def prepare(request: dict[str, Any]) -> None:
    """What the code finds: its folder, its streams, default figure size, seeds, and harmless show and savefig."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, this one goes first
    os.chdir(request["cwd"])
    tempfile.tempdir = os.environ["HOME"] = request["cwd"]
    sys.argv = [SOURCE]
    sys.stdout, sys.stderr = _stream(1), _stream(2)
    plt.rcParams.update({"figure.figsize": request["figsize"], "figure.dpi": request["dpi"], **MARGINS})
    random.seed(0)
    np.random.seed(0)
    seeded = np.random.default_rng
    np.random.default_rng = lambda seed=None: seeded(0 if seed is None else seed)
    figures: Any = Figure
    plt.show = figures.show = lambda *args, **kwargs: None
    save = figures.savefig

    def savefig(figure: Figure, fname: Any, *args: Any, **kwargs: Any) -> None:
        """Whatever folder the code names, the file goes into the one it has."""
        named = isinstance(fname, str | os.PathLike)
        save(figure, os.path.basename(os.fspath(fname)) if named else fname, *args, **kwargs)

    figures.savefig = savefig


def _stream(fd: int) -> io.TextIOWrapper:
    """Standard output or error, for which half a surrogate pair is no reason to fail."""
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(fd, "w", closefd=False)), errors="backslashreplace")


def run_code(code: str) -> str:
    """Run the code as the main module; the reason of its failure, "" if it has none."""
    try:
        compiled = compile(code, SOURCE, "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"line {error.lineno or 1}: {type(error).__name__}: {error.msg}"
    except (ValueError, MemoryError, RecursionError) as error:  # null bytes, surrogates, endless nesting
        return f"line 1: {type(error).__name__}: {error}"
    main = types.ModuleType("__main__")
    vars(main).update(plt=plt, pd=pd, sns=sns, np=np, __builtins__=builtins)
    sys.modules["__main__"] = main
    try:
        exec(compiled, vars(main))
    except SystemExit as error:
        return "" if error.code in (None, 0) else describe(error)
    except BaseException as error:  # KeyboardInterrupt and the like are the code's own doing too
        return describe(error)
    return ""


def describe(error: BaseException) -> str:
    """`line 3: ZeroDivisionError: division by zero`, with the line of the code that was running."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == SOURCE:
            line = step.tb_lineno
        step = step.tb_next
    return f"line {line}: {type(error).__name__}: {error}".rstrip(": ")


def send_figures(send: Callable[..., None], request: dict[str, Any]) -> str:
    """Send the open figures in the order of their numbers, then their count; the reason if one cannot be drawn."""
    numbers = plt.get_fignums()
    for number in numbers[: request["max_figures"]]:
        figure = plt.figure(number)
        width, height = figure.get_size_inches() * request["dpi"]
        if not 1 <= width * height <= request["max_pixels"]:
            return f"figure {number} is {width:.0f} x {height:.0f} pixels: choose a smaller figsize"
        try:
            send(FIGURE, png(figure, request["dpi"]))
        except Exception as error:  # drawing runs the code's own objects: bad mathtext, locators, artists
            return f"figure {number} cannot be drawn: {type(error).__name__}: {error}".rstrip(": ")
    send(DONE, str(len(numbers)).encode())
    return ""


def png(figure: Figure, dpi: int) -> bytes:
    """The figure without metadata, so that the same code gives the same bytes.

    Where labels reach beyond an edge, the picture grows up to them, to twice the figure's size at most.
    """
    figure.set_dpi(dpi)
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    needed = Bbox.union([Bbox.from_extents(0, 0, width, height), figure.get_tightbbox()])
    growth = max(needed.width / width, needed.height / height)
    box = needed.padded(0.03) if 1.002 < growth < 2 else None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches=box, metadata={"Software": None})
    return buffer.getvalue()


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def warm_up() -> None:
    """Draw once what calls usually draw: fonts, layouts, backends and lazy imports are then there for every child."""
    data = pd.DataFrame({"kind": ["a", "b"], "value": [1.0, 2.0]})
    data.plot(x="kind", y="value", kind="bar", title="Title")
    sns.barplot(data, x="kind", y="value", ax=plt.subplots()[1])
    plt.figure()
    plt.plot(pd.to_datetime(["2024-01-01", "2024-01-02"]), [1, 2], label="line")
    plt.legend()
    for number in plt.get_fignums():
        png(plt.figure(number), 72)
    plt.close("all")
    Image.init()
    gc.collect()
    gc.freeze()  # what is shared with the children stays out of their collections, and is not copied


def installation() -> list[str]:
    """What code needs to read: Python, the libraries, fonts, time zones, and matplotlib's cache."""
    libraries = [os.path.dirname(os.path.dirname(str(m.__file__))) for m in (matplotlib, np, pd, sns)]
    system = ["/usr/lib", "/lib", "/lib64", "/usr/share", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"]
    own = [matplotlib.get_configdir(), matplotlib.get_cachedir()]
    return sorted({sys.prefix, sys.base_prefix, *libraries, *system, *own})


def main() -> None:
    warm_up()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        with contextlib.suppress(ConnectionError):  # the owner is gone already: serve() will see that
            control.send(json.dumps({"landlock": jail.landlock_abi()}).encode())
        Zygote(control, installation()).serve()
    shutil.rmtree(sys.argv[2], ignore_errors=True)


if __name__ == "__main__":
    main()
