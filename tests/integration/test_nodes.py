"""Shards of one store on several nodes: two raylets, each with a place for a shard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.store import StoreActor, StoreClient
from replay.record import Blob
from replay.verify import verify
from replay.view import View, make_shards
from tests.replay.rows import pending, row

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

GROUPS = 12
NODE = {"num_cpus": 1, "resources": {"store": 1}, "object_store_memory": 128 << 20}


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    os.environ.pop("RAY_ADDRESS", None)
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


async def test_a_store_whose_shards_lie_on_two_nodes_is_one_and_survives_the_loss_of_a_node(
    two_nodes: Cluster, tmp_path: Path
) -> None:
    urls = make_shards(str(tmp_path), 2)
    shards = [StoreActor.options(num_cpus=0, resources={"store": 1}).remote(url) for url in urls]  # type: ignore[attr-defined]
    store = StoreClient(shards)
    blobs = [Blob(f"picture {k}".encode() * 1000) for k in range(GROUPS)]
    for k, blob in enumerate(blobs):
        assert await store.put("pending", pending(f"g{k}", given=[blob.sha256]), [blob]) == ["ok", "ok"]
    where = [await s.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()) for s in shards]
    assert len(set(where)) == 2
    held = [(await shard.state.remote())["groups"]["accepted"] for shard in shards]
    assert min(held) > 0 and sum(held) == GROUPS

    names = [f"g{k}/{i}" for k in range(GROUPS) for i in range(2)]
    rows = await store.get(names, ["given"])
    assert rows["trajectory"].to_pylist() == names
    assert await store.blobs(b.sha256 for b in blobs) == {b.sha256: b for b in blobs}
    claimed = []
    while claim := await store.claim("pending", limit=5, lease_s=60.0, columns=["question"], by_group=True):
        claimed += claim.trajectories
    assert sorted(claimed) == sorted(names)

    [other] = two_nodes.worker_nodes
    two_nodes.remove_node(other, allow_graceful=False)  # as a machine that loses power
    two_nodes.add_node(**NODE)
    for name in names:
        assert await store.put("generated", row("generated", name, versions=[1])) == ["ok"]
    assert (await store.state())["counts"] == {"generated": len(names)}
    await store.close()
    assert verify(tmp_path).problems == [] and View(tmp_path).counts() == {"generated": len(names)}
