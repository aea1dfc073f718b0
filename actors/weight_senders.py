"""Weights straight from the learner's accelerators to the engines', by vLLM's own transfers: NCCL and CUDA IPC.

vLLM's trainer side drives the engines through a client of four methods; `Engines` is ours, over rollout workers. What
is sent cannot be pulled: an engine that starts late has the weights that it loaded, and says so in its tokens, until
the next version is sent. Both need CUDA; docs/weights.md says what of this has run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import ray
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from actors.buckets import BUCKET_BYTES
from actors.weight_transfer import with_head
from actors.weights import COMMIT_S, Member, Stream
from learners.world import background, free_port, led

SEND_S = 400.0  # the largest weights are on all engines by then; the learner's other ranks wait 600 s for rank 0


class Engines:
    """`vllm.distributed.weight_transfer.base.VLLMWeightSyncClient` over rollout workers.

    Args:
        members: whom to send to.

    Attributes:
        version: of the weights under way; to be set before they are sent.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members, self.version = list(members), -1

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine's processes get ranks of their own in the group; vLLM's trainers know of one engine only."""
        infos, first = [], int(init_info.get("rank_offset", 0))
        for member in self._members:
            infos.append(init_info | ({"rank_offset": first} if "rank_offset" in init_info else {}))
            first += member.ranks
        self._call("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", [update_info] * len(self._members))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", version=self.version)

    def _call(self, step: str, infos: Sequence[dict[str, Any]] | None = None, version: int | None = None) -> None:
        given = [{}] * len(self._members) if infos is None else infos
        calls = [m.worker.transfer.remote(step, i, version) for m, i in zip(self._members, given, strict=True)]
        ray.get(calls, timeout=SEND_S)


class Source(WeightSource):
    """A stream of named weights as vLLM's trainers want it: what comes is told beforehand, by one pass over it."""

    def __init__(self, weights: Stream) -> None:
        self._weights = weights
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        if self._metadata is None:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
        return self._metadata

    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(math.prod(m.shape) * m.dtype.itemsize for m in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return with_head(self._weights())


class DirectSender:
    """Sends to all engines at once (`actors.weights.Sender`).

    Args:
        backend: nccl or ipc.
        hub: handle.
        rank, ranks: of the learner; rank 0 sends, the others take part in the passes over the weights.
    """

    def __init__(self, backend: str, hub: Any, rank: int = 0, ranks: int = 1) -> None:
        self._backend, self._hub, self._rank, self._ranks = backend, hub, rank, ranks
        self._members: list[Member] = []  # that rank 0 sent to last
        self._trainer: Any = None

    def publish(self, version: int, weights: Stream) -> None:
        """Raises RuntimeError if not all engines have them in time; nothing can be sent after that."""
        changed = led(self._changed, self._rank, self._ranks)  # a new trainer makes one pass more, on every rank
        what = f"sending version {version} to {len(self._members)} engines by {self._backend}"
        within(SEND_S, what, lambda: self._send(version, weights, changed))
        if self._rank == 0:
            ray.get(self._hub.announce.remote(version), timeout=COMMIT_S)

    def _changed(self) -> bool:
        """Whether the engines are others than those of the version before: one that started anew is in no group."""
        before, self._members = self._members, ray.get(self._hub.members.remote(), timeout=COMMIT_S)
        return self._members != before

    def _send(self, version: int, weights: Stream, changed: bool) -> None:
        if self._trainer is None or changed:
            if self._trainer is not None:
                self._trainer.shutdown()
            source = Source(weights)
            info = init_info(self._backend, self._rank, 1 + sum(m.ranks for m in self._members), source.largest())
            client = Engines(self._members)
            self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
        self._trainer.client.version = version
        self._trainer.send_weights()


def init_info(backend: str, rank: int, world_size: int, largest: int) -> TrainerInitInfo:
    """What vLLM's trainer of this backend starts with.

    Args:
        backend: nccl or ipc.
        rank: of the learner.
        world_size: rank 0 and all engines' processes.
        largest: bytes of a tensor; one must fit into a bucket.
    """
    bucket = max(BUCKET_BYTES, largest)
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=free_port(""),
            world_size=world_size,
            packed_buffer_size_bytes=bucket,
            rank=rank,
        )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=bucket, rank=rank)


def within(seconds: float, what: str, work: Callable[[], None]) -> None:
    """Do it, in another thread: a collective call whose peer has died never returns.

    Raises:
        RuntimeError: it took longer.
    """
    try:
        background(work).result(seconds)
    except FutureTimeout:
        raise RuntimeError(f"{what} took longer than {seconds:g} s; has one of them died?") from None
