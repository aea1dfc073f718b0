"""New weights under running requests: two vLLM engines follow a DeepSpeed learner, and outlive what goes wrong."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from actors import weight_senders
from actors.buckets import Bucket, Pool, fill
from actors.engine import WeightsRefused
from actors.feeder import group_rows
from actors.rollout import RolloutWorker
from actors.store import StoreActor, StoreClient
from actors.weight_senders import DirectSender
from actors.weights import Publisher, WeightHub, Weights
from learners.engine import Learner
from learners.packing import Sample, collate, pack
from learners.policy import score
from learners.sft import build_policy
from replay.record import Prompt

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import tests

SEQUENCE = [5, 300, 17, 42, 99, 7, 256, 31, 8, 270, 11, 4]
CLOSE = 2e-4  # nats, between two float32 implementations


@dataclass
class LoopInfo(TrainerInitInfo):
    backend = "loop"


class Loop(TrainerWeightTransferEngine[LoopInfo]):
    """A trainer as vLLM's are, which sends through host memory."""

    init_info_cls = LoopInfo

    @classmethod
    def trainer_init(cls, init_info: LoopInfo, *, client: Any, source: Any = None) -> Loop:
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        assert self.source is not None
        with Pool().turn() as take:
            buckets = fill(take, self.source)
            assert [p.name for b in buckets for p in b.pieces] == [m.name for m in self.source.metadata()]
            self.client.start_weight_update()
            self.client.update_weights({"buckets": [b.plain() for b in buckets]})
            self.client.finish_weight_update()


class Bench:
    """A learner in this process, engines, and what lies between them; with `lora`, one engine that takes adapters."""

    def __init__(self, folder: Path, lora: dict[str, Any] | None = None) -> None:
        texts = ("the quick brown fox jumps over the lazy dog and reads a book about cats",) * 20
        build_policy(folder / "policy", texts, vocab_size=320, hidden_size=64, layers=2, heads=2, seed=3)
        self.learner = Learner(folder / "policy", lr=3e-2, threads=1, tokens_per_microbatch=256, lora=lora)
        self.version = 0
        shard = StoreActor.options(num_cpus=0).remote(str(folder / "replay"))  # type: ignore[attr-defined]
        self.store = StoreClient([shard])
        self.hub = WeightHub.options(num_cpus=0).remote()  # type: ignore[attr-defined]
        ray.get(self.hub.publish.remote(Weights(0)), timeout=60)
        self.stream = self.learner.adapter if lora else self.learner.weights
        self.publisher = Publisher(self.hub, adapter=self.learner.adapter_config if lora else "")
        engine: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 32 << 20,
            "enable_sleep_mode": True,
        }
        if lora:
            engine |= {"enable_lora": True, "max_lora_rank": lora["r"], "max_loras": 2}
        self.workers = [
            RolloutWorker.options(num_cpus=0, max_restarts=-1).remote(  # type: ignore[attr-defined]
                self.store,
                self.hub,
                model=str(folder / "policy"),
                concurrency=8,
                sampling={"max_tokens": 400, "ignore_eos": True},
                system="",
                engine=engine,
                name=f"rollout-{i}",
            )
            for i in range(1 if lora else 2)
        ]
        ray.get([w.ping.remote() for w in self.workers], timeout=500)

    def learn(self) -> None:
        """One optimiser step, far enough to be seen."""
        rng = np.random.default_rng(self.version)
        samples = [
            Sample(rng.integers(5, 300, 4), rng.integers(5, 300, 8), np.full(8, -5.0), np.ones(8), advantage=a)
            for a in (1.0, -1.0)
        ]
        self.learner.step(samples)

    def publish(self) -> int:
        self.version += 1
        self.publisher.publish(self.version, self.stream)
        return self.version

    def logprobs(self, ids: list[int]) -> list[float]:
        """The learner's, of all tokens but the first."""
        sample = Sample(np.array(ids[:1]), np.array(ids[1:]), np.zeros(len(ids) - 1), np.ones(len(ids) - 1))
        batch = collate([sample], pack([len(sample)], 1024)[0])
        with torch.no_grad():
            out, _ = score(self.learner._engine, batch)
        return out[batch.mask > 0].tolist()

    def wait_for(self, version: int, seconds: float = 60.0) -> list[tuple[int, int]]:
        """What the workers say once both have this version."""
        deadline = time.monotonic() + seconds
        while True:
            found = ray.get([w.weights.remote() for w in self.workers], timeout=60)
            if {v for v, _ in found} == {version}:
                return found
            assert time.monotonic() < deadline, f"workers have {found}, not version {version}"
            time.sleep(0.1)

    def scores(self) -> list[list[float]]:
        return ray.get([w.apply.remote(_score, SEQUENCE) for w in self.workers], timeout=60)


