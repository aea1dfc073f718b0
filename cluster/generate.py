"""`llmi generate`: one document in this process, with an engine and tools of its own and without Ray."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors.engine import Engine
from actors.writer import EngineWriter
from agent.answer import Document, Stage, events_of, write
from agent.export import file_name, to_json, to_markdown, to_page
from agent.prompt import system_prompt
from agent.render import Began, Ended, Event, Wrote
from agent.scaling import MOST, scaled
from agent.workshop import Workshop
from cluster.config import Config, ConfigError, JudgePool
from cluster.judge import EXAMPLE
from cluster.run_folder import CONFIG, RunFolder
from cluster.servers import judges, tool_specs
from replay.record import Blob
from replay.storage import in_bucket, storage
from rewards.base import Rendered, Verdict
from rewards.expected import Ask, Expected
from tools.base import imported
from tools.download import clean
from tools.fetch import Refused
from tools.local import LocalTools

KINDS = (".html", ".md", ".json")


def config_of(model: str) -> str | Path:
    """The config of the run that a policy comes from, if it lies beside it; else the example's."""
    local = Path(model).expanduser().absolute()
    run = RunFolder(model.rstrip("/").rpartition("/")[0] if in_bucket(model) else str(local.parent))
    return f"{run.url}/{CONFIG}" if run.has(CONFIG) else EXAMPLE


def generate(
    config: Config,
    folder: str,
    question: str,
    images: Sequence[Path],
    seed: int | None,
    scale: int,
    out: Path,
    told: str,
) -> None:
    """Write one document to `out`, telling of it on the way.

    Args:
        scale: how often anything may be tried (`agent.scaling`).
        told: what is said before it begins.

    Raises:
        ConfigError: the prompt, a picture, `scale` or `out` cannot be used.
    """
    if not question.strip():
        raise ConfigError("the prompt is blank: say what the document is to be about")
    if not 1 <= scale <= MOST:
        raise ConfigError(f"--scale is {scale}: give 1 to {MOST}")
    if out.suffix not in KINDS:
        raise ConfigError(f"{out} has no kind that can be written: end it in {', '.join(KINDS)}")
    given = [read_picture(path) for path in images]
    print(told, file=sys.stderr)
    document = asyncio.run(_generate(config, folder, question, given, seed, scale))
    for path in save(document, out):
        print(f"wrote {path}")


def read_picture(path: Path) -> Blob:
    """A picture of the user's, of which only the pixels are kept. Raises ConfigError if it is none."""
    try:
        return clean(path.read_bytes())
    except (OSError, Refused) as error:
        raise ConfigError(f"--image {path}: no picture that can be read ({error})") from error


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


async def _generate(
    config: Config, folder: str, question: str, given: Sequence[Blob], seed: int | None, scale: int
) -> Document:
    engine: Engine | None = None
    try:
        with quiet():
            engine = Engine(folder, 0, config.rollout.engine)
            await engine.start()
        writer, messages, told = writer_of(config, engine), [{"role": "user", "content": question}], Told()
        specs, document_s = tool_specs(config), config.render.document_s
        with local_tools(config) as tools:
            if scale == 1:
                pieces = (piece.text async for piece in writer.stream(messages, seed=seed))
                return await write(question, pieces, given, tools.run, specs, document_s, told.tell)
            first = random.getrandbits(31) if seed is None else seed
            shop = Workshop(messages, given, writer, tools, local_judges(config), specs, document_s, first)
            document = await scaled(shop, scale, tell=told.stage)
            for event in events_of(document):
                told.tell(event)
            return document
    finally:
        if engine is not None:
            engine.close()


def writer_of(config: Config, engine: Engine) -> EngineWriter:
    """The engine as the config's agent."""
    c = config.rollout
    system = system_prompt(tool_specs(config)) if config.policy.system_prompt == "protocol" else ""
    return EngineWriter(engine, system, {"max_tokens": c.max_tokens, "temperature": c.temperature, "top_p": c.top_p})


def local_tools(config: Config) -> LocalTools:
    """The config's tools in this process."""
    return LocalTools({name: (t.use or name, t.options, t.timeout_s) for name, t in config.tools.items()})


def local_judges(config: Config) -> Expected:
    """The config's judges in this process."""
    return Expected(*(_judge(pool) for pool in judges(config).values()))


def _judge(pool: JudgePool) -> Ask:
    judge = imported(pool.judge)(**pool.options)

    async def ask(doc: Rendered) -> Verdict:
        return await asyncio.to_thread(judge.judge, doc)

    return ask


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

    def stage(self, stage: Stage) -> None:
        """Show what a stage of test-time scaling did."""
        cost = f"{stage.tokens} tokens, {stage.calls} calls, {stage.judged} judged, {stage.seconds:.1f} s"
        self._line(f"{stage.name}: {'; '.join(stage.changed) or 'nothing better'} ({cost})")

    def _show(self, end: int) -> None:
        print(self._text[self._shown : end], end="", flush=True)
        self._shown = max(end, self._shown)

    def _line(self, said: str) -> None:
        print(("" if self._text[: self._shown].endswith("\n") else "\n") + said, file=sys.stderr, flush=True)
