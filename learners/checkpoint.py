"""Checkpoints of the learner: DeepSpeed's files of every rank and, written when all ranks are done, our `state.json`.

A folder without `state.json` is no checkpoint. One that was written by another number of ranks is turned into
DeepSpeed's universal form (arXiv 2406.18820) beside it, once, and loaded from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STATE = "state.json"
UNIVERSAL = "universal"

#: A checkpoint of 30 billion parameters is 0.5 TB to read and write.
CONVERT_S = 7200.0

Shapes = Mapping[str, list[int]]


@dataclass(frozen=True)
class State:
    """What a checkpoint was written from.

    Attributes:
        ranks, zero_stage: of the learner.
        steps: optimiser steps that were done.
        parameters: shape of every parameter, by name.
        client: whatever the caller wants back.
    """

    ranks: int
    zero_stage: int
    steps: int
    parameters: Shapes
    client: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Makes `folder` a checkpoint."""
        fresh = folder / f"{STATE}.tmp"
        with fresh.open("w") as f:
            json.dump(asdict(self), f)
            f.flush()
            os.fsync(f.fileno())
        fresh.rename(folder / STATE)

    @classmethod
    def read(cls, folder: Path) -> State:
        """Raises FileNotFoundError if `folder` is no checkpoint, or not a whole one."""
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no checkpoint '{folder.name}' in '{folder.parent}'")
        if not (folder / STATE).is_file():
            raise FileNotFoundError(f"checkpoint '{folder}' is incomplete: not all ranks had finished writing it")
        return cls(**json.loads((folder / STATE).read_text()))

    def check(self, zero_stage: int, parameters: Shapes) -> None:
        """Raises ValueError if a learner of that stage with those parameters cannot go on from here."""
        if (self.zero_stage == 3) != (zero_stage == 3):
            raise ValueError(
                f"the checkpoint was written with zero_stage {self.zero_stage}; resume with it, not {zero_stage}"
            )
        if wrong := differences(self.parameters, parameters):
            raise ValueError(f"the checkpoint is of another model than the learner's: {wrong}")


def differences(given: Shapes, wanted: Shapes) -> str:
    """In words, how the names and shapes that are given differ from those that are wanted; "" if they do not."""
    found = [f"{n} is missing" for n in wanted if n not in given]
    found += [f"{n} is unknown" for n in given if n not in wanted]
    found += [
        f"{n} has shape {list(given[n])} instead of {list(wanted[n])}"
        for n in wanted
        if n in given and list(given[n]) != list(wanted[n])
    ]
    return listed(found)


def listed(found: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def flush(folder: Path) -> None:
    """Returns when everything that this machine has written to files in `folder` is on its disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())


def on_disk(folder: Path) -> bool:
    """Whether the optimiser of this checkpoint lay on NVMe (DeepSpeed's `offload_optimizer`)."""
    return (folder / "offloaded_tensors").is_dir()


def restore_swapped(optimizer: Any, file: str) -> None:
    """What DeepSpeed leaves out when it loads an optimiser that lies on NVMe: the moments, and what is in memory.

    It has put the swap files in place, and reads the weights alone from them.

    Args:
        optimizer: DeepSpeed's, of ZeRO-3.
        file: this rank's optimiser states, in which swapped tensors are empty.
    """
    import torch

    saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
    for i, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
        states = saved["optimizer_state_dict"]["state"].get(i, {})
        if optimizer._swappable_optimizer_subgroup(i):  # the next swap fills what is as large as the weights
            size = optimizer.fp16_partitioned_groups_flat_numel[i]
            swapped = {n for n, t in states.items() if torch.is_tensor(t) and t.numel() == 0}
            states = states | {n: torch.empty(size, dtype=states[n].dtype) for n in swapped}
        else:
            weights.data.copy_(saved["fp32_flat_groups"][i])
        optimizer.optimizer.state[weights] = states
    optimizer.reset_swap_buffers()
    optimizer.checkpoint_event_epilogue()


def universal(folder: Path) -> Path:
    """The universal form of a checkpoint, which any number of ranks can load. Of those that ask for it, one makes it.

    Raises:
        RuntimeError: DeepSpeed could not convert it.
        TimeoutError: it took longer than `CONVERT_S`.
    """
    out = folder / UNIVERSAL
    deadline = time.monotonic() + CONVERT_S
    with (folder / f"{UNIVERSAL}.lock").open("w") as lock:
        while not out.is_dir():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no rank had converted checkpoint '{folder}' after {CONVERT_S:g} s") from None
                time.sleep(0.2)
                continue
            if not out.is_dir():
                _convert(folder, out)
    return out


def _convert(folder: Path, out: Path) -> None:
    """In a process of its own, which forks workers; it appears under its name when it is whole."""
    fresh = out.with_name(f"{UNIVERSAL}.part")
    workers = str(max(1, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder), "--output_folder", str(fresh)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_S)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"converting checkpoint '{folder}' took longer than {CONVERT_S:g} s") from None
    if done.returncode:
        why = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise RuntimeError(f"DeepSpeed could not convert checkpoint '{folder}' for another number of ranks: {why}")
    fresh.rename(out)