@pytest.mark.slow
def test_requests_end_with_the_adapter_they_began_with_and_new_ones_use_the_new_one(
    local_ray: None, tmp_path: Path
) -> None:
    """It comes before the others, whose learner stays: a process holds one."""
    bench = Bench(tmp_path, {"r": 8, "lora_alpha": 16})
    snapshots = {}
    with closing(bench.learner):
        for version in (1, 2):
            ray.get(bench.hub.rest.remote(), timeout=60)  # an adapter wakes the engine, too
            for _ in range(3):
                bench.learn()
            assert bench.publish() == version
            snapshots[version] = _copied(bench.learner)
            assert bench.wait_for(version) == [ray.get(bench.hub.current.remote())]
            rows, _ = group_rows(Prompt(f"adapter-{version}", "what is a cat?"), f"adapter-{version}", 0, 3, 0)
            bench.store.now(bench.store.put("pending", rows))
            time.sleep(0.7)  # they are under way
        made = {version: _rows(bench.store, f"adapter-{version}", 3) for version in snapshots}
        for version, snapshot in snapshots.items():
            _restore(bench.learner, snapshot)
            for row in made[version]:
                assert set(row["versions"]) == {version} and len(row["versions"]) == 400
                theirs = bench.logprobs(row["prompt_ids"] + row["token_ids"])[len(row["prompt_ids"]) - 1 :]
                assert row["logprobs"] == pytest.approx(theirs, abs=CLOSE)
        bench.publisher.publish(3, lambda: ((f"{n}x", t) for n, t in bench.learner.adapter()))
        _refused(bench.workers[0], r"cannot load the adapter of version 3")


@pytest.fixture(scope="module")
def bench(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("weights"))
    with closing(bench.learner):
        yield bench


def test_both_engines_hold_the_learners_weights_version_after_version(bench: Bench) -> None:
    before = bench.logprobs(SEQUENCE)
    for found in bench.scores():
        assert found == pytest.approx(before, abs=CLOSE)
    for _ in range(4):
        bench.learn()
        version = bench.publish()
        told = bench.wait_for(version)
        assert set(told) == {ray.get(bench.hub.current.remote())} and told[0][1] != 0
        after = bench.logprobs(SEQUENCE)
        assert max(abs(a - b) for a, b in zip(after, before, strict=True)) > 50 * CLOSE, "the step changed nothing"
        for found in bench.scores():
            assert found == pytest.approx(after, abs=CLOSE)
        before = after


def test_engines_keep_nothing_of_the_memory_that_weights_came_in(bench: Bench) -> None:
    version = bench.publish()
    bench.wait_for(version)
    expected = bench.logprobs(SEQUENCE)
    for _ in range(2):
        with bench.publisher._pool.turn() as take:
            fill(take, ((name, torch.zeros_like(t)) for name, t in bench.learner.weights()))
    for found in bench.scores():
        assert found == pytest.approx(expected, abs=CLOSE)


def test_requests_go_on_under_new_weights_and_each_token_says_which_made_it(bench: Bench) -> None:
    rows, _ = group_rows(Prompt("in-flight", "what is a cat?"), "flight", 0, 6, 0)
    bench.store.now(bench.store.put("pending", rows))
    snapshots = {bench.version: _copied(bench.learner)}
    for _ in range(2):
        time.sleep(0.7)
        bench.learn()
        bench.publish()
        snapshots[bench.version] = _copied(bench.learner)
        bench.wait_for(bench.version)
    made = _rows(bench.store, "flight", 6)
    assert any(len(set(r["versions"])) > 1 for r in made), [sorted(set(r["versions"])) for r in made]
    for version, snapshot in snapshots.items():
        _restore(bench.learner, snapshot)
        for row in made:
            assert row["versions"] == sorted(row["versions"]) and len(row["versions"]) == 400
            ids = row["prompt_ids"] + row["token_ids"]
            theirs = bench.logprobs(ids)[len(row["prompt_ids"]) - 1 :]
            of_version = [i for i, v in enumerate(row["versions"]) if v == version]
            assert [row["logprobs"][i] for i in of_version] == pytest.approx([theirs[i] for i in of_version], abs=CLOSE)


