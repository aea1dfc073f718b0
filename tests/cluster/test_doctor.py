"""`llmi doctor`: every check told of a machine where it is well and of one where it is not."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

from cluster import doctor, machine
from cluster.machine import Finding

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"


def answer(code: int = 0, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(["python"], code, out, err)


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_every_pin_of_pyproject_is_in_the_locks(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = (REQUIREMENTS / f"{extra}.txt", REQUIREMENTS / "dev.txt")
    lock = {canonicalize_name(name): version for file in files for name, version in doctor.read_lock(file).items()}
    pins = [*project["dependencies"], *(p for e in (extra, "dev") for p in project["optional-dependencies"][e])]
    for pin in map(Requirement, pins):
        assert pin.specifier.contains(lock.get(canonicalize_name(pin.name), "0")), f"{pin} is not what {extra} locks"


def test_the_lock_leaves_out_what_breaks_a_cpu_machine() -> None:
    lock = doctor.read_lock(REQUIREMENTS / "cpu.txt")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(lock)
    assert "+" not in lock["torch"]
    assert not [name for name in lock if name.startswith("nvidia")]


def test_a_lock_is_read_without_its_comments(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("# all\n\na-b==1.0  # why\nnot a pin\nC==2\n")
    assert doctor.read_lock(tmp_path / "lock.txt") == {"a-b": "1.0", "C": "2"}


def test_versions_are_compared_without_their_local_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor.packages({"torch": "2.13.0"}).ok


def test_missing_and_other_versions_are_named() -> None:
    finding = doctor.packages({"pytest": "0.1", "no-such-package": "1.0"})
    assert not finding.ok
    assert "pytest is " in finding.what and ", not 0.1" in finding.what
    assert "no-such-package is missing" in finding.what


def test_many_wrong_versions_are_cut_short() -> None:
    assert doctor.packages({f"no-such-{i}": "1" for i in range(9)}).what.endswith("; and 4 more")


def test_a_broken_torch_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = "Traceback\nImportError: libcudart.so.13: cannot open shared object file"
    monkeypatch.setattr(doctor, "_python", lambda code: answer(1, err=error))
    (finding,) = doctor.torch_and_companions()
    assert not finding.ok
    assert finding.what.endswith("libcudart.so.13: cannot open shared object file")


def test_torch_and_its_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'a warning\n{"version": "2.13.0", "cuda": "13.0", "gpus": ["H100", "H100"]}\n'
    monkeypatch.setattr(doctor, "_python", lambda code: answer(out=said))
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    torch, gpus = doctor.torch_and_companions()
    assert (torch.ok, torch.what) == (True, "2.13.0, built for CUDA 13.0")
    assert (gpus.ok, gpus.what) == (True, "H100, H100")


def test_a_gpu_that_torch_does_not_see_is_found() -> None:
    assert "LOCK=gpu" in doctor.accelerators([], None, device=True).fix
    assert "nvidia-smi" in doctor.accelerators([], "13.0", device=True).fix
    assert doctor.accelerators([], None, device=False).ok


@pytest.mark.parametrize("name", doctor.COMPANIONS)
def test_a_companion_built_for_cuda_is_found_and_mended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "_python", lambda code: answer(1, err=error))
    finding = doctor.companion(name)
    assert not finding.ok and error in finding.what and "--fix" in finding.fix
    done: list[str] = []
    monkeypatch.setattr(doctor, "install_hook", lambda: done.append("hook"))
    monkeypatch.setattr(doctor, "_call", lambda *command: done.append(" ".join(command[1:])))
    assert doctor.mend([finding]) == [name]
    assert done == (["hook"] if name == "torchvision" else [f"-m pip uninstall -y {name}"])


def test_only_what_is_wrong_and_can_be_mended_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_call", lambda *command: pytest.fail(f"ran {command}"))
    assert doctor.mend([Finding("packages", True, ""), Finding("disk", False, "full")]) == []


def test_an_environment_not_made_by_make_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "prefix", "/usr")
    monkeypatch.setattr(doctor, "_call", lambda *command: pytest.fail(f"ran {command}"))
    doctor.install_lock()
    assert "/usr was not made by `make venv`" in capsys.readouterr().out


def test_the_hook_lets_torchvision_name_its_operators(tmp_path: Path) -> None:
    """As torchvision's import does, where its own library of kernels did not load."""
    doctor.install_hook(tmp_path)
    assert (tmp_path / f"{doctor.HOOK}.pth").read_text() == f"import {doctor.HOOK}\n"
    names = ("nms", "qnms")
    fakes = "\n".join(f"torch.library.register_fake('torchvision::{name}')(lambda *a: None)" for name in names)
    (tmp_path / "torchvision.py").write_text(f"import torch\n{fakes}\n")
    for hook, fails in (("", True), (f"import {doctor.HOOK}; ", False)):
        done = doctor._python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {hook}import torchvision")
        assert bool(done.returncode) == fails, done.stderr
        assert ("torchvision::nms does not exist" in done.stderr) == fails


