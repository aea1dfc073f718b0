"""Documents to score: a `Draft` is prose and tags in order; six good ones, one of each class of prompts."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from replay.record import Blob
from rewards.base import CallOutcome, Rendered
from rewards.hybrid import Score, score
from rewards.judges.rubric import RubricImageJudge, RubricTextJudge


def png(image: Image.Image) -> Blob:
    data = io.BytesIO()
    image.save(data, "PNG")
    return Blob(data.getvalue())


def picture(colour: str = "red", size: tuple[int, int] = (64, 48)) -> Blob:
    """A disc of one colour, left of the middle, on a dark ground."""
    image = Image.new("RGB", size, (10, 20, 30))
    ImageDraw.Draw(image).ellipse((size[0] // 5, size[1] // 4, size[0] // 2, 3 * size[1] // 4), fill=colour)
    return png(image)


@dataclass(frozen=True)
class Tag:
    """A tag to be, with the pictures that it makes."""

    source: str
    params: dict[str, Any]
    description: str = "a picture of what was asked for"
    status: str = "ok"
    made: tuple[Blob, ...] = (picture(),)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """A question with an answer in parts."""

    question: str
    parts: tuple[str | Tag, ...]
    image_num: int
    tools: tuple[str, ...] = ()
    given: tuple[Blob, ...] = ()
    finished: bool = True

    def render(self) -> Rendered:
        text, calls, blobs = "", [], {blob.sha256: blob for blob in self.given}
        for part in self.parts:
            if isinstance(part, str):
                text += part
                continue
            raw = f"<imgen>{part.params}</imgen>"
            made = part.made if part.status == "ok" else ()
            blobs |= {blob.sha256: blob for blob in made}
            place = (part.source, part.description, part.params, len(text), len(text) + len(raw))
            reason = "" if part.status == "ok" else "no such thing"
            calls.append(CallOutcome(*place, part.status, reason, tuple(b.sha256 for b in made), part.provenance))
            text += raw
        return Rendered(self.question, text, calls, self.image_num, self.tools, self.given, blobs, self.finished)

    def tags(self) -> list[Tag]:
        return [part for part in self.parts if isinstance(part, Tag)]

    def with_tags(self, change: Any) -> Draft:
        """Every tag changed by a function of it."""
        return replace(self, parts=tuple(change(p) if isinstance(p, Tag) else p for p in self.parts))


FLAG = Tag(
    "search",
    {"query": "flag of Kenya"},
    "the flag of Kenya",
    provenance={"title": "Flag of Kenya", "caption": "The national flag of Kenya, a country in Africa."},
)
STAR = Tag(
    "diffusion", {"prompt": "a red star at the top over a sea"}, "a red star over a sea", made=(picture("pink"),)
)
BARS = Tag(
    "code",
    {"code": "plt.bar(['apples', 'pears', 'figs'], [3, 5, 2]); plt.title('Fruit')"},
    "chart of apples, pears and figs",
    made=(picture("blue", (640, 480)),),
)
ZEBRAS = replace(
    BARS,
    params={"code": "plt.bar(['lions', 'zebras'], [3, 4]); plt.title('Animals')"},
    description="chart of lions and zebras",
)
CAT = picture("white", (80, 60))
GREY = Tag(
    "edit",
    {"img_index": 0, "prompt": "make it grey"},
    "the cat in grey",
    made=(png(ImageOps.grayscale(Image.open(io.BytesIO(CAT.data))).point(lambda v: v // 2)),),
)

GOLD = {
    "search": Draft(
        "Please introduce Kenya with a real picture of its flag.",
        ("The flag of Kenya is shown in this short note.\n", FLAG, "\nThe picture shows it in detail."),
        1,
        ("search",),
    ),
    "diffusion": Draft(
        "Draw a red star at the top over a sea.",
        ("This page is about a red star over a sea.\n", STAR, "\nNo eye has ever seen it."),
        1,
        ("diffusion",),
    ),
    "code": Draft(
        "Compare 3 apples, 5 pears and 2 figs in a bar chart.",
        ("A short note on apples, pears and figs.\n", BARS, "\nThe longest bar is the most."),
        1,
        ("code",),
    ),
    "edit": Draft(
        "Please make my photo of a cat grey.",
        ("This page is about the cat in grey.\n", GREY, "\nIt was changed as asked."),
        1,
        ("edit",),
        given=(CAT,),
    ),
    "several": Draft(
        "Introduce Kenya with its real flag, and compare 3 lions and 4 zebras in a bar chart.",
        (
            "A note on the flag of Kenya.\n",
            FLAG,
            "\nLions and zebras live there.\n",
            ZEBRAS,
            "\nThere are more zebras.",
        ),
        2,
        ("search", "code"),
    ),
    "none": Draft(
        "Tell me in words alone why the flag of Kenya has a shield.",
        ("The shield on the flag of Kenya stands for the defence of freedom.",),
        -1,
    ),
}


def judged(draft: Draft, kind: str = "default") -> Score:
    """A draft rendered, judged by the rubric and scored."""
    doc = draft.render()
    return score(doc, RubricTextJudge().judge(doc), RubricImageJudge().judge(doc), kind)
