"""The system prompt offers exactly the tools that it is given, in the form that the parser reads."""

import re

import pytest

from agent.prompt import system_prompt
from agent.protocol import Call, Invalid, parse
from agent.spec import PUBLISHED, ToolSpec


def test_the_prompt_names_every_tool_its_use_and_a_tag_that_parses() -> None:
    prompt = system_prompt()
    examples = [s for s in parse(prompt) if isinstance(s, Call)]
    assert [c.source for c in examples] == list(PUBLISHED)
    assert all(spec.when in prompt for spec in PUBLISHED.values())
    assert sum(isinstance(s, Invalid) for s in parse(prompt)) == 1  # the general shape


def test_the_prompt_speaks_only_of_the_tools_there_are() -> None:
    prompt = system_prompt({"search": PUBLISHED["search"]})
    assert not re.search("diffusion|img_index|plt", prompt)


def test_the_prompt_tells_how_any_tool_points_at_earlier_pictures() -> None:
    blend = ToolSpec("blend", {"one": int, "other": int}, "mix {two} pictures", image_params=("one", "other"))
    prompt = system_prompt({"blend": blend})
    assert "- one and other: pictures are counted from 0" in prompt
    assert "mix {two} pictures" in prompt


def test_a_prompt_without_tools_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tool"):
        system_prompt({})
