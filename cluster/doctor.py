"""`llmi doctor`: what is wrong with this machine, in plain words, and what to do about it.

Checks change nothing. What torch and the packages beside it are like is asked of another process, because a broken one
of them must not break the doctor.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import machine
from cluster.machine import Finding

PORTS = {8265: "Ray's dashboard", 6379: "Ray's head node", 8000: "the agent's HTTP service"}
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
HOOK = "llmi_torchvision_hook"
PROBE_S = 180  # a first import of torch from a cold, slow disk

_ROOT = Path(__file__).resolve().parents[1]
_ASK_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}))
"""


def run(fix: bool) -> int:
    """Print all findings; with `fix`, mend what can be mended and look again. 0 if all is well, else 1."""
    findings = check()
    if fix and mend(findings):
        findings = check()
    show(findings, Console())
    return int(any(not f.ok for f in findings))


def check() -> list[Finding]:
    """All findings, in the order in which they are best mended."""
    ports = [machine.port(number, use) for number, use in PORTS.items()]
    cluster = any(f.ok and not f.what.startswith("free") for f in ports)
    return [
        machine.python_version(),
        machine.system_libraries(),
        packages(),
        *torch_and_companions(),
        machine.cores(),
        machine.threads(),
        machine.memory(),
        machine.shared_memory(),
        machine.disk(Path.cwd()),
        *ports,
        machine.ray_tokens(cluster),
        machine.sandbox(),
    ]


def mend(findings: Iterable[Finding]) -> list[str]:
    """Mend the findings that can be mended from here; what remains is found by the next check. Returns their names."""
    menders: dict[str, Callable[[], object]] = {
        "packages": install_lock,
        "torchvision": install_hook,
        "torchaudio": lambda: _call(sys.executable, "-m", "pip", "uninstall", "-y", "torchaudio"),
        "torchcodec": lambda: _call(sys.executable, "-m", "pip", "uninstall", "-y", "torchcodec"),
    }
    wrong = [f.name for f in findings if not f.ok and f.name in menders]
    for name in wrong:
        print(f"mending {name}", flush=True)
        menders[name]()
    return wrong


def lock_file() -> Path:
    """The lock that this environment was made from: the GPU's if vLLM's CUDA build is installed."""
    return _ROOT / "requirements" / ("gpu.txt" if _version("vllm") else "cpu.txt")


def read_lock(path: Path) -> dict[str, str]:
    """Package name to version, of a file with lines `name==version` and comments."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines) if version}


def packages(lock: Mapping[str, str] | None = None) -> Finding:
    """Installed versions against the lock; a local part as in `2.13.0+cpu` does not count."""
    lock = read_lock(lock_file()) if lock is None else lock
    wrong = []
    for name, version in lock.items():
        installed = _version(name)
        if installed is None:
            wrong.append(f"{name} is missing")
        elif Version(installed).public != Version(version).public:
            wrong.append(f"{name} is {installed}, not {version}")
    more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    what = "; ".join(wrong[:5]) + more if wrong else f"all {len(lock)} are as locked"
    return Finding("packages", not wrong, what, "`llmi doctor --fix` installs them")


def install_lock() -> None:
    """Have make install the lock again: it knows where the CPU build of torch comes from."""
    if Path(sys.prefix) == _ROOT / ".venv":
        _call("make", "-C", str(_ROOT), "--always-make", "venv", f"LOCK={lock_file().stem}")
    else:
        print(f"{sys.prefix} was not made by `make venv`: install {lock_file()} there as requirements/README.md says")


def torch_and_companions() -> list[Finding]:
    """About torch, and if it can be asked, the GPUs that it sees and the packages beside it that are installed."""
    done = _python(_ASK_TORCH)
    if done.returncode:
        fix = "`make clean venv` installs the CPU build (requirements/README.md tells where from)"
        return [Finding("torch", False, f"`import torch` fails: {_last_line(done.stderr)}", fix)]
    torch = json.loads(done.stdout.splitlines()[-1])
    what = f"{torch['version']}, built for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPUs'}"
    found = [Finding("torch", True, what), accelerators(torch["gpus"], torch["cuda"], Path("/dev/nvidia0").exists())]
    return found + [companion(name) for name in COMPANIONS if _version(name)]


def accelerators(gpus: list[str], cuda: str | None, device: bool) -> Finding:
    """`gpus` are those that torch sees, `cuda` what it is built for, `device` whether the kernel shows a GPU."""
    if gpus or not device:
        return Finding("accelerators", True, ", ".join(gpus) or "no GPU: all runs on the CPU")
    fix = "look at `nvidia-smi`: the driver must be at least as new as torch's CUDA" if cuda else "`make venv LOCK=gpu`"
    return Finding("accelerators", False, "there is a GPU here, but torch does not see it", fix)


def companion(name: str) -> Finding:
    """Whether an installed companion of torch imports: if it does not, transformers and vLLM do not either."""
    done = _python(f"import {name}")
    if not done.returncode:
        return Finding(name, True, f"{_version(name)} imports")
    repair = "lets its CUDA build be imported beside a CPU torch" if name == "torchvision" else "removes it"
    what = f"`import {name}` fails, and with it vLLM: {_last_line(done.stderr)}"
    return Finding(name, False, what, f"`llmi doctor --fix` {repair}")


def install_hook(site_packages: Path | None = None) -> None:
    """Put `torchvision_hook.py` and the line that loads it into site-packages."""
    folder = site_packages or Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(Path(__file__).with_name("torchvision_hook.py"), folder / f"{HOOK}.py")
    (folder / f"{HOOK}.pth").write_text(f"import {HOOK}\n")


def show(findings: Iterable[Finding], console: Console) -> None:
    """One row a finding; what to do is said only where something is to be done."""
    table = Table("", "what", "is so", "what to do")
    for f in findings:
        mark = Text("ok", style="green") if f.ok else Text("no", style="red")
        table.add_row(mark, Text(f.name), Text(f.what), Text("" if f.ok else f.fix))
    console.print(table)


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python of this environment."""
    command = [sys.executable, "-P", "-c", code]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {PROBE_S} s")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def _call(*command: str) -> None:
    """Run a command that says itself what goes wrong."""
    subprocess.run(command, check=False)
