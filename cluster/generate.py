"""`llmi generate`: one document in this process, with an engine and tools of its own and without Ray."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from actors.engine import Engine
from agent.answer import Document, write
from agent.export import file_name, to_json, to_markdown, to_page
from agent.prompt import system_prompt
from agent.render import Began, Ended, Event, Wrote
from cluster.config import Config, ConfigError
from cluster.servers import tool_specs
from replay.record import Blob
from replay.storage import storage
from tools.local import LocalTools

KINDS = (".html", ".md", ".json")
FORMATS = ("PNG", "JPEG", "WEBP")  # of the user's pictures


def generate(config: Config, folder: str, question: str, images: Sequence[Path], seed: int | None, out: Path) -> None:
    """Write one document to `out`, telling of it on the way.

    Raises:
        ConfigError: the prompt, a picture or `out` cannot be used.
    """
    if not question.strip():
        raise ConfigError("the prompt is blank: say what the document is to be about")
    if out.suffix not in KINDS:
        raise ConfigError(f"{out} has no kind that can be written: end it in {', '.join(KINDS)}")
    given = [read_picture(path) for path in images]
    document = asyncio.run(_generate(config, folder, question, given, seed))
    for path in save(document, out):
        print(f"wrote {path}")


def read_picture(path: Path) -> Blob:
    """A picture of the user's. Raises ConfigError if it is none."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return Blob(data, Image.MIME[str(image.format)])
    except OSError as error:
        raise ConfigError(f"--image {path}: no {', '.join(FORMATS)} picture that can be read ({error})") from error
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        raise ConfigError(f"--image {path}: damaged ({error})") from error


def save(document: Document, out: Path) -> list[Path]:
    """Write a document as the kind that `out` ends in; returns what was written, `out` first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [out]
    if out.suffix == ".md":
        folder = out.with_name(f"{out.stem}.images")
        text = to_markdown(document, lambda blob: f"{folder.name}/{file_name(_write(blob, folder))}")
        written += [folder] if folder.exists() else []
    elif out.suffix == ".json":
        text = json.dumps(to_json(document), indent=2, ensure_ascii=False) + "\n"
    else:
        text = to_page(document)
    storage(str(out.parent)).replace(out.name, text.encode(errors="replace"))
    return written


def _write(blob: Blob, folder: Path) -> Blob:
    folder.mkdir(exist_ok=True)
    (folder / file_name(blob)).write_bytes(blob.data)
    return blob


async def _generate(config: Config, folder: str, question: str, given: Sequence[Blob], seed: int | None) -> Document:
    specs, c = tool_specs(config), config.rollout
    engine: Engine | None = None
    try:
        with quiet():
            engine = Engine(folder, 0, c.engine)
            await engine.start()
        system = system_prompt(specs) if config.policy.system_prompt == "protocol" else ""
        sampling = {"max_tokens": c.max_tokens, "temperature": c.temperature, "top_p": c.top_p, "seed": seed}
        stream = engine.stream(uuid.uuid4().hex, engine.prompt_ids(question, system), sampling)
        pieces = (piece.text async for piece in stream)
        with LocalTools({n: (t.use or n, t.options, t.timeout_s) for n, t in config.tools.items()}) as tools:
            return await write(question, pieces, given, tools.run, specs, config.render.document_s, Told().tell)
    finally:
        if engine is not None:
            engine.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what this process and its children write to stderr to itself, unless the block raises.

    Engines are talkative when they start, and their processes keep the stderr that they were started with.
    """
    with tempfile.TemporaryFile() as told, open(os.dup(2), "wb") as before:
        os.dup2(told.fileno(), 2)
        try:
            yield
        except BaseException:
            told.seek(0)
            before.write(told.read())
            raise
        finally:
            os.dup2(before.fileno(), 2)


class Told:
    """Shows a document on a terminal as it is written: its text, with a line for each call that begins and ends."""

    def __init__(self) -> None:
        self._text, self._shown = "", 0
        self._names: dict[int, str] = {}

    def tell(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Wrote):
            self._text += event.text
            opened = self._text.find("<", self._shown)  # from there on it may be a tag
            self._show(opened if opened >= 0 else len(self._text))
        elif isinstance(event, Began):
            self._show(event.start)
            self._names[event.index] = f"{event.source}: {event.description}"
            self._line(f"[{event.index + 1}] {self._names[event.index]} ...")
            self._shown = event.end
        elif isinstance(event, Ended):
            done = event.outcome
            name = self._names.get(event.index, "a tag")
            said = f"done in {done.seconds:.1f} s" if done.status == "ok" else f"{done.status}: {done.reason}"
            self._line(f"[{event.index + 1}] {name} {said}")
            if done.status == "invalid":
                self._shown = max(self._shown, done.end)

    def _show(self, end: int) -> None:
        print(self._text[self._shown : end], end="", flush=True)
        self._shown = max(end, self._shown)

    def _line(self, said: str) -> None:
        print(("" if self._text[: self._shown].endswith("\n") else "\n") + said, file=sys.stderr, flush=True)
