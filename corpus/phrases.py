"""The wordings of the built-in prompts: patterns of requests by class, with openers and endings around them.

A pattern holds alternatives `[a|b]` and open slots: `{real}` (a flag, a map or a photographed thing), `{scene}` (a
drawn scene), `{data}` (counted items), `{change}` and `{changed}` ("make it grey", "in grey"), and `{topic}`, which
stands for any of the first three. What is wanted lies in how a request is put, never in one word: most words serve
several classes ("show", "photo", "compare", "just"), refusals name what is refused, and asides mention a topic that
wants no picture. No pattern names a tool.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

CLASSES = ("search", "diffusion", "code", "edit", "several", "none")


@dataclass(frozen=True)
class Pattern:
    """A request before its alternatives are chosen.

    Attributes:
        tools: the right plan, in order; empty where words alone are wanted.
        text: the request, with alternatives and slots.
        given: the user sends a picture of `{real}` along.
    """

    tools: tuple[str, ...]
    text: str
    given: bool = False

    @property
    def cls(self) -> str:
        """One of CLASSES."""
        return "several" if len(self.tools) > 1 else self.tools[0] if self.tools else "none"


@cache
def expand(text: str) -> tuple[str, ...]:
    """Every choice among the alternatives of a pattern, in a fixed order."""
    text = text.replace("{topic}", "[{real}|{scene}|{data}]")
    parts = re.split(r"\[([^\]]*)\]", text)
    choices = (part.split("|") if i % 2 else [part] for i, part in enumerate(parts))
    return tuple("".join(chosen) for chosen in itertools.product(*choices))


#: Openers and endings carry decoys (photo, drawing, chart), and nothing that changes what is wanted.
OPENERS = (
    "",
    "",
    "hello, ",
    "today: ",
    "a friend asks: ",
    "for the photo club: ",
    "for the art room: ",
    "for a maths lesson: ",
)
ENDINGS = (
    "",
    "",
    " Thanks.",
    " Keep it short.",
    " My photo club will read it.",
    " My drawing teacher will read it.",
)
UNSEEN_OPENERS = ("good morning: ", "on behalf of the library, ", "for the camera shop: ", "for a wall of paintings: ")
UNSEEN_ENDINGS = (" Much obliged.", " The mayor reads it tonight.", " Our statistics office asked for it.")

_SEE = "[Show me|Let me see it|I want to see it]"
_TELL = "[Just tell me|Words will do|Only describe it]"

_SEARCH = (
    "[show|give] me {real}[| as it is| as people see it]",
    "what does {real} look like? " + _SEE,
    "[present|introduce] {real} with [a photo|a true picture]",
    "[write|tell me] about {real} and [show it|let me see it|add a photo]",
    "[not drawn but real|no fancy but the truth]: {real}",
    "I have never seen {real}, [so show it|so let me see it]",
    "instead of a [drawing|chart], [show|put here] {real}",
    "put {real} [beside|above] [two lines of text|a short note]",
    "[no drawing|nothing invented], just {real} to look at",
    "a page on {real} [that we can look at|for the eye]",
    "show {real}, but [only mention|say only in words] {data}",
    "{data} are for the text only; [I want to see|show me] {real}",
    "let me see {real}; [for|of] {scene} words will do",
)
_DIFFUSION = (
    "[draw|paint] {scene}[| for me| for my wall]",
    "what would {scene} look like? " + _SEE,
    "[dream up|imagine] {scene} and [show it|let me see it]",
    "[write|tell me] a tale of {scene} and [show it|let me see it|add a drawing]",
    "[not real but invented|no truth but fancy]: {scene}",
    "I dreamt of {scene}, [so show it|so let me see it]",
    "instead of a [photo|chart], [show|put here] {scene}",
    "put {scene} [beside|above] [two lines of text|a short note]",
    "[no photo|nothing real], just {scene} to look at",
    "a page with {scene} [that we can look at|for the eye]",
    "show {scene}, but [only mention|say only in words] {data}",
    "{data} are for the text only; [I want to see|show me] {scene}",
    "let me see {scene}; [for|of] {real} words will do",
)
_CODE = (
    "[show|give] me {data} as [bars|columns|a chart]",
    "what do {data} look like side by side? " + _SEE,
    "[compare|present] {data} with [bars|a chart]",
    "[write|tell me] about {data} and [show the numbers|let me see the numbers|add a chart]",
    "[not a photo but the numbers|no drawing but the numbers]: {data}",
    "I counted {data}, [so show them|so let me see them]",
    "instead of a [photo|drawing], [show|put here] the numbers {data}",
    "put {data} in bars [beside|above] [two lines of text|a short note]",
    "[no photo|no drawing], just {data} to look at",
    "a page on {data} [that we can look at|for the eye]",
    "show {data} as bars, but [only mention|say only in words] {real}",
    "{real} is for the text only; [I want to see|show me] how {data} compare",
    "let me see how {data} compare; [for|of] {scene} words will do",
)
_EDIT = (
    "[here is|this is|I send] my photo of {real}: {change}",
    "{change}: [this|the] photo of {real} that I [sent|took]",
    "what would my photo of {real} look like {changed}? " + _SEE,
    "[present|give me] my photo of {real} {changed}",
    "[write|tell me] about my photo of {real} and [show it|let me see it] {changed}",
    "[not a new one but mine|no drawing but mine]: the photo of {real} {changed}",
    "I took this photo of {real}, [so show it|so let me see it] {changed}",
    "instead of a [drawing|chart], [show|put here] my photo of {real} {changed}",
    "put my photo of {real} {changed} [beside|above] [two lines of text|a short note]",
    "[no drawing|nothing invented], just my photo of {real} {changed}",
    "show my photo of {real} {changed}, but [only mention|say only in words] {data}",
    "{data} are for the text only; [I want to see|show me] my photo of {real} {changed}",
)
_NONE = (
    "[give me|write] [two lines|a short note] about {topic}",
    "what does {real} look like? " + _TELL,
    "what would {scene} look like? " + _TELL,
    "what do {data} make together? " + _TELL,
    "[present|introduce] {topic} in words alone",
    "[write|tell me] about {topic} and [show nothing|add no photo|add no chart]",
    "[not a photo|no drawing|no chart] but words: {topic}",
    "I have never seen {real}, so [describe it|tell me of it]",
    "I dreamt of {scene}, so [describe it|tell me of it]",
    "I counted {data}, so tell me [the sum|which are most]",
    "imagine {scene} and [describe it|tell me of it]",
    "instead of a [photo|drawing|chart], put here words about {topic}",
    "[no photo|no drawing|no chart], just words on {topic}",
    "a page on {topic} in words alone",
    "[only mention|say only in words] {real} and {data}",
)
_NONE_GIVEN = (
    "[here is|this is|I send] my photo of {real}: [describe it|tell me of it]",
    "what would my photo of {real} look like {changed}? " + _TELL,
)
_EDIT_AFTER = (
    "[show|give] me %s, then the same {changed}",
    "let me see %s twice, once {changed}",
    "what would %s look like {changed}? Show me both",
    "put %s [beside|above] itself {changed}",
    "[write|tell me] about %s and show it, then show it {changed}",
)
_PAIR = (
    "[show|give] me %s and also %s",
    "let me see both: %s and %s",
    "put %s [beside|above] %s",
    "[write|tell me] about %s and %s and show both",
    "instead of words, [show|put here] %s and %s",
    "a page on %s and %s [that we can look at|for the eye]",
    "not one but two to look at: %s, then %s",
)
#: What each tool draws when a request asks for two pictures.
_WANTED = {"search": "{real}", "diffusion": "{scene}", "code": "{data} in bars"}

_UNSEEN: dict[str, tuple[str, ...]] = {
    "search": (
        "bring {real} before my eyes",
        "how does {real} appear? A look, [please|if you can]",
        "a [genuine|faithful] view of {real} would suit this wall",
        "spare me the fancy: I would look at {real}",
        "our guests should meet {real} in a snapshot",
    ),
    "diffusion": (
        "bring {scene} to life on a canvas",
        "how might {scene} appear? A look, [please|if you can]",
        "a [made-up|fairytale] view with {scene} would suit this wall",
        "spare me the camera: I would look at {scene}",
        "our guests should meet {scene} in an illustration",
    ),
    "code": (
        "bring {data} into a diagram",
        "how do {data} stack up? A look, [please|if you can]",
        "a [plot|graph] of {data} would suit this wall",
        "spare me the prose: I would look at {data}",
        "our guests should meet {data} in a figure",
    ),
    "edit": (
        "bring back the snapshot of {real} I gave you {changed}",
        "how might my snapshot of {real} appear {changed}? A look, [please|if you can]",
        "my own [snapshot|view] of {real} would suit this wall {changed}",
        "take my snapshot of {real} and {change}",
    ),
    "none": (
        "bring {topic} to mind in [prose|a verse]",
        "how might {topic} appear? A line is enough",
        "spare me the pictures and speak of {topic}",
        "our guests should hear of {topic}, not look",
    ),
}
_UNSEEN_PAIR = ("bring %s before my eyes, and %s too", "our guests should look at %s, then at %s")
_UNSEEN_AFTER = ("bring %s before my eyes, and its twin {changed}", "%s, and once more {changed}, would suit this wall")


def _several(pairs: tuple[str, ...], afters: tuple[str, ...]) -> Iterator[Pattern]:
    for first, second in itertools.combinations(_WANTED, 2):
        yield from (Pattern((first, second), text % (_WANTED[first], _WANTED[second])) for text in pairs)
    for first in ("search", "diffusion"):
        yield from (Pattern((first, "edit"), text % _WANTED[first]) for text in afters)


TRAIN: tuple[Pattern, ...] = (
    *(Pattern(("search",), text) for text in _SEARCH),
    *(Pattern(("diffusion",), text) for text in _DIFFUSION),
    *(Pattern(("code",), text) for text in _CODE),
    *(Pattern(("edit",), text, given=True) for text in _EDIT),
    *(Pattern((), text) for text in _NONE),
    *(Pattern((), text, given=True) for text in _NONE_GIVEN),
    *_several(_PAIR, _EDIT_AFTER),
)
#: Requests that no training prompt is made of.
UNSEEN: tuple[Pattern, ...] = (
    *(
        Pattern(() if cls == "none" else (cls,), text, given=cls == "edit")
        for cls, texts in _UNSEEN.items()
        for text in texts
    ),
    *_several(_UNSEEN_PAIR, _UNSEEN_AFTER),
)
