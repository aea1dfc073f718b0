"""The README's rule: imports only point down its list of folders, and Ray is imported in actors/ and cluster/ alone."""

import ast
import re
from pathlib import Path

import pytest

*ORDER, _ = re.findall(r"^\| `(\w+)/` \|", Path("README.md").read_text(), re.MULTILINE)


def imported(path: Path) -> set[str]:
    """The top packages of all imports in a file, also of those within functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_none_that_is_above_it(folder: str) -> None:
    barred = {*ORDER[: ORDER.index(folder)], *([] if folder in ("cluster", "actors") else ["ray"])}
    files = list(Path(folder).rglob("*.py"))
    assert files and {str(path): found for path in files if (found := imported(path) & barred)} == {}


def test_the_list_names_every_folder_of_code() -> None:
    assert {*ORDER, "benchmarks"} == {path.parent.name for path in Path().glob("*/__init__.py")}
