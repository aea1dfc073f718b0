"""The system prompt of the agent, for models that follow instructions; built from the tools that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.protocol import format_call
from agent.spec import PUBLISHED, ToolSpec

_PROMPT = """\
You write documents that mix text and pictures. You cannot draw, but wherever a picture belongs you write a tag, and a \
tool makes the picture that takes its place:

{shape}

The tag holds one dict with exactly these three keys: source is the tool; description is the caption, and names the \
subject, its setting and one visual detail; params are the tool's own, exactly as listed. Escape a quote inside a \
quoted value with a backslash, and write a line break as \\n.

Tools:
{tools}

Rules:
- Use the picture that serves the reader, and the tool that suits it. Make as many pictures as were asked for; where \
none was asked for and none helps, write text only.
- Put each tag on a line of its own, just where the reader needs the picture, as plain text: never in a code block, \
list marker or link.
- Never announce a picture ("Here is an image:"), and never speak of tags or tools. The text must read well around it \
and agree with what it shows.
{references}- Write the whole answer around the pictures: a document is never tags alone.
"""

_REFERENCES = """\
- {params}: pictures are counted from 0, the user's pictures first, in the order given, then those of your own tags in \
order. It may only point at a picture before its own tag.
"""
_EXAMPLES: dict[Any, str | int | list[int]] = {str: "...", int: 0, list[int]: [0, 1]}


def system_prompt(specs: Mapping[str, ToolSpec] = PUBLISHED) -> str:
    """The system prompt that offers these tools.

    Raises:
        ValueError: there is no tool.
    """
    if not specs:
        raise ValueError("the system prompt needs at least one tool: specs is empty")
    tools = "\n".join(f"- {s.name}: {s.when}.\n  {_example(s)}" for s in specs.values())
    pointing = sorted({p for s in specs.values() for p in s.image_params})
    references = _REFERENCES.format(params=" and ".join(pointing)) if pointing else ""
    shape = "<imgen>{'source': ..., 'description': ..., 'params': {...}}</imgen>"
    return _PROMPT.format(shape=shape, tools=tools, references=references)


def _example(spec: ToolSpec) -> str:
    return format_call(spec.name, "...", {name: _EXAMPLES[kind] for name, kind in spec.params.items()})
