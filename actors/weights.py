"""The weight seam: `publish(version, named weights)` on the learner's side, `pull` on the engine's.

Weights travel once as one safetensors image in Ray's object store, owned by the hub, so that they outlive the learner
that made them and a worker that joins late just pulls. On a worker's node they become a file in shared memory, which
the engine's process maps (`actors/weight_transfer.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch


@ray.remote
class WeightHub:
    """Knows the newest policy version and holds its weights."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._weights: list[Any] | None = None
        self._changed = asyncio.Condition()

    async def publish(self, version: int, image: np.ndarray | None) -> None:
        """Make `version` the newest; `image` is None for the weights of the model that everyone starts from."""
        # Put anew, so that the hub owns it: an object dies with its owner, and learners come and go.
        self._version, self._weights = version, None if image is None else [ray.put(image)]
        async with self._changed:
            self._changed.notify_all()

    async def version(self) -> int | None:
        return self._version

    async def newer(self, than: int | None, wait_s: float) -> tuple[int, list[Any] | None] | None:
        """The newest (version, [ObjectRef of weights]) if it is not `than`; waits up to `wait_s` seconds, then None.

        The ref sits in a list, so that Ray hands on the ref and not the weights.
        """
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._version != than), wait_s)
        return None if self._version in (None, than) else (self._version, self._weights)


def publish(hub: Any, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Publish named weights (checkpoint names) as a policy version; returns their size in bytes."""
    from safetensors.torch import save

    image = np.frombuffer(save({name: t.contiguous() for name, t in weights}), dtype=np.uint8)
    ray.get(hub.publish.remote(version, image), timeout=120)
    return image.nbytes


async def pull(weights: list[Any], path: Path) -> None:
    """Bring published weights to this node as a safetensors file (put in place by rename)."""
    image = await weights[0]
    await asyncio.to_thread(_write, image, path)


def _write(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(f".{os.getpid()}")
    tmp.write_bytes(image.data)
    tmp.rename(path)
