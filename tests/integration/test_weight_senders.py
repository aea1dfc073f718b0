"""What NCCL and CUDA IPC need of us, checked against vLLM's classes: neither runs without a GPU."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine, VLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from actors import weight_senders, weights
from actors.engine import TRANSFERS
from actors.weight_senders import DirectSender, Engines, Source, init_info, within
from actors.weights import Member, WeightHub

pytestmark = pytest.mark.integration
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import tests


@ray.remote(num_cpus=0, max_restarts=-1)
class Recorder:
    """In a rollout worker's place."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._life, self.sleepless = "", False

    async def life(self) -> str:
        return self._life

    async def sleep(self, life: str, version: int) -> None:
        self.calls.append((life == self._life, version))

        if self.sleepless:
            await asyncio.sleep(60)

    async def live(self, life: str, sleepless: bool = False) -> str:
        self._life, self.sleepless = life, sleepless
        return life

    async def hang(self) -> None:
        time.sleep(2)

    async def die(self) -> None:
        os._exit(1)

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
    client = Engines([Member(w, "", ranks) for w, ranks in zip(workers, (2, 1, 4), strict=True)])
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


class Sending(TrainerWeightTransferEngine[Any]):
    """Rank 0's part without a GPU: a pass over the weights."""

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Sending:
        return cls(client=client, source=source, is_sender=True)

    def send_weights(self) -> None:
        assert self.source is not None
        assert [name for name, _ in self.source] == [m.name for m in self.source.metadata()]


def test_all_ranks_make_as_many_passes_over_the_weights_also_when_engines_start_anew(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = WeightHub.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    said: list[Any] = []  # by rank 0 to rank 1

    def led(work: Callable[[], Any], rank: int, ranks: int) -> Any:
        assert ranks == 2
        if rank == 0:
            said.append(work())
        return said[-1]

    monkeypatch.setattr(weight_senders, "led", led)
    senders = [(DirectSender("nccl", hub, rank, 2), Passes()) for rank in range(2)]
    real = WeightTransferTrainerFactory._registry["nccl"]
    worker = Recorder.remote()  # type: ignore[attr-defined]
    for version, joins, count in ((1, True, 2), (2, False, 3), (3, True, 5), (4, False, 6)):  # 2 for a new group
        if joins:
            ray.get(hub.join.remote("rollout-0", worker, worker.live.remote(f"life {version}"), 1), timeout=60)
        for trainer, (sender, passes) in zip((lambda: Sending, real), senders, strict=True):
            monkeypatch.setitem(WeightTransferTrainerFactory._registry, "nccl", trainer)
            sender.publish(version, passes)
            assert passes.count == count
            assert ray.get(hub.current.remote(), timeout=60) == (version, 0), "rank 0 announces"


async def test_an_engine_that_died_or_is_not_ready_yet_is_sent_nothing_until_it_joins_anew(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "ANSWER_S", 0.5)
    hub = WeightHub.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    one, two = (Recorder.remote() for _ in range(2))  # type: ignore[attr-defined]

    async def join(name: str, worker: Any, life: str) -> None:
        await hub.join(name, worker, await worker.live.remote(life), 0)
        assert (worker, life) not in await present(), "it is about to start"
        await hub.join(name, worker, life, 1)

    async def present() -> list[tuple[Any, str]]:
        return [(m.worker, m.life) for m in await hub.members()]

    await join("one", one, "a")
    await join("two", two, "b")
    assert await present() == [(one, "a"), (two, "b")]
    busy = two.hang.remote()
    await asyncio.sleep(0.2)
    assert await present() == [(one, "a")], "one that does not answer is left out"
    await busy
    assert await present() == [(one, "a"), (two, "b")]
    with pytest.raises(ray.exceptions.RayActorError):
        await one.die.remote()
    assert await present() == [(two, "b")]
    while True:  # it is there again, with an engine that is in no group
        try:
            assert await one.life.remote() == ""
            break
        except ray.exceptions.ActorUnavailableError:
            await asyncio.sleep(0.1)
    assert await present() == [(two, "b")]
    await join("one", one, "c")
    assert await present() == [(one, "c"), (two, "b")]


async def test_in_the_learners_turn_every_engine_sleeps_and_none_starts(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = WeightHub.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    one, two = (Recorder.remote() for _ in range(2))  # type: ignore[attr-defined]
    await hub.announce(3)
    await hub.join("one", one, await one.live.remote("a"), 1)
    await hub.join("two", two, await two.live.remote("b"), 0)
    await hub.rest()
    assert await asyncio.gather(one.told.remote(), two.told.remote()) == [[(True, 3)]] * 2
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hub.join("two", two, "another", 0), 0.2)
    await asyncio.wait_for(hub.join("two", two, "b", 1), 5.0)  # it was starting when the turn began
    starting = asyncio.create_task(hub.join("two", two, "another", 0))
    await asyncio.sleep(0.1)
    await hub.announce(4)
    await asyncio.wait_for(starting, 5.0)
    with pytest.raises(ray.exceptions.RayActorError):
        await one.die.remote()
    await hub.rest()  # what died holds nothing, and the new life of the other has not begun
    assert await two.told.remote() == [(True, 3), (False, 4)]

    monkeypatch.setattr(weights, "SLEEP_S", 0.5)
    await two.live.remote("another", sleepless=True)
    with pytest.raises(RuntimeError, match=r"the learner waited 0\.5 s for the engine of two to fall asleep"):
        await hub.rest()


def test_a_transfer_whose_peer_died_ends_in_one_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"sending version 3 took longer than 0\.1 s; has one of them died\?"):
        within(0.1, "sending version 3", lambda: time.sleep(5))
    with pytest.raises(ZeroDivisionError):
        within(5.0, "dividing", lambda: 1 / 0)  # type: ignore[arg-type]
