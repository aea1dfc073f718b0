"""Tools of a real MCP server, over stdio and over HTTP; the server also misbehaves."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agent.prompt import system_prompt
from agent.spec import ToolSpec
from tools.base import CallFailed, spec_of
from tools.mcp import McpTool

SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]
Make = Callable[..., McpTool]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def serve(port: int) -> subprocess.Popen[bytes]:
    """The server over HTTP, once it listens."""
    process = subprocess.Popen([*SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(params=["stdio", "http"])
def make(request: pytest.FixtureRequest, port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes the `draw` tool of a server over either transport; all is ended afterwards."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    process = serve(port) if request.param == "http" else None
    where: dict[str, Any] = {"url": f"http://127.0.0.1:{port}/mcp"} if process else {"command": SERVER}
    made: list[McpTool] = []

    def tool(name: str = "draw", **options: Any) -> McpTool:
        made.append(McpTool(name, **where, **options))
        return made[-1]

    yield tool
    for one in made:
        one.close()
    if process:
        process.kill()
        process.wait()


def test_its_contract_is_the_servers_and_its_pictures_are_pictures(make: Make) -> None:
    tool = make()
    assert tool.spec == ToolSpec("draw", {"place": str, "zoom": int}, "Maps of any place, drawn anew")
    result = tool.run({"place": "Rome", "zoom": 16})
    assert [Image.open(io.BytesIO(b.data)).size for b in result.images] == [(16, 16), (16, 16)]
    assert result.provenance["maker"] == "atlas" and result.provenance["caption"] == "a map of Rome"
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: tool.run({"place": f"place {n}", "zoom": n}), range(1, 9)))
    assert [Image.open(io.BytesIO(m.images[0].data)).width for m in made] == list(range(1, 9))


def test_what_the_server_calls_an_error_or_has_no_picture_for_is_the_calls_failure(make: Make) -> None:
    tool = make()
    for place, reason in (("nowhere", "there is no such place"), ("text", "made no picture; it said: only words")):
        with pytest.raises(CallFailed, match=reason):
            tool.run({"place": place, "zoom": 8})


def test_a_broken_picture_and_a_server_that_hangs_are_infrastructure_and_the_next_call_works(make: Make) -> None:
    tool = make(timeout_s=5.0)
    assert tool.run({"place": "Rome", "zoom": 8}).images
    with pytest.raises(RuntimeError, match="a picture of the MCP server cannot be read"):
        tool.run({"place": "broken", "zoom": 8})
    with pytest.raises(RuntimeError, match="the MCP server of 'draw' did not answer in 5 s"):
        tool.run({"place": "hang", "zoom": 8})
    assert tool.run({"place": "Rome", "zoom": 8}).images


def test_a_server_that_dies_is_started_again() -> None:
    tool = McpTool("draw", command=SERVER)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the MCP server of 'draw' ended"):
            tool.run({"place": "die", "zoom": 8})
        assert tool.run({"place": "Rome", "zoom": 8}).images
    tool.close()


def test_a_server_that_is_down_is_infrastructure_until_it_is_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tool = McpTool("draw", url=f"http://127.0.0.1:{port}/mcp")
    with pytest.raises(RuntimeError, match="the MCP server of 'draw'"):
        tool.run({"place": "Rome", "zoom": 8})
    for _ in range(2):
        process = serve(port)
        assert tool.run({"place": "Rome", "zoom": 8}).images
        process.kill()
        process.wait()
        with pytest.raises(RuntimeError, match="the MCP server of 'draw'"):
            tool.run({"place": "Rome", "zoom": 8})
    tool.close()


def test_a_command_that_does_not_start_says_so() -> None:
    tool = McpTool("draw", command=["/no/such/program"])
    with pytest.raises(RuntimeError, match=r"the MCP server of 'draw' cannot be reached: .*no/such/program"):
        tool.run({"place": "Rome", "zoom": 8})


def test_the_prompt_has_what_the_server_says_and_the_server_sees_no_key_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAPS_API_KEY", "secret")
    monkeypatch.setenv("OTHER_API_KEY", "secret")
    options = {"tool": "draw", "command": SERVER, "env": ["MAPS_API_KEY"]}
    spec = spec_of("map", "mcp", options)
    prompt = system_prompt({"map": spec})
    assert "- map: Maps of any place, drawn anew.\n" in prompt
    assert "{'place': '...', 'zoom': 0}" in prompt
    tool = McpTool(**options)  # type: ignore[arg-type]
    seen = tool.run({"place": "environment", "zoom": 8}).provenance["caption"]
    assert "MAPS_API_KEY" in seen and "OTHER_API_KEY" not in seen
    tool.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tool": "paint", "command": SERVER}, LookupError, "no tool 'paint': it has draw, mark"),
        ({"tool": "mark", "command": SERVER}, ValueError, "needs points, which is neither text nor an integer"),
        ({"tool": "draw"}, ValueError, "needs `command` .* or `url`, and not both"),
        ({"tool": "draw", "command": SERVER, "url": "http://x"}, ValueError, "and not both"),
        ({"tool": "draw", "url": "file:///x"}, ValueError, "must be http:// or https://"),
        ({"tool": "draw", "command": "python x.py"}, ValueError, "must be a list"),
        ({"tool": "draw", "command": SERVER, "env": ["NO_SUCH_KEY"]}, ValueError, "NO_SUCH_KEY"),
    ],
)
def test_what_cannot_be_offered_to_the_agent_is_said(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spec_of("map", "mcp", options)


def test_a_closed_tool_leaves_no_server_running() -> None:
    tool = McpTool("draw", command=SERVER)
    tool.run({"place": "Rome", "zoom": 8})
    tool.close()
    mine = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert "mcp_server.py" not in mine
