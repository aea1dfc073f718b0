"""The feeder: accepts prompts into the store, never more than the staleness bound can use (`replay.staleness`).

It keeps no count of its own: what is open is read from the store each time, and the data cursor is the number of groups
ever accepted. So nothing is counted twice or forgotten when it, the store or the whole run comes back.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import ray

from actors.worker import StageWorker
from corpus import prompts
from replay.record import SCHEMAS, Blob, Prompt, updates
from replay.staleness import Capacity

POLL_S = 0.25


@ray.remote
class Feeder(StageWorker):
    """Feeds training prompts, shuffled anew each epoch.

    Args:
        store, hub: handles.
        source, count: of the training set (`corpus.prompts.load`).
        tools: names of the config's.
        samples: trajectories a group.
        capacity: how many groups may be open.
        first: place in the data order of the store's first group; above 0 in the clone of a run.
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
        tools: Collection[str],
        samples: int,
        capacity: Capacity,
        first: int,
        seed: int,
    ) -> None:
        super().__init__(store)
        self._hub, self._samples, self._seed = hub, samples, seed
        self._prompts = prompts.load(source, "train", count, seed, known=tools).prompts
        self._capacity, self._first = capacity, first

    async def loop(self) -> None:
        while True:
            # First the version: between a step's publishing and its end in the store its groups count as open still.
            version, _ = await self._hub.current.remote()
            groups = (await self._store.state("train"))["groups"]
            waiting = groups["accepted"] - groups["ended"] - groups["running"]
            left = self._capacity.left(updates(version), waiting, groups["running"])
            for order in range(groups["accepted"], groups["accepted"] + left):
                prompt = self._pick(self._first + order)
                await self._store.put("pending", *group_rows(prompt, "train", order, self._samples, self._seed))
                self.begin(1)
                self.end(1)
            await asyncio.sleep(POLL_S)

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
