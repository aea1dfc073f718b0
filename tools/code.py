"""The `code` tool: runs model-written plotting code in a jailed process of its own and returns its figures.

Each call is a child of a warm zygote (tools/sandbox.py, tools/zygote.py), confined by tools/jail.py, in a folder of
its own that is deleted afterwards. Nothing of this process's environment reaches it. Whatever the code does (raise,
loop, flood, crash, end its process) fails that call and no other. The same code gives the same bytes.
"""

from __future__ import annotations

import logging
import signal
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.spec import PUBLISHED
from replay.record import Blob
from tools.base import CallFailed, ToolResult
from tools.sandbox import FRAME, Reply, Sandbox

_MAX_CODE = 256 << 10  # characters
_MAX_PIXELS = 16_000_000  # a figure
_MAX_REASON = 400  # characters, as in tools/zygote.py: what comes may be the code's own doing
_MAX_WARNING, _MOST_WARNINGS = 200, 16  # characters, and sentences
#: The least that is asked of a machine; seccomp and limits are always there, or no code is run.
REQUIRED = ("files", "network", "processes")
_log = logging.getLogger(__name__)


class CodeTool:
    """Draws with matplotlib code. `run` may be called from several threads at once.

    Args:
        timeout_s: wall time of one call, from its first line of code to its last figure.
        memory_mib: address space of one call beyond that of the imported libraries.
        dpi: dots per inch of every figure, whatever the code asks for.
        figsize: width and height in inches of a figure for which the code asks for none.
        max_figures: figures returned by one call, in the order of their numbers; further ones are left out.
        max_output_bytes: encoded size of all figures of one call.
        require: what must be out of the code's reach, or the tool refuses to start (`tools.sandbox.GUARANTEES`).

    Attributes:
        guarantees: which of them hold on this machine.
    """

    spec = PUBLISHED["code"]

    def __init__(
        self,
        timeout_s: float = 10,
        memory_mib: int = 1024,
        dpi: int = 72,
        figsize: tuple[float, float] = (4.8, 3.2),
        max_figures: int = 8,
        max_output_bytes: int = 32 << 20,
        require: Sequence[str] = REQUIRED,
    ):
        self._timeout_s, self._memory_mib, self._max_bytes = timeout_s, memory_mib, max_output_bytes
        self._max_figures = max_figures
        self._options = {
            "memory_mib": memory_mib,
            "cpu_s": int(timeout_s) + 2,  # of all its threads; one thread is stopped by the wall time before
            "dpi": dpi,
            "figsize": figsize,
            "max_figures": max_figures,
            "max_pixels": _MAX_PIXELS // 4,  # a figure grows to fourfold at most, if its labels need it
        }
        self._sandbox = Sandbox()
        self.guarantees = self._sandbox.require(require)
        _log.info("the code tool holds: %s", ", ".join(sorted(self.guarantees)))

    def run(self, params: Mapping[str, Any], images: Sequence[Blob] = ()) -> ToolResult:
        """Run `params["code"]` and return its open figures as PNG; provenance: `maker`, `figures`,
        `left_out` if any were, and `warnings` of what a reader would stumble over.

        Raises:
            CallFailed: the code failed; the reason names its line and the error.
            RuntimeError: the sandbox failed, or is closed.
        """
        code = params["code"]
        if len(code) > _MAX_CODE:
            raise CallFailed(f"the code is {len(code)} characters long: at most {_MAX_CODE} are run")
        reply = self._sandbox.call({**self._options, "code": code}, self._timeout_s, self._max_bytes)
        answer = self._answer(reply)
        provenance: dict[str, Any] = {"maker": "matplotlib", "figures": len(answer.figures)}
        if (left_out := (answer.drawn or 0) - len(answer.figures)) > 0:
            provenance["left_out"] = left_out
        if answer.warnings:
            provenance["warnings"] = answer.warnings
        return ToolResult(tuple(Blob(f) for f in answer.figures), provenance)

    def check(self) -> None:
        """Raises RuntimeError if not even a trivial chart can be drawn any more."""
        try:
            self.run({"code": "plt.plot([0, 1])"})
        except CallFailed as failed:
            raise RuntimeError(f"the code tool cannot draw a line: {failed}") from failed

    def close(self) -> None:
        """End the zygote and everything it runs; later calls raise."""
        self._sandbox.close()

    def _answer(self, reply: Reply) -> Answer:
        if reply.stopped == "time":
            raise CallFailed(f"the code ran longer than {self._timeout_s:g} s and was stopped")
        if reply.stopped == "size":
            raise CallFailed(f"the figures take more than {self._max_bytes / 2**20:g} MiB: draw fewer or smaller ones")
        try:
            answer = parse(reply.frames, self._max_figures)
        except ValueError as error:
            raise CallFailed(f"the code wrote into the channel that carries its figures ({error})") from error
        if reason := answer.reason:
            raise CallFailed(f"{reason} (the limit is {self._memory_mib} MiB)" if "MemoryError" in reason else reason)
        if answer.drawn is None:
            raise CallFailed(f"{_ending(reply.exit_code or 0)}{_quote(reply)}")
        if not answer.figures:
            raise CallFailed(f"the code drew no figure, or closed it{_quote(reply)}")
        return answer