def test_another_python_is_refused() -> None:
    assert machine.python_version((3, 11)).ok
    assert not machine.python_version((3, 12)).ok


def test_missing_system_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(machine.ctypes, "CDLL", no_library)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.system_libraries().fix == "as root: apt-get install libnuma1 util-linux"


def test_a_containers_limits_count(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{6 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{2 << 30}\n")
    cores, memory = machine.cores(tmp_path), machine.memory(tmp_path)
    assert (cores.ok, memory.ok) == (False, False)
    assert memory.what == "4.0 GiB free" and cores.what in ("1.5 can be used", "1 can be used")


def test_a_container_without_limits_has_the_machines(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cores(tmp_path).what == machine.cores(tmp_path / "none").what
    assert "GiB free" in machine.memory(tmp_path).what


@pytest.mark.parametrize(("value", "ok"), [("", True), ("1", True), ("4096", False), ("0", False), ("many", False)])
def test_more_threads_than_cores_are_found(value: str, ok: bool) -> None:
    assert machine.threads({"OMP_NUM_THREADS": value}).ok is ok


def test_a_small_or_missing_shared_memory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not machine.shared_memory(tmp_path / "none").ok
    usage = type(machine.shutil.disk_usage("/"))(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    finding = machine.shared_memory(tmp_path)
    assert not finding.ok and "--shm-size" in finding.fix


@pytest.mark.parametrize(("free", "ok"), [(3, False), (8, False), (50, True)])
def test_a_disk_that_is_full_for_ray_is_found(free: int, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(machine.shutil.disk_usage("/"))(200 << 30, (200 - free) << 30, free << 30)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert machine.disk(Path("/")).ok is ok


def test_a_port_says_who_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        finding = machine.port(number, "it")
        assert not finding.ok and "held by" in finding.what
        monkeypatch.setattr(machine, "_holder", lambda number: "gcs_server (process 7)")
        assert machine.port(number, "it").ok
    assert machine.port(number, "it").what == "free (it)"


def test_a_port_of_another_user_is_held_by_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: str) -> None:
        raise machine.psutil.AccessDenied

    monkeypatch.setattr(machine.psutil, "net_connections", refused)
    assert machine._holder(1) == "a process of somebody else"


def test_a_ray_token_without_a_mode_refuses_clients_of_a_running_cluster(tmp_path: Path) -> None:
    assert machine.ray_tokens(True, {}, tmp_path).ok
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    finding = machine.ray_tokens(True, {}, tmp_path)
    assert not finding.ok and "RAY_AUTH_MODE=token" in finding.fix and "secret" not in finding.what
    assert machine.ray_tokens(False, {}, tmp_path).ok
    assert machine.ray_tokens(True, {"RAY_AUTH_MODE": "token"}, tmp_path).ok
    assert machine.ray_tokens(True, {"RAY_AUTH_MODE": "disabled"}, tmp_path).ok


def test_token_mode_without_a_token_is_found(tmp_path: Path) -> None:
    assert not machine.ray_tokens(False, {"RAY_AUTH_MODE": "token"}, tmp_path).ok
    assert machine.ray_tokens(False, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, tmp_path).ok


def test_a_kernel_without_landlock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "landlock_abi", lambda: 0)
    assert not machine.sandbox().ok


def test_the_table_says_what_to_do_only_where_something_is_wrong() -> None:
    console = Console(file=io.StringIO(), width=120)
    doctor.show([Finding("a", True, "[fine]", "do a"), Finding("b", False, "[broken]", "do b")], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[fine]" in text and "[broken]" in text
    assert "do b" in text and "do a" not in text


def test_the_exit_status_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([[Finding("packages", False, "old")], [Finding("packages", True, "new")]])
    monkeypatch.setattr(doctor, "check", lambda: next(looks))
    monkeypatch.setattr(doctor, "install_lock", lambda: None)
    assert doctor.run(fix=True) == 0
    monkeypatch.setattr(doctor, "check", lambda: [Finding("disk", False, "full")])
    assert doctor.run(fix=True) == 1
    assert doctor.run(fix=False) == 1


def test_the_whole_check_looks_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_and_companions", lambda: [Finding("torch", True, "")])
    names = [finding.name for finding in doctor.check()]
    assert len(names) == len(set(names))
    assert {"Python", "packages", "torch", "memory", "disk", "port 8265", "Ray tokens", "code sandbox"} <= set(names)
