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
import warnings
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
STATUS = struct.Struct("!id")  # of a child that has ended: wait status, seconds of CPU time
CONFINED, FIGURE, FAILED, WARNING, DONE = b"C", b"F", b"E", b"W", b"D"
SOURCE = "<code>"
CALLS, ROOT = "calls", "root"  # folders in HOME: of the calls' folders, and where a new root is mounted
MAX_REASON = 400  # characters
MAX_FILE_BYTES = 64 << 20
# Room for both axes' labels in a small figure: matplotlib's own margins are made for 6.4 x 4.8 inches.
MARGINS = {"figure.subplot.left": 0.15, "figure.subplot.right": 0.96, "figure.subplot.bottom": 0.18}


def _beside(name: str) -> Any:
    """A module that lies beside this file: nothing of the project's is imported."""
    return types.SimpleNamespace(**runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), name)))


jail, namespaces = _beside("jail.py"), _beside("namespaces.py")
chart_check, fonts = _beside("chart_check.py"), _beside("fonts.py").Fallback()


@dataclass(frozen=True)
class Child:
    pid: int
    pidfd: int
    status: socket.socket


class Zygote:
    """Forks children on request and reports how each ended."""

    def __init__(self, control: socket.socket, readable: list[str], kinds: list[str]):
        self.control, self.readable, self.kinds = control, readable, kinds
        self.alive = os.pipe()  # as long as somebody writes to it
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
        try:
            pid = namespaces.fork(self.kinds)
        except OSError:  # out of memory or processes: the caller reads the end of a status that never came
            for fd in fds:
                os.close(fd)
            return
        if pid == 0:
            self.become_child(conversation, output)
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
        _, status, used = os.wait4(child.pid, 0)
        del self.children[child.pid]
        self.ready.unregister(child.pidfd)
        os.close(child.pidfd)
        with contextlib.suppress(KeyError):
            self.ready.unregister(child.status)
        with child.status, contextlib.suppress(OSError):  # the caller may have gone
            child.status.send(STATUS.pack(status, used.ru_utime + used.ru_stime))

    def become_child(self, conversation: int, output: int) -> NoReturn:
        """Let go of what is the zygote's, and run one request. Exit status 1: the sandbox could not be made."""
        try:
            os.setsid()
            os.close(self.alive[1])
            jail.die_with_parent(self.alive[0])
            self.ready.close()
            self.control.close()
            for child in self.children.values():
                child.status.close()
            os.dup2(output, 1)
            os.dup2(output, 2)
            keep_open({0, 1, 2, conversation})
            run_request(socket.socket(fileno=conversation), self.readable, self.kinds)
            os._exit(0)
        except BaseException as error:  # whatever it is must not return into the zygote's loop
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)


def keep_open(fds: set[int]) -> None:
    """Close all other file descriptors: some lead to the system outside."""
    first = 0
    for fd in sorted(fds):
        if first < fd:  # Python takes an empty range that begins at 0 for all there are
            os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 1 << 20)


def run_request(conversation: socket.socket, readable: list[str], kinds: list[str]) -> None:
    """Read a request, confine this process, run the code and send its figures."""
    size = FRAME.unpack(conversation.recv(FRAME.size, socket.MSG_WAITALL))[1]
    request = json.loads(conversation.recv(size, socket.MSG_WAITALL))
    request["cwd"] = namespaces.settle(kinds, request["cwd"])
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
            data, problems = png(figure, request["dpi"])
            send(FIGURE, data)
            for problem in problems:
                send(WARNING, (f"figure {number}: {problem}" if len(numbers) > 1 else problem).encode())
        except Exception as error:  # drawing runs the code's own objects: bad mathtext, locators, artists
            return f"figure {number} cannot be drawn: {type(error).__name__}: {error}".rstrip(": ")
    send(DONE, str(len(numbers)).encode())
    return ""


