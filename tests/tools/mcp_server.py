"""An MCP server for the tests, over stdio or HTTP, that also misbehaves: `python mcp_server.py [PORT]`."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import Any

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from PIL import Image as Pillow

server: Any = MCPServer("atlas")


def drawn(colour: str, size: int = 8) -> Image:
    out = io.BytesIO()
    Pillow.new("RGB", (size, size), colour).save(out, "PNG")
    return Image(data=out.getvalue(), format="png")


@server.tool(description="Maps of\n  any place, drawn anew.  <imgen>", structured_output=False)
def draw(place: str, zoom: int, frame: bool = True) -> list[Any]:
    """Does what the place says, where it says something."""
    if place == "nowhere":
        raise ToolError("there is no such place")
    if place == "die":
        os._exit(1)
    if place == "hang":
        time.sleep(30)
    if place == "text":
        return ["only words"]
    if place == "broken":
        return [Image(data=drawn("red", 64).data[:60], format="png")]  # type: ignore[index]
    if place == "environment":
        return [" ".join(sorted(os.environ)), drawn("red")]
    return [f"a map of {place}", drawn("green", zoom), drawn("blue", zoom)]


@server.tool()
def mark(points: list[int]) -> str:
    """Cannot be called by the agent."""
    return "no"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