@dataclass
class Answer:
    """What a child said: its figures, why it failed, how many figures it drew (None: not told), and what is wrong with
    them.
    """

    figures: list[bytes] = field(default_factory=list)
    reason: str = ""
    drawn: int | None = None
    warnings: list[str] = field(default_factory=list)


def parse(frames: bytes | bytearray, most: int = 8) -> Answer:
    """Read a child's frames, which the code in it may have written itself.

    Args:
        most: figures that there may be.

    Raises:
        ValueError: they are not what the zygote writes.
    """
    answer, at = Answer(), 0
    while at < len(frames):
        if at + FRAME.size > len(frames):
            raise ValueError("half a frame")
        kind, size = FRAME.unpack_from(frames, at)
        at += FRAME.size + size
        payload = bytes(frames[at - size : at])
        if kind not in b"CFEWD" or at > len(frames):
            raise ValueError(f"unknown frame {kind!r}" if kind not in b"CFEWD" else "half a frame")
        if kind == b"F":
            if len(answer.figures) == most:
                raise ValueError(f"more than {most} figures")
            _check_png(payload)
            answer.figures.append(payload)
        elif kind == b"E":
            answer.reason = payload[: 4 * _MAX_REASON].decode(errors="replace")[:_MAX_REASON]
        elif kind == b"W" and len(answer.warnings) < _MOST_WARNINGS:
            answer.warnings.append(payload.decode()[:_MAX_WARNING])
        elif kind == b"D":
            answer.drawn = int(payload)
    return answer


#: What matplotlib's pictures consist of, and how many channels each colour type has.
_CHUNKS, _CHANNELS = (b"IHDR", b"PLTE", b"tRNS", b"pHYs", b"IDAT", b"IEND"), {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_CHUNK = struct.Struct("!I4s")


def _check_png(data: bytes) -> None:
    """A PNG of pixels and nothing else: whole, without text, profile or anything behind its end, and no bomb."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("a figure is not a PNG")
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data) and b"IEND" not in chunks:
        if len(data) < at + _CHUNK.size + 4:
            raise ValueError("a figure is half a PNG")
        size, kind = _CHUNK.unpack_from(data, at)
        end = at + _CHUNK.size + size
        if kind not in _CHUNKS or data[end : end + 4] != struct.pack("!I", zlib.crc32(data[at + 4 : end])):
            raise ValueError("a figure holds more than a picture, or a broken one")
        chunks[kind] = chunks.get(kind, b"") + data[at + _CHUNK.size : end]
        at = end + 4
    if b"IEND" not in chunks or at != len(data) or len(chunks.get(b"IHDR", b"")) != 13:
        raise ValueError("a figure does not end where it should")
    width, height, depth, colour, *_, interlaced = struct.unpack("!IIBBBBB", chunks[b"IHDR"])
    if not 0 < width * height <= _MAX_PIXELS:
        raise ValueError(f"a figure of {width} x {height} pixels")
    wanted = height * (1 + (width * _CHANNELS.get(colour, 0) * depth + 7) // 8)
    unpacking = zlib.decompressobj()
    try:
        unpacked = len(unpacking.decompress(chunks.get(b"IDAT", b""), wanted + 1))
    except zlib.error as error:
        raise ValueError("a figure's pixels are broken") from error
    if interlaced or unpacked != wanted:
        raise ValueError("a figure has more or fewer pixels than it says")


def _ending(exit_code: int) -> str:
    if exit_code == -signal.SIGXCPU:
        return "the code used too much CPU time and was stopped"
    if exit_code < 0:
        return f"the code's process was ended by a signal ({signal.strsignal(-exit_code)})"
    return f"the code ended its process (exit status {exit_code}) before its figures were saved"


def _quote(reply: Reply) -> str:
    printed = reply.printed.decode(errors="replace").strip()[-300:]
    return f"; it printed: {printed}" if printed else ""
