"""The feeder: accepts prompts into the store, never more than the staleness bound can use.

With `n` optimiser steps done, at most `(max_staleness + n + 1) * prompts_per_step` groups may have been accepted; so a
group that is generated at once is never older than `max_staleness` steps when its turn comes. The data cursor is the
number of accepted groups: it is in the store, and so survives with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray

from actors.worker import StageWorker
from corpus import prompts
from replay.record import SCHEMAS, Blob, Prompt, updates


@ray.remote
class Feeder(StageWorker):
    """Feeds training prompts, shuffled anew each epoch.

    Args:
        store, hub: handles.
        source, count: of the training set (`corpus.prompts.load`).
        samples: trajectories a group.
        prompts_per_step, max_staleness: of the learner.
        steps: optimiser steps of the run; no more groups are accepted than it can use.
        seed: of the order and of the sampling.
    """

    stage = "feed"

    def __init__(
        self,
        store: Any,
        hub: Any,
        *,
        source: str,
        count: int,
        samples: int,
        prompts_per_step: int,
        max_staleness: int,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(store)
        self._hub, self._samples, self._seed = hub, samples, seed
        self._prompts = prompts.load(source, "train", count, seed).prompts
        self._per_step, self._staleness, self._steps = prompts_per_step, max_staleness, steps

    async def loop(self) -> None:
        version: int | None = None
        while True:
            newer = await self._hub.newer.remote(version, 5.0)
            version = newer[0] if newer else version
            if version is None:
                continue
            groups = (await self._store.state("train"))["groups"]
            done = updates(version)
            allowed = min(self._staleness + done + 1, self._steps) * self._per_step
            unused = groups["ended"] - groups["trained"]  # dropped ones give their place back
            room = allowed + unused - groups["accepted"]
            for order in range(groups["accepted"], groups["accepted"] + max(0, room)):
                rows, blobs = group_rows(self._pick(order), "train", order, self._samples, self._seed)
                await self._store.put("pending", rows, blobs)
                self.begin(1)
                self.end(1)

    async def accept(self, purpose: str, accepted: Sequence[Prompt]) -> None:
        """Accept an evaluation's prompts, one sample each. Those that the store already has stay as they are."""
        for order, prompt in enumerate(accepted):
            rows, blobs = group_rows(prompt, purpose, order, 1, self._seed)
            await self._store.put("pending", rows, blobs)

    def _pick(self, order: int) -> Prompt:
        epoch, place = divmod(order, len(self._prompts))
        deck = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(deck)
        return self._prompts[deck[place]]


def group_rows(prompt: Prompt, purpose: str, order: int, samples: int, seed: int) -> tuple[pa.Table, list[Blob]]:
    """The pending rows of one group, and the user's pictures."""
    given = [Blob(data) for data in prompt.images]
    group = f"{purpose}-{order:06d}"
    rows = [
        {
            "trajectory": f"{group}/{i}",
            "group": group,
            "attempt": 0,
            "turn": 0,
            "purpose": purpose,
            "order": order,
            "seed": random.Random(f"{seed}/{order}/{i}").getrandbits(31),
            "question": prompt.question,
            "given": [b.sha256 for b in given],
            "image_num": prompt.image_num,
            "tools": list(prompt.tools),
            "samples": samples,
        }
        for i in range(samples)
    ]
    return pa.Table.from_pylist(rows, SCHEMAS["pending"]), given