def test_engines_sleep_while_the_learner_works_and_its_weights_wake_them(bench: Bench) -> None:
    ray.get([w.apply.remote(_calls) for w in bench.workers], timeout=60)
    rows, _ = group_rows(Prompt("asleep", "what is a cat?"), "asleep", 0, 6, 0)
    bench.store.now(bench.store.put("pending", rows))
    time.sleep(0.7)  # they are under way
    snapshots = {bench.version: _copied(bench.learner)}
    for _ in range(2):
        ray.get(bench.hub.rest.remote(), timeout=60)
        for _ in range(2):
            assert ray.get([w.apply.remote(_asleep) for w in bench.workers], timeout=60) == [True, True]
            bench.learn()
        bench.publish()
        snapshots[bench.version] = _copied(bench.learner)
        bench.wait_for(bench.version)
        assert ray.get([w.apply.remote(_asleep) for w in bench.workers], timeout=60) == [False, False]
        time.sleep(0.3)
    made = _rows(bench.store, "asleep", 6)
    assert any(len(set(r["versions"])) > 1 for r in made), [sorted(set(r["versions"])) for r in made]
    for version, snapshot in snapshots.items():
        _restore(bench.learner, snapshot)
        for row in made:
            assert len(row["versions"]) == 400, "what was under way went on"
            theirs = bench.logprobs(row["prompt_ids"] + row["token_ids"])[len(row["prompt_ids"]) - 1 :]
            of_version = [i for i, v in enumerate(row["versions"]) if v == version]
            assert [row["logprobs"][i] for i in of_version] == pytest.approx([theirs[i] for i in of_version], abs=CLOSE)
    for worker in bench.workers:
        assert ray.get(worker.apply.remote(lambda w: w.asked), timeout=60) == 2 * [
            ("sleep", {"level": 1, "mode": "keep"}),
            ("wake_up", {}),
            ("pause_generation", {"mode": "keep", "clear_cache": True}),
            ("update_weights", {}),
            ("resume_generation", {}),
        ]
        assert ray.get(worker.ping.remote(), timeout=60)["asleep_s"] > 0


@pytest.mark.slow
def test_an_engine_does_not_start_in_the_learners_turn(bench: Bench) -> None:
    old, engine = _engine(bench.workers[0])
    ray.get(bench.hub.rest.remote(), timeout=60)
    psutil.Process(old).kill()
    psutil.wait_procs([engine], timeout=30)
    while True:
        with contextlib.suppress(ray.exceptions.ActorUnavailableError):
            answer = bench.workers[0].ping.remote()
            with pytest.raises(ray.exceptions.GetTimeoutError):
                ray.get(answer, timeout=20)
            break
    pid = ray.get(bench.workers[0].apply.remote(_pid), timeout=60)
    assert pid != old and psutil.Process(pid).children(recursive=True) == []
    bench.learn()
    bench.publish()
    ray.get(answer, timeout=120)
    bench.wait_for(bench.version)
    for found in bench.scores():
        assert found == pytest.approx(bench.logprobs(SEQUENCE), abs=CLOSE)


