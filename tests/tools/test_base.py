"""How an implementation is found, and under which name its contract reaches the protocol."""

from typing import Any

import pytest

from agent.spec import PUBLISHED, ToolSpec
from tools.base import builtin, load, spec_of
from tools.edit import EditTool


class Sized:
    """A tool whose contract depends on its options."""

    @classmethod
    def describe(cls, many: bool) -> ToolSpec:
        return ToolSpec("sized", {"img_index": list[int] if many else int}, "for tests", ("img_index",))

    def __init__(self, many: bool) -> None: ...
    def run(self, params: Any, images: Any) -> Any: ...


def test_every_built_in_tool_can_be_loaded() -> None:
    assert all(callable(load(name)) for name in builtin())


def test_a_tool_is_found_by_module_and_class() -> None:
    assert load("tools.edit:EditTool") is EditTool


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("serch", "unknown tool 'serch': known are"),
        ("no.such:Thing", "'no.such:Thing' cannot be imported: No module named 'no'"),
        ("tools.edit:NoTool", "cannot be imported: module 'tools.edit' has no attribute 'NoTool'"),
    ],
)
def test_a_tool_that_is_nowhere_is_named(use: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        load(use)


def test_one_implementation_serves_under_any_name() -> None:
    assert spec_of("edit", "edit", {}) == PUBLISHED["edit"]
    assert spec_of("retouch", "tools.edit:EditTool", {}).name == "retouch"


def test_a_contract_may_depend_on_the_options() -> None:
    assert spec_of("s", f"{__name__}:Sized", {"many": True}).params == {"img_index": list[int]}
    assert spec_of("s", f"{__name__}:Sized", {"many": False}).params == {"img_index": int}
