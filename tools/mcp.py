"""A tool of an MCP server, named in a config by the command that starts the server or by its URL.

The server's list of tools gives the contract: the agent's prompt has its description and parameters. The connection
lives in a thread of its own. When the server dies or does not answer, that call is infrastructure, and the next one
starts or asks the server anew.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import textwrap
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mcp import Client, MCPError, StdioServerParameters
from mcp_types import CONNECTION_CLOSED, CallToolResult, ImageContent, TextContent
from mcp_types import Tool as Listed

from agent.spec import ToolSpec
from replay.record import Blob
from tools.base import CallFailed, ToolResult
from tools.picture import Unreadable, decode, encode

T = TypeVar("T")

_START_S = 60.0  # a server must be up and have told its tools by then
_CLOSE_S = 10.0
_MOST_TOOLS = 1000
_WHEN, _QUOTED = 300, 500  # characters of a description in the prompt, and of what the server said in a reason
_KINDS: dict[str, type] = {"string": str, "integer": int}


class McpTool:
    """One tool of an MCP server. Calls may come from several threads.

    Args:
        tool: its name on the server.
        command: starts a server that speaks over its standard input and output. It sees PATH, HOME and the like.
        url: of a server that speaks streamable HTTP; either this or `command`.
        env: names of environment variables that the command sees besides, for its keys.
        timeout_s: of one call.

    Raises:
        ValueError: an option is missing or wrong.
    """

    def __init__(
        self,
        tool: str,
        command: Sequence[str] = (),
        url: str = "",
        env: Sequence[str] = (),
        timeout_s: float = 60.0,
    ) -> None:
        self._server, self._tool, self._timeout_s = _server(command, url, env), tool, timeout_s
        self._where = urlsplit(url).hostname if url else os.path.basename(command[-1])
        self._link: _Link | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=f"mcp {tool}", daemon=True).start()

    @classmethod
    def describe(cls, **options: Any) -> ToolSpec:
        """Ask the server for the tool's contract, once a process.

        Raises:
            LookupError: it has no such tool.
            ValueError: the tool needs a parameter that is neither text nor an integer.
            RuntimeError: the server does not start, or does not answer.
        """
        return _described(json.dumps(options, sort_keys=True))

    @property
    def spec(self) -> ToolSpec:
        return self._ask(self._listed, _START_S)

    def run(self, params: Mapping[str, Any], images: Sequence[Blob] = ()) -> ToolResult:
        """Call the tool; provenance: `maker`, `source`, and as `caption` what the server said beside its pictures.

        Raises:
            CallFailed: the server calls it an error, or gives no picture.
            RuntimeError: the server is gone, does not answer in time, or gives a broken picture.
        """
        name, result = self._ask(lambda client: self._called(client, params), self._timeout_s)
        said = "\n".join(c.text for c in result.content if isinstance(c, TextContent)).strip()[:_QUOTED]
        if result.is_error:
            raise CallFailed(said or "the tool failed and gave no reason")
        pictures = tuple(_picture(c) for c in result.content if isinstance(c, ImageContent))
        if not pictures:
            raise CallFailed(f"the tool made no picture{f'; it said: {said}' if said else ''}")
        facts = {"maker": name, "source": self._where, "caption": said}
        return ToolResult(pictures, {key: value for key, value in facts.items() if value})

    def close(self) -> None:
        """End the connection, and with it a server that a command started."""

        async def end() -> None:
            if self._link is not None:
                await self._link.end()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(_CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _called(self, client: Client, params: Mapping[str, Any]) -> tuple[str, CallToolResult]:
        result = await client.call_tool(self._tool, dict(params))
        return client.server_info.name if client.server_info else self._tool, result

    async def _listed(self, client: Client) -> ToolSpec:
        found: list[Listed] = []
        cursor = None
        while len(found) < _MOST_TOOLS:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            if not (cursor := page.next_cursor):
                break
        listed = next((t for t in found if t.name == self._tool), None)
        if listed is None:
            raise LookupError(f"the MCP server has no tool {self._tool!r}: it has {', '.join(t.name for t in found)}")
        return _spec(listed)

    def _ask(self, question: Callable[[Client], Awaitable[T]], timeout_s: float) -> T:
        return asyncio.run_coroutine_threadsafe(self._answer(question, timeout_s), self._loop).result()

    async def _answer(self, question: Callable[[Client], Awaitable[T]], timeout_s: float) -> T:
        """Ask over the connection, which is made where there is none; one that failed is given up."""
        if self._link is None or self._link.ended:
            self._link = _Link(self._server)
        link = self._link
        try:
            async with asyncio.timeout(timeout_s):
                return await question(await link.client)
        except TimeoutError:
            problem = f"did not answer in {timeout_s:g} s"
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:  # the server lives, and says what is wrong
                raise RuntimeError(f"the MCP server of {self._tool!r} refused: {error}") from error
            problem = "ended"
        except (OSError, EOFError, ExceptionGroup) as error:
            problem = f"cannot be reached: {_first(error)}"
        await link.end()
        raise RuntimeError(f"the MCP server of {self._tool!r} {problem}")


class _Link:
    """A connection to a server, held open by a task of its own, as the client wants it."""

    def __init__(self, server: StdioServerParameters | str) -> None:
        self._open: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._over = asyncio.Event()
        self._task = asyncio.create_task(self._live(server))

    @property
    def client(self) -> Awaitable[Client]:
        """Once it is connected; raises what went wrong."""
        return asyncio.shield(self._open)

    @property
    def ended(self) -> bool:
        return self._over.is_set() or self._task.done()

    async def end(self) -> None:
        self._over.set()
        if not self._open.done():
            self._task.cancel()
        await asyncio.wait({self._task}, timeout=_CLOSE_S)

    async def _live(self, server: StdioServerParameters | str) -> None:
        try:
            async with Client(server) as client:
                self._open.set_result(client)
                await self._over.wait()
        except BaseException as error:  # of any kind: whoever waits for the connection is told
            if self._open.done():
                return
            self._open.set_exception(
                EOFError("it was given up") if isinstance(error, asyncio.CancelledError) else error
            )
            self._open.exception()  # nobody may be waiting for it any more


@cache
def _described(options: str) -> ToolSpec:
    tool = McpTool(**json.loads(options))
    try:
        return tool.spec
    finally:
        tool.close()


def _server(command: Sequence[str], url: str, env: Sequence[str]) -> StdioServerParameters | str:
    if bool(command) == bool(url):
        raise ValueError("an mcp tool needs `command` (a list that starts the server) or `url`, and not both")
    if url:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url of an mcp tool must be http:// or https://, not {url!r}")
        return url
    if isinstance(command, str):
        raise ValueError("command of an mcp tool must be a list, as [python, server.py]")
    if missing := [name for name in env if name not in os.environ]:
        raise ValueError(f"env of an mcp tool names {', '.join(missing)}, which the environment does not have")
    return StdioServerParameters(
        command=command[0], args=list(command[1:]), env={name: os.environ[name] for name in env}
    )


def _spec(listed: Listed) -> ToolSpec:
    """Its text and integer parameters; optional ones of other types keep the server's defaults."""
    schema = listed.input_schema
    kinds = {name: _KINDS.get(str(p.get("type"))) for name, p in schema.get("properties", {}).items()}
    if wrong := [name for name in schema.get("required", []) if kinds.get(name) is None]:
        raise ValueError(
            f"the MCP tool {listed.name!r} needs {', '.join(wrong)}, which is neither text nor an integer: "
            "the agent cannot call it"
        )
    words = (listed.description or listed.title or listed.name).replace("<imgen>", "").replace("</imgen>", "")
    when = textwrap.shorten(words, _WHEN, placeholder=" ...").rstrip(".")
    return ToolSpec(listed.name, {name: kind for name, kind in kinds.items() if kind}, when)


def _picture(content: ImageContent) -> Blob:
    try:
        return Blob(encode(decode(base64.b64decode(content.data, validate=True))))
    except (ValueError, Unreadable) as error:
        raise RuntimeError(f"a picture of the MCP server {error}") from error


def _first(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
