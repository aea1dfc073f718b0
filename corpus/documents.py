"""Documents for the built-in prompts: the right one, and those that the cold start of a tiny policy learns from.

Cold-start documents know the protocol and what a prompt is about, but follow the right plan of tools only with a
given probability; every other plan misses at least one required tool (or has a tag where none is wanted), so the
tool accuracy of the documents is that probability exactly. The first line repeats the wish in the question's own
terms ("your photo of a crab in grey", "3 figs and 2 pears in words"), as a model that can read would understand it;
nothing before the first tag tells which plan follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from agent.protocol import format_call
from corpus.grammar import prompts
from replay.record import Prompt

TOOLS = ("search", "diffusion", "code", "edit")
#: What all tags share. A tokenizer that takes each of these as one token makes a document half as long.
PIECES = (
    "<imgen>{'source': '",
    "', 'description': '",
    "', 'params': {'query': '",
    "', 'params': {'prompt': '",
    "', 'params': {'code': \"plt.bar(['",
    "', 'params': {'img_index': ",
    ", 'prompt': '",
    "'}}</imgen>",
    '"}}</imgen>',
    "]); plt.title('",
    "'], [",
    "', '",
)
#: How often a wrong plan has 0, 1, 2 or 3 tags.
_COUNTS = (0.2, 0.45, 0.25, 0.1)
_FIRST = ("A short note on {}.", "This page is about {}.")
_AFTER = {
    "search": ("This is how it really looks.", "It is shown as it is."),
    "diffusion": ("It was dreamt up for this page.", "No eye has ever seen it."),
    "code": ("The bars tell how they compare.", "The longest bar is the most."),
    "edit": ("It was changed as asked.", "It now looks as it should."),
}
_WORDS = ("It is easily told in words.", "A few words are enough for it.")


def gold(prompt: Prompt, rng: Random) -> str:
    """The right document for a prompt of `corpus.grammar`.

    Raises:
        ValueError: the prompt is not of the grammar: its `meta` holds no values of slots.
    """
    return _document(prompt, prompt.tools, rng)


def cold_start(n: int, seed: int, right: float = 0.5) -> list[tuple[Prompt, str]]:
    """Training prompts with a document each: the right plan with probability `right`, else a wrong one.

    Raises:
        ValueError: `right` is no probability, or the grammar has fewer than `n` training prompts.
    """
    if not 0 <= right <= 1:
        raise ValueError(f"right must lie between 0 and 1, not at {right}")
    rng = Random(f"cold start {seed}")
    return [
        (prompt, _document(prompt, prompt.tools if rng.random() < right else wrong_plan(prompt, rng), rng))
        for prompt in prompts(n, seed, "train")
    ]


def wrong_plan(prompt: Prompt, rng: Random) -> tuple[str, ...]:
    """A random plan of 0 to 3 tools that is not accurate for the prompt, with an edit only where a picture precedes."""
    least = 0 if prompt.tools else 1
    count = rng.choices(range(least, len(_COUNTS)), weights=_COUNTS[least:])[0]
    while True:
        plan = tuple(rng.choice(TOOLS) for _ in range(count))
        accurate = set(prompt.tools) <= set(plan) if prompt.tools else not plan
        if not accurate and (prompt.images or plan[:1] != ("edit",)):
            return plan


def _document(prompt: Prompt, plan: tuple[str, ...], rng: Random) -> str:
    lines = [rng.choice(_FIRST).format(_topic(prompt))]
    for made, tool in enumerate(plan):
        index = 0 if plan == prompt.tools else rng.randrange(max(1, len(prompt.images) + made))
        description, params = _CALLS[tool](prompt, index)
        lines += [format_call(tool, description, params), rng.choice(_AFTER[tool])]
    return "\n".join(lines if plan else [*lines, rng.choice(_WORDS)])


#: What a tool's picture is of, in the words of the values that a question has.
_WANTED = {"search": "real", "diffusion": "shape", "code": "counted"}


def _topic(prompt: Prompt) -> str:
    """What the document is about: what the question wants shown; where that is nothing, what it names, in words."""
    meta = prompt.meta
    own = f"your photo of {meta['real']}" if prompt.images else ""
    if not prompt.tools:
        return f"{own or ' and '.join(_named(prompt))} in words"
    shown = [f"{own or 'the same'} {meta['changed']}" if t == "edit" else meta[_WANTED[t]] for t in prompt.tools]
    return " and ".join(shown)


def _named(prompt: Prompt) -> list[str]:
    """The topics that a question names, at least one."""
    if named := [prompt.meta[value] for value in _WANTED.values() if value in prompt.meta]:
        return named
    raise ValueError(f"prompt {prompt.id!r} holds no values of slots: documents are made for built-in prompts only")


Call = tuple[str, Mapping[str, str | int]]


def _search(prompt: Prompt, index: int) -> Call:
    query = prompt.meta.get("query") or _named(prompt)[0]
    return query, {"query": query}


def _diffusion(prompt: Prompt, index: int) -> Call:
    thing = _named(prompt)[0]
    return prompt.meta.get("shape", thing), {"prompt": prompt.meta.get("scene", thing)}


def _code(prompt: Prompt, index: int) -> Call:
    """A bar chart of the question's numbers; of a bar for the topic if it has none."""
    thing, title = _named(prompt)[0], prompt.meta.get("title", "Things")
    labels = prompt.meta["labels"].split(",") if "labels" in prompt.meta else [thing]
    values = [int(v) for v in prompt.meta.get("values", "1").split(",")]
    code = f"plt.bar({labels}, {values}); plt.title({title!r})"
    return f"chart of {prompt.meta.get('counted', thing)}", {"code": code}


def _edit(prompt: Prompt, index: int) -> Call:
    change = prompt.meta.get("change", "make it grey")
    return f"{_named(prompt)[0]} {prompt.meta.get('changed', 'in grey')}", {"img_index": index, "prompt": change}


_CALLS: dict[str, Callable[[Prompt, int], Call]] = {
    "search": _search,
    "diffusion": _diffusion,
    "code": _code,
    "edit": _edit,
}
