"""Reads compiled Qt resource files (`.rcc`): GCompris keeps its pictures in them.

Format: `qtbase/src/tools/rcc/rcc.cpp`: a header, a tree of nodes, names in UTF-16 and length-prefixed data.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

COMPRESSED, FOLDER, ZSTD = 1, 2, 4


def read(path: Path) -> dict[str, bytes]:
    """All files of one resource, by their path inside.

    Raises:
        ValueError: it is no resource, or is packed in a way that this reader does not know.
    """
    data = path.read_bytes()
    if data[:4] != b"qres":
        raise ValueError(f"{path}: not a compiled Qt resource")
    return dict(_Reader(data).files(0, ""))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        version, self.tree, self.contents, self.names = struct.unpack(">4I", data[4:20])
        self.node_size = 22 if version >= 2 else 14

    def files(self, node: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        at = self.tree + node * self.node_size
        name, flags = struct.unpack(">IH", self.data[at : at + 6])
        path = prefix + self._name(name) if node else ""
        if flags & FOLDER:
            count, first = struct.unpack(">II", self.data[at + 6 : at + 14])
            for child in range(first, first + count):
                yield from self.files(child, f"{path}/" if path else "")
        else:
            yield path, self._content(flags, *struct.unpack(">I", self.data[at + 10 : at + 14]))

    def _name(self, offset: int) -> str:
        at = self.names + offset
        (length,) = struct.unpack(">H", self.data[at : at + 2])
        return self.data[at + 6 : at + 6 + 2 * length].decode("utf-16-be")

    def _content(self, flags: int, offset: int) -> bytes:
        at = self.contents + offset
        (length,) = struct.unpack(">I", self.data[at : at + 4])
        content = self.data[at + 4 : at + 4 + length]
        if flags & ZSTD:
            raise ValueError("the resource is packed with zstd")
        return zlib.decompress(content[4:]) if flags & COMPRESSED else content
