"""What NCCL and CUDA IPC need of us, checked against vLLM's classes: neither runs without a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from actors.engine import TRANSFERS
from actors.weight_senders import DirectSender, Engines, Source, init_info, within
from actors.weights import Member, WeightHub

pytestmark = pytest.mark.integration
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import tests


@ray.remote(num_cpus=0)
class Recorder:
    """In a rollout worker's place."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def transfer(self, *call: Any) -> None:
        self.calls.append(call)

    def told(self) -> list[tuple[Any, ...]]:
        return self.calls


class Passes:
    """A stream of weights that counts the passes over it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        self.count += 1
        yield "model.embed_tokens.weight", torch.ones(4, 2, dtype=torch.bfloat16)
        yield "model.norm.weight", torch.ones(2)


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_vllm_has_both_sides_of_the_backend_and_takes_what_we_give_its_trainer(backend: str) -> None:
    assert TRANSFERS[backend] in WeightTransferEngineFactory._registry
    info = init_info(backend, 0, 3, largest=1 << 30)
    trainer = WeightTransferTrainerFactory._registry[info.backend]()
    assert isinstance(info, trainer.init_info_cls) and info.is_sender
    assert info.packed and info.packed_buffer_size_bytes == 1 << 30, "a bucket must hold the largest tensor"
    assert init_info(backend, 1, 3, largest=1).packed_buffer_size_bytes == 256 << 20


def test_every_engine_gets_ranks_of_its_own_and_each_step_in_order(local_ray: None) -> None:
    workers = [Recorder.remote() for _ in range(3)]  # type: ignore[attr-defined]
    client = Engines([Member(w, ranks, 1) for w, ranks in zip(workers, (2, 1, 4), strict=True)])
    assert isinstance(client, VLLMWeightSyncClient)
    client.version = 7
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    told = ray.get([w.told.remote() for w in workers], timeout=60)
    assert [calls[0][1] for calls in told] == [{"rank_offset": r, "world_size": 8} for r in (1, 3, 4)]
    for calls in told:
        assert [(step, version) for step, _, version in calls] == [
            ("init_weight_transfer_engine", None),
            ("start_weight_update", None),
            ("update_weights", None),
            ("finish_weight_update", 7),
        ]


def test_the_source_says_beforehand_what_comes_and_passes_on_tied_embeddings_twice() -> None:
    source = Source(passes := Passes())
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    first = source.metadata()[0]
    assert (first.name, first.dtype, first.shape) == (names[0], torch.bfloat16, (4, 2))
    assert [m.name for m in source.metadata()] == [name for name, _ in source] == [n for n, _ in source] == names
    assert passes.count == 3 and source.largest() == 16


def test_a_rank_that_does_not_send_takes_part_in_each_pass_of_vllms_nccl_trainer(local_ray: None) -> None:
    hub, passes = WeightHub.options(num_cpus=0).remote(), Passes()  # type: ignore[attr-defined]
    sender = DirectSender("nccl", hub, rank=1)
    for version, count in ((1, 2), (2, 3)):  # one more at first, for the names and shapes
        sender.publish(version, passes)
        assert passes.count == count
    assert ray.get(hub.current.remote(), timeout=60) == (None, 0), "rank 0 alone announces"


def test_a_transfer_whose_peer_died_ends_in_one_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"sending version 3 took longer than 0\.1 s; has one of them died\?"):
        within(0.1, "sending version 3", lambda: time.sleep(5))
    with pytest.raises(ZeroDivisionError):
        within(5.0, "dividing", lambda: 1 / 0)  # type: ignore[arg-type]