def png(figure: Figure, dpi: int) -> tuple[bytes, list[str]]:
    """The figure without metadata, so that the same code gives the same bytes; and what its reader would stumble over.

    Where labels reach beyond an edge, the picture grows up to them, to twice the figure's size at most.
    """
    figure.set_dpi(dpi)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        edges = figure.get_tightbbox()
        if fonts.extend(figure):
            told.clear()  # the glyphs that were missing until now
            edges = figure.get_tightbbox()
        needed = Bbox.union([Bbox.from_extents(0, 0, width, height), edges])
        growth = max(needed.width / width, needed.height / height)
        box = needed.padded(0.03) if 1.002 < growth < 2 else None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, bbox_inches=box, metadata={"Software": None})
    try:
        problems = chart_check.problems(figure, growth >= 2, [str(warning.message) for warning in told])
    except Exception:  # artists of the code's own; the chart is drawn, and may be good
        problems = []
    return buffer.getvalue(), problems


def _address_space() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # a process namespace whose /proc cannot be mounted
        return _LIBRARIES


_LIBRARIES = 2 << 30  # bytes of address space that they take, at most


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
    paths = {sys.prefix, sys.base_prefix, *libraries, *system, *own}
    return sorted(paths | {os.path.realpath(path) for path in paths})  # a cache may name either


def try_out(kinds: list[str], home: str, readable: list[str]) -> None:
    """Do what the zygote and a child do with namespaces of these kinds. Raises OSError where that does not work."""
    calls = os.path.join(home, CALLS)
    folder = tempfile.mkdtemp(dir=calls)
    namespaces.enter(kinds, os.path.join(home, ROOT), readable, calls)
    pid = namespaces.fork(kinds)
    if pid == 0:
        try:
            os.open(os.path.join(namespaces.settle(kinds, folder), "file"), os.O_CREAT)
            for module in (os, np):  # whose files may belong to a user who has no number in the new namespace
                os.open(str(module.__file__), os.O_RDONLY)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1] != 0:
        raise OSError("a child cannot work")


def held(zygote: Zygote, home: str) -> list[str]:
    """What of `files`, `network` and `processes` is out of a child's reach, found out by a child that tries."""
    folder = tempfile.mkdtemp(dir=os.path.join(home, CALLS))
    attempts: dict[str, list[Callable[[], Any]]] = {
        "files": [lambda: os.open("/etc/passwd", os.O_RDONLY), lambda: os.open(f"{home}/log", os.O_RDONLY)],
        "network": [socket.socket],
        "processes": [os.fork, lambda: os.kill(os.getppid(), 0)],
    }
    out = []
    for name, each in attempts.items():
        pid = namespaces.fork(zygote.kinds)
        if pid == 0:
            try:
                namespaces.settle(zygote.kinds, folder)
                jail.confine(zygote.readable, namespaces.FOLDER if "mount" in zygote.kinds else folder)
                os._exit(0 if all(map(_refused, each)) else 1)
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            out.append(name)
    return out


def _refused(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False


def main() -> None:
    warm_up()
    home, readable = sys.argv[2], installation()
    parent = os.open(os.path.dirname(home), os.O_PATH | os.O_DIRECTORY)  # is out of sight later
    kinds = namespaces.usable(lambda kinds: try_out(kinds, home, readable))
    namespaces.enter(kinds, os.path.join(home, ROOT), readable, os.path.join(home, CALLS))
    with socket.socket(fileno=int(sys.argv[1])) as control:
        zygote = Zygote(control, readable, kinds)
        hello = {"held": held(zygote, home), "namespaces": kinds, "landlock": jail.landlock_abi()}
        for left in os.scandir(os.path.join(home, CALLS)):  # by those who tried things out
            shutil.rmtree(left.path)
        with contextlib.suppress(ConnectionError):  # the owner is gone already: serve() will see that
            control.send(json.dumps(hello).encode())
        zygote.serve()
    shutil.rmtree(os.path.basename(home), ignore_errors=True, dir_fd=parent)


if __name__ == "__main__":
    main()
