"""Tools and a judge that take their time, and a small craft to learn from them: the work of `llmi bench overlap`.

They come in as a user's own would: the painter by the entry point of an installed package, the others by name.
"""

from __future__ import annotations

import io
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from agent.protocol import format_call
from agent.spec import PUBLISHED, ToolSpec
from replay.record import Blob, Prompt
from rewards.base import Rendered, Verdict
from rewards.hybrid import IMAGE_CRITERIA, TEXT_CRITERIA
from tools.base import ENTRY_POINTS, ToolResult

#: What there is to paint, and in which colour it is right.
COLOURS = {
    "the sky": "blue",
    "a lemon": "yellow",
    "fresh grass": "green",
    "a ripe tomato": "red",
    "a carrot": "orange",
    "clean snow": "white",
    "a lump of coal": "black",
    "an old brick": "brown",
}
PHRASES = ("Paint {}.", "I want to see {}.", "How does {} look?", "A picture of {}, please.")
#: Strings of an answer that are one token each in the policy's vocabulary.
PIECES = ("<imgen>{'source': 'paint', 'description': '", "', 'params': {'prompt': '", "', 'seed': ", "}}</imgen>")


class Painter:
    """The tool: a plain picture, after a while."""

    spec = ToolSpec("paint", {"prompt": str, "seed": int}, "a picture in one colour")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> ToolResult:
        time.sleep(self._seconds)
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), random.Random(params["prompt"]).getrandbits(24)).save(buffer, "PNG")
        return ToolResult((Blob(buffer.getvalue()),), {"title": params["prompt"]})


class Waiting:
    """A published tool's calls, which take so many seconds and show nothing; the work of `llmi bench tools`."""

    def __init__(self, tool: str, seconds: float) -> None:
        self.spec, self._seconds = self.describe(tool), seconds

    @classmethod
    def describe(cls, tool: str, **options: Any) -> ToolSpec:
        return PUBLISHED[tool]

    def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> ToolResult:
        time.sleep(self._seconds)
        return ToolResult((Blob(repr(sorted(params.items())).encode()),))


class Critic:
    """The judge, for text and pictures alike: after a while all points or none, by the colour that was asked for."""

    name, sees_images = "critic", False

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def judge(self, doc: Rendered) -> Verdict:
        time.sleep(self._seconds)
        [right] = [f"{colour} {thing}" for thing, colour in COLOURS.items() if thing in doc.question]
        points = 5.0 if any(call.params.get("prompt") == right for call in doc.calls) else 1.0
        return Verdict(dict.fromkeys((*TEXT_CRITERIA, *IMAGE_CRITERIA), points))


def prompts(times: int = 1) -> list[Prompt]:
    """Every phrase with every thing, as often as asked for."""
    questions = [phrase.format(thing) for phrase in PHRASES for thing in COLOURS] * times
    return [Prompt(f"paint-{k}", question, image_num=1, tools=("paint",)) for k, question in enumerate(questions)]


def documents(n: int, seed: int, right: float = 0.5) -> Iterator[tuple[str, str]]:
    """Questions and answers of one call each, in the right colour this share of the time.

    The call's seed is drawn at random, so that no two calls are equal and none is answered from the tool's cache.
    """
    rng = random.Random(seed)
    for _ in range(n):
        thing, colour = rng.choice(list(COLOURS.items()))
        if rng.random() >= right:
            colour = rng.choice([c for c in COLOURS.values() if c != colour])
        prompt = f"{colour} {thing}"
        call = format_call("paint", prompt, {"prompt": prompt, "seed": rng.randrange(10**5, 10**6)})
        yield rng.choice(PHRASES).format(thing), f"Here it is: {call}"


def install(folder: Path) -> None:
    """Make the tool known to this process and to those that it starts from now on, as an installed package would be."""
    info = folder / "llmi_bench_overlap-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmi-bench-overlap\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\npaint = {__name__}:Painter\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH")) if p)
