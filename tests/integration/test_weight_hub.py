"""Weights through host memory: from a learner's process to engines' processes on its node and on another."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from actors.buckets import BucketGone, Reader, tensors
from actors.weights import Publisher, Puller, WeightHub, Weights

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import tests


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    """A learner's node, which this process is on, and another."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        options = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=options | {"resources": {"here": 9}})
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20, resources={"there": 9})
        ray.init(address=cluster.address, log_to_driver=False)
        yield
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def hub(nodes: None) -> Iterator[Any]:
    hub = WeightHub.options(num_cpus=0, resources={"here": 1}).remote()  # type: ignore[attr-defined]
    yield hub
    ray.kill(hub)


def some(seed: int, numbers: int = 1000) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(numbers).bfloat16() for i in range(3)} | {"norm": torch.randn(7)}


@ray.remote(num_cpus=0)
class Replica:
    """An engine's place: pulls what is newest."""

    def __init__(self, hub: Any) -> None:
        self._hub, self._puller, self._reader = hub, Puller(hub), Reader()

    async def newest(self, wait_s: float = 0.0) -> tuple[int, int, dict[str, Tensor]]:
        _, weights = await self._hub.newer.remote(None, 10.0)
        return await self.pull(weights, wait_s)

    async def pull(self, weights: Weights, wait_s: float = 0.0) -> tuple[int, int, dict[str, Tensor]]:
        async with self._puller.pull(weights) as buckets:
            await asyncio.sleep(wait_s)
            contents = self._reader.map(b.path for b in buckets)
            found = {n: t.clone() for b, c in zip(buckets, contents, strict=True) for n, t in tensors(c, b.pieces)}
        return weights.version, weights.checksum, found


@ray.remote(num_cpus=0, resources={"here": 1})
class Learner:
    """A learner's process that can be killed."""

    def __init__(self, hub: Any) -> None:
        self._publisher = Publisher(hub)

    def publish(self, version: int, seed: int) -> None:
        self._publisher.publish(version, some(seed).items)

    def die_publishing(self, version: int) -> None:
        def stream() -> Iterator[tuple[str, Tensor]]:
            yield "layers.0.weight", torch.zeros(1000)
            os._exit(1)

        self._publisher.publish(version, stream)


def equal(found: dict[str, Tensor], seed: int) -> bool:
    wanted = some(seed)
    return list(found) == list(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)


def replica(hub: Any, where: str) -> Any:
    return Replica.options(resources={where: 1}).remote(hub)  # type: ignore[attr-defined]


def test_replicas_on_every_node_get_the_same_weights_and_a_late_one_the_newest(hub: Any) -> None:
    publisher, replicas = Publisher(hub), [replica(hub, "here"), replica(hub, "there")]
    for version in range(1, 5):
        publisher.publish(version, some(version).items)
        answers = ray.get([r.newest.remote() for r in replicas], timeout=60)
        assert {(v, c) for v, c, _ in answers} == {(version, ray.get(hub.current.remote())[1])}
        assert all(equal(found, version) for _, _, found in answers)
    late = ray.get([replica(hub, where).newest.remote() for where in ("here", "there")], timeout=60)
    assert all(v == 4 and equal(found, 4) for v, _, found in late)


def test_what_a_replica_reads_stays_while_newer_versions_are_published(hub: Any) -> None:
    publisher, slow = Publisher(hub), replica(hub, "here")
    publisher.publish(1, some(1).items)
    reading = slow.newest.remote(2.0)
    time.sleep(1.0)
    for version in range(2, 8):
        publisher.publish(version, some(version).items)
    assert equal(ray.get(reading, timeout=30)[2], 1)
    assert equal(ray.get(slow.newest.remote(), timeout=30)[2], 7)


def test_a_replica_of_another_node_may_take_longer_than_a_step_to_pull(hub: Any) -> None:
    publisher, slow = Publisher(hub), replica(hub, "there")
    publisher.publish(1, some(1).items)
    _, old = ray.get(hub.newer.remote(None, 10.0))
    publisher.publish(2, some(2).items)
    assert equal(ray.get(slow.pull.remote(old), timeout=60)[2], 1)
    assert equal(ray.get(slow.newest.remote(), timeout=60)[2], 2)


@pytest.mark.parametrize("where", ["here", "there"])
def test_weights_that_were_written_over_are_gone_and_newer_ones_are_there(hub: Any, where: str) -> None:
    publisher, late = Publisher(hub), replica(hub, where)
    publisher.publish(1, some(1).items)
    _, old = ray.get(hub.newer.remote(None, 10.0))
    for version in (2, 3):
        publisher.publish(version, some(version).items)
    with pytest.raises(BucketGone):
        ray.get(late.pull.remote(old), timeout=60)
    assert equal(ray.get(late.newest.remote(), timeout=60)[2], 3)


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_learner_that_dies_while_it_publishes_leaves_the_version_before(hub: Any, where: str) -> None:
    first = Learner.remote(hub)  # type: ignore[attr-defined]
    ray.get(first.publish.remote(1, 1), timeout=60)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(first.die_publishing.remote(2), timeout=60)
    late = replica(hub, where)
    version, _, found = ray.get(late.newest.remote(), timeout=60)
    assert version == 1 and equal(found, 1)
    second = Learner.remote(hub)  # type: ignore[attr-defined]
    ray.get(second.publish.remote(2, 2), timeout=60)
    assert equal(ray.get(late.newest.remote(), timeout=60)[2], 2)


def test_a_publication_that_fails_leaves_the_version_before(hub: Any) -> None:
    publisher = Publisher(hub)
    publisher.publish(1, some(1).items)
    with pytest.raises(ValueError, match="no weights to publish"):
        publisher.publish(2, {}.items)
    assert ray.get(hub.current.remote())[0] == 1
    assert equal(ray.get(replica(hub, "here").newest.remote(), timeout=60)[2], 1)


def test_other_ranks_take_part_in_the_pass_and_publish_nothing(hub: Any) -> None:
    passed: list[str] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in some(1).items():
            passed.append(name)
            yield name, tensor

    Publisher(hub, rank=1).publish(1, stream)
    assert passed == list(some(1)) and ray.get(hub.current.remote()) == (None, 0)
