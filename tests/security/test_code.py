"""Model-written code that attacks the machine it runs on harms nothing, and the next honest call works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from replay.record import Blob
from tests.security.code_attacks import ATTACKS, HONEST, TIMEOUT_S, Bait, contained
from tools.code import CodeTool
from tools.sandbox import GUARANTEES


@pytest.fixture(scope="module")
def bait() -> Iterator[Bait]:
    with Bait() as bait:
        yield bait


@pytest.fixture(scope="module")
def tool(bait: Bait) -> Iterator[CodeTool]:
    tool = CodeTool(timeout_s=TIMEOUT_S, memory_mib=512)
    yield tool
    tool.close()


@pytest.fixture(scope="module")
def honest(tool: CodeTool) -> Blob:
    return tool.run({"code": HONEST}).images[0]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_is_contained(name: str, tool: CodeTool, bait: Bait, honest: Blob) -> None:
    assert contained(name, tool, bait, honest) is None


def test_there_are_as_many_attacks_as_are_asked_for() -> None:
    assert len(ATTACKS) >= 60


def test_nothing_is_left_running_and_no_file_is_left(bait: Bait) -> None:
    tool = CodeTool(timeout_s=TIMEOUT_S)
    zygote, home = psutil.Process(tool._sandbox._zygote.process.pid), Path(tool._sandbox._zygote.home)  # type: ignore
    for name in ("fork", "a bomb of threads", "fill the disk with files", "ignore every signal"):
        contained(name, tool, bait, Blob(b""))
        assert not zygote.children(recursive=True) and not list(home.glob("calls/*"))
    tool.close()
    assert not zygote.is_running() and not home.exists()


def test_the_tool_says_which_guarantees_hold(tool: CodeTool) -> None:
    assert {"files", "network", "processes"} <= tool.guarantees <= set(GUARANTEES)


def test_a_guarantee_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown guarantee 'magic': known are files, network"):
        CodeTool(require=["files", "magic"])


#: Denies system calls as a kernel without them does, and then makes a tool; seccomp filters of a parent hold for all.
_OLD_KERNEL = """
import sys, ctypes, struct, errno
from tools import jail
denied = {numbers}
steps = [(0x20, 0, 0, 0)] + [s for n in denied for s in ((0x15, 0, 1, n), (0x06, 0, 0, 0x00050000 | errno.{errno}))]
if {in_container}:  # clone() with CLONE_NEWPID is refused too
    steps += [(0x15, 0, 3, 56), (0x20, 0, 0, 16), (0x45, 0, 1, 0x20000000), (0x06, 0, 0, 0x00050000 | errno.EPERM)]
program = b"".join(struct.pack("HBBI", *s) for s in [*steps, (0x06, 0, 0, 0x7FFF0000)])
code = ctypes.create_string_buffer(program, len(program))
jail._libc.prctl(38, 1, 0, 0, 0)
assert jail._libc.prctl(22, 2, struct.pack("HP", len(program) // 8, ctypes.addressof(code)), 0, 0) == 0
from tools.code import CodeTool
try:
    tool = CodeTool(timeout_s=2, require={require})
    print(sorted(tool.guarantees), len(tool.run({{"code": "plt.plot([1])"}}).images))
    if {in_container}:
        from tests.security.code_attacks import HONEST, PROCESSES, Bait, contained
        honest = tool.run({{"code": HONEST}}).images[0]
        with Bait() as bait:
            print([f"{{name}}: {{wrong}}" for name in PROCESSES if (wrong := contained(name, tool, bait, honest))])
    tool.close()
except RuntimeError as error:
    print(error)
"""
_LANDLOCK, _UNSHARE, _MOUNT = 444, 272, 165


def _on_a_kernel_without(
    numbers: list[int], require: list[str], errno: str = "ENOSYS", in_container: bool = False
) -> str:
    script = _OLD_KERNEL.format(numbers=numbers, require=require, errno=errno, in_container=in_container)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_a_kernel_that_lacks_something_is_made_up_for_by_the_rest() -> None:
    said = _on_a_kernel_without([_LANDLOCK], ["files", "network", "processes"])
    assert "'landlock'" not in said and "'files', " in said and said.endswith("] 1\n")
    said = _on_a_kernel_without([_UNSHARE], ["files", "network", "processes"], "EPERM")
    assert not {"mount namespace", "user namespace"} & set(said.split("'")) and "'files', 'landlock'" in said
    said = _on_a_kernel_without([_MOUNT], ["files"], "EPERM")
    assert "mount namespace" not in said and "'network namespace'" in said and said.endswith("] 1\n")


def test_in_a_container_that_has_no_namespaces_other_processes_are_out_of_reach() -> None:
    said = _on_a_kernel_without([_UNSHARE, _MOUNT], ["files", "network", "processes"], "EPERM", in_container=True)
    assert said.splitlines() == ["['files', 'landlock', 'network', 'processes'] 1", "[]"]


def test_a_tool_that_cannot_protect_what_it_must_refuses_to_start() -> None:
    said = _on_a_kernel_without([_LANDLOCK, _UNSHARE], ["files", "network"], "EPERM")
    assert said.startswith("the code tool cannot protect files on this machine (kernel ")
    assert "require less" in said and "Traceback" not in said