def test_a_learner_can_drive_vllms_own_transfer_over_all_engines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_senders, "init_info", lambda backend, rank, world_size, largest: LoopInfo(rank=rank))
    monkeypatch.setitem(WeightTransferTrainerFactory._registry, LoopInfo.backend, lambda: Loop)
    for i, worker in enumerate(bench.workers):
        life = ray.get(worker.life.remote(), timeout=60)
        ray.get(bench.hub.join.remote(f"rollout-{i}", worker, life, 1), timeout=60)
    sender = DirectSender("loop", bench.hub)
    for _ in range(2):
        bench.learn()
        bench.version += 1
        sender.publish(bench.version, bench.learner.weights)
        assert bench.wait_for(bench.version) == [(bench.version, 0)] * 2
        for found in bench.scores():
            assert found == pytest.approx(bench.logprobs(SEQUENCE), abs=CLOSE)
    bench.wait_for(bench.publish())  # and those that can be pulled are taken after it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.norm.weight": torch.ones(3)}, r"'model\.norm\.weight' of shape \(3,\) does not fit"),
        (
            lambda w: w | {"model.layers.0.self_attn.k_proj.weight": torch.ones(3, 64)},
            r"'model\.layers\.0\.self_attn\.k_proj\.weight' of shape \(3, 64\) does not fit",
        ),
        (lambda w: w | {"model.layers.9.norm.weight": torch.ones(3)}, r"'model\.layers\.9\.norm\.weight'"),
        (lambda w: _without(w, "model.norm.weight"), r"missing of 1 layers, such as model\.norm"),
        (lambda w: _without(w, "model.layers.1.self_attn.k_proj.weight"), r"such as model\.layers\.1\.self_attn\.qkv"),
        (lambda w: _without(w, "model.embed_tokens.weight"), r"missing of 2 layers"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_and_right_ones_mend_the_engine(
    bench: Bench, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    wrong = change(dict(bench.learner.weights()))
    with Pool().turn() as take:
        with pytest.raises(WeightsRefused, match=f"cannot load version 9999.*{message}"):
            ray.get(bench.workers[0].apply.remote(_update, fill(take, wrong.items()), 9999), timeout=60)
        bench.wait_for(bench.publish())
    assert bench.scores()[0] == pytest.approx(bench.logprobs(SEQUENCE), abs=CLOSE)


@pytest.mark.slow
def test_an_engine_that_dies_in_the_middle_of_an_update_starts_anew_with_the_newest_weights(bench: Bench) -> None:
    rows, _ = group_rows(Prompt("killed", "what is a dog?"), "killed", 0, 8, 0)
    old, engine = _engine(bench.workers[0])
    engine.suspend()  # it answers nothing from here on
    bench.learn()
    bench.publish()
    bench.store.now(bench.store.put("pending", rows))
    time.sleep(3.0)
    assert ray.get(bench.workers[0].weights.remote(), timeout=60)[0] == bench.version - 1
    engine.kill()
    _wait_for_another_life(bench.workers[0], old)
    bench.wait_for(bench.version)
    for found in bench.scores():
        assert found == pytest.approx(bench.logprobs(SEQUENCE), abs=CLOSE)
    assert len(_rows(bench.store, "killed", 8)) == 8, "what the dead engine had under way is written by another"


@pytest.mark.slow
def test_an_engine_that_hangs_while_nothing_is_updated_is_replaced(bench: Bench) -> None:
    old, engine = _engine(bench.workers[0])
    ray.get(bench.workers[0].apply.remote(_impatient), timeout=60)
    engine.suspend()
    rows, _ = group_rows(Prompt("hung", "what is a dog?"), "hung", 0, 8, 0)
    bench.store.now(bench.store.put("pending", rows))
    _wait_for_another_life(bench.workers[0], old)
    assert len(_rows(bench.store, "hung", 8)) == 8


def test_an_engine_that_misses_newer_weights_leaves_the_prompts_to_the_others(bench: Bench) -> None:
    [newest] = {v for v, _ in ray.get([w.weights.remote() for w in bench.workers], timeout=60)}
    ray.get(bench.workers[0].apply.remote(_told, newest + 1), timeout=60)  # in the middle of a claim, most likely
    for i in range(4):
        rows, _ = group_rows(Prompt(f"missed-{i}", "what is a dog?"), "missed", i, 2, 0)
        bench.store.now(bench.store.put("pending", rows))
    assert {row["worker"] for row in _rows(bench.store, "missed", 8)} == {"rollout-1"}
    ray.get(bench.workers[0].apply.remote(_told, newest), timeout=60)


def test_a_prompt_that_the_engine_cannot_take_is_dropped_and_its_worker_goes_on(bench: Bench) -> None:
    for name, question in (("long", "what is a cat? " * 200), ("after", "what is a cat?")):
        rows, _ = group_rows(Prompt(name, question), name, 0, 4, 0)
        bench.store.now(bench.store.put("pending", rows))
    assert len(_rows(bench.store, "after", 4)) == 4
    assert bench.store.now(bench.store.state("long"))["counts"] == {"dropped_data": 4}
    [_, (status, why), *_] = bench.store.now(bench.store.ends("long")).values()
    assert status == "dropped_data" and why.startswith("prompt: This model's maximum context length is 512 tokens")
    assert sum(w["data"] for w in ray.get([w.ping.remote() for w in bench.workers], timeout=60) if "data" in w) == 4


def test_wrong_weights_end_a_worker_in_one_clear_sentence(bench: Bench) -> None:
    wrong = dict(bench.learner.weights()) | {"model.norm.weight": torch.ones(3)}
    bench.publisher.publish(bench.version + 1, wrong.items)
    _refused(bench.workers[1], r"cannot load version \d+: .*'model\.norm\.weight' of shape \(3,\)")


async def _update(worker: Any, buckets: list[Bucket], version: int) -> None:
    await worker._engine.update(buckets, version)


async def _score(worker: Any, ids: list[int]) -> list[float]:
    return await worker._engine.score(f"score-{time.monotonic()}", ids)


def _engine(worker: Any) -> tuple[int, psutil.Process]:
    """A worker's process, and its engine's."""
    pid = ray.get(worker.apply.remote(_pid), timeout=60)
    deadline = time.monotonic() + 10
    while True:
        found = psutil.Process(pid).children(recursive=True)
        if engines := [p for p in found if "EngineCore" in " ".join(p.cmdline())]:
            return pid, engines[0]
        assert time.monotonic() < deadline, f"no engine among the processes of {pid}: {[p.cmdline() for p in found]}"
        time.sleep(0.2)


def _impatient(worker: Any) -> None:
    import actors.engine

    actors.engine.CALL_S = 2.0


def _wait_for_another_life(worker: Any, old: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(ray.exceptions.ActorUnavailableError):
            ray.get(worker.ping.remote(), timeout=120)  # the first ping of a new life starts its loop
            if ray.get(worker.apply.remote(_pid), timeout=60) != old:
                return
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _refused(worker: Any, why: str) -> None:
    deadline = time.monotonic() + 60
    with pytest.raises(WeightsRefused, match=why):
        while time.monotonic() < deadline:
            ray.get(worker.ping.remote(), timeout=60)
            time.sleep(0.2)


def _without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: t for n, t in weights.items() if n != name}


def _copied(learner: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in learner.model.parameters()]


def _restore(learner: Learner, snapshot: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, old in zip(learner.model.parameters(), snapshot, strict=True):
            parameter.copy_(old)


def _rows(store: StoreClient, purpose: str, count: int) -> list[dict[str, Any]]:
    """All documents of a purpose, once they are written."""
    claims: list[pa.Table] = []
    deadline = time.monotonic() + 120
    while sum(c.num_rows for c in claims) < count:
        columns = ["prompt_ids", "token_ids", "logprobs", "versions", "worker"]
        claim = store.now(
            store.claim("generated", limit=count, lease_s=300.0, columns=columns, purpose=purpose, wait_s=5.0)
        )
        claims += [claim.rows] if claim else []
        assert time.monotonic() < deadline, f"{sum(c.num_rows for c in claims)} of {count} documents"
    return [row for c in claims for row in c.to_pylist()]


def _told(worker: Any, version: int) -> None:
    worker._newest = version


async def _asleep(worker: Any) -> bool:
    return await worker._engine._llm.is_sleeping()


def _calls(worker: Any) -> None:
    """From now on remember what is asked of vLLM."""
    worker.asked, llm = [], worker._engine._llm

    def watched(name: str, call: Any) -> Any:
        def made(*args: Any, **options: Any) -> Any:
            worker.asked.append((name, options))
            return call(*args, **options)

        return made

    for name in ("sleep", "wake_up", "pause_generation", "update_weights", "resume_generation"):
        setattr(llm, name, watched(name, getattr(llm, name)))


def _pid(worker: Any) -> int:
    return os.getpid()
