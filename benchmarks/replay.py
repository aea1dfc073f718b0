"""The replay store beside what one could use instead, and its speed at what a run asks of it all the time.

Appends are durable, batch by batch, of rows that never repeat; the writers take turns within a round, so that the
machine's other work hits all alike. Reads are of a store opened anew, without Ray, and of a Parquet file of the same
rows, both in the page cache. Redis is there where `redis-server` and its Python client are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import Config
from cluster.console import say
from cluster.store_rivals import BareFile, Batch, Redis, Sqlite, ThroughStore, Writer
from replay.record import SCHEMAS
from replay.store import Store

OVERRIDES = ()
ROUNDS = 5
TOKENS, IMAGES, IMAGE_BYTES = 1000, 2, 200_000  # of a row that is appended
APPENDED, BATCH = 256, 16  # rows a round, and of them at once
REST_S = 4.0  # before a writer's turn, for the disk to end what it was given
WARM_BYTES = 1 << 30  # taken and given back before a turn: a host hands memory to a virtual machine at a disk's speed
STORED, READ, ROW_GROUP = 6000, 200, 64  # rows of a 100 MB segment, of a random read, of a Parquet row group
CLAIMED, CLAIM = 20_000, 64  # rows in all, and at once
MANY, TABLE = 1_000_000, 50_000  # small rows of a store that is opened, and of the tables it is made of
SMALL_TOKENS = 10
COLUMNS = ["token_ids", "logprobs"]
OPEN_S = 600.0
SAMPLES = 8  # of a group


def run(config: Config) -> dict[str, float]:
    """Returns rows/s of appends relative to the rivals', times of random reads, claims a second, cost of opening."""
    results: dict[str, float] = {}
    for part in (appends, reads, claims, opening):
        folder, started = Path(config.folder) / part.__name__, time.perf_counter()
        results |= part(folder)
        shutil.rmtree(folder)
        say(f"{part.__name__}: {time.perf_counter() - started:.0f} s")
    return results


def appends(folder: Path) -> dict[str, float]:
    """`append_vs_*`: the store's rows/s divided by each rival's, medians over the rounds."""
    rivals: dict[str, type[Writer]] = {"raw": BareFile, "sqlite": Sqlite}
    if shutil.which("redis-server") and importlib.util.find_spec("redis"):
        rivals["redis"] = Redis
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(ThroughStore(folder / "store")))
        writers: dict[str, Writer] = {"store": store}
        for name, rival in rivals.items():
            writers[name] = stack.enter_context(contextlib.closing(rival(folder / name)))
        rounds = [_append_round(turn, store, writers, rng) for turn in range(ROUNDS + 1)]
    return {  # the first round warms all up
        f"append_vs_{name}": statistics.median(r[name] / r["store"] for r in rounds[1:]) for name in rivals
    }


def _append_round(
    turn: int, store: ThroughStore, writers: Mapping[str, Writer], rng: np.random.Generator
) -> dict[str, float]:
    """Seconds of each writer for the same new rows, in an order that turns around every time."""
    first = turn * APPENDED
    batches = [batch(i, rng) for i in range(first, first + APPENDED, BATCH)]
    store.accept(pending(first, APPENDED))
    order = sorted(writers, reverse=turn % 2 == 0)
    seconds = {}
    for name in order:
        time.sleep(REST_S)
        np.ones(WARM_BYTES, np.uint8)
        seconds[name] = timed(writers[name].append, batches)
    say("  ".join([f"round {turn}", *(f"{name} {APPENDED / s:.0f} rows/s" for name, s in seconds.items())]))
    return seconds


def reads(folder: Path) -> dict[str, float]:
    """`random_200_ms`, and `random_vs_parquet`: the time that the same rows take from Parquet, divided by it."""
    rng = np.random.default_rng(1)
    tables = [generated(i, BATCH, TOKENS, rng) for i in range(0, STORED, BATCH)]
    store = Store(folder / "store")
    store.put("pending", pending(0, STORED))
    for table in tables:
        store.put("generated", table)
    store.close()
    pq.write_table(pa.concat_tables(tables), folder / "rows.parquet", row_group_size=ROW_GROUP)
    seconds: dict[str, list[float]] = {"store": [], "parquet": []}
    for _ in range(ROUNDS):
        rows = rng.choice(STORED, min(READ, STORED), replace=False)
        names = [trajectory(i) for i in rows]
        store, parquet = Store(folder / "store"), pq.ParquetFile(folder / "rows.parquet")
        seconds["store"].append(timed(store.get, names, COLUMNS))
        seconds["parquet"].append(timed(from_parquet, parquet, rows))
        store.close()
    return {
        "random_200_ms": 1000 * statistics.median(seconds["store"]),
        "random_vs_parquet": statistics.median(
            p / s for p, s in zip(seconds["parquet"], seconds["store"], strict=True)
        ),
    }


def from_parquet(file: pq.ParquetFile, rows: np.ndarray) -> pa.Table:
    """These rows in this order; reads the row groups that hold them, each once."""
    groups, place = np.unique(rows // ROW_GROUP, return_inverse=True)
    return file.read_row_groups(groups.tolist(), COLUMNS).take(place * ROW_GROUP + rows % ROW_GROUP)


def claims(folder: Path) -> dict[str, float]:
    """`claims_per_s`: rows a second, until all are claimed."""
    store = Store(folder)
    store.put("pending", pending(0, CLAIMED))

    def claim_all() -> None:
        while store.claim("pending", limit=CLAIM, lease_s=600.0, columns=["trajectory", "group", "question"]):
            pass

    seconds = timed(claim_all)
    store.close()
    return {"claims_per_s": CLAIMED / seconds}


def opening(folder: Path) -> dict[str, float]:
    """`open_million_s`, and `open_million_mib`: what the private memory of a fresh process grows by."""
    rng = np.random.default_rng(2)
    store = Store(folder)
    for i in range(0, MANY, TABLE):
        store.put("pending", pending(i, TABLE))
        store.put("generated", generated(i, TABLE, SMALL_TOKENS, rng))
    store.close()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        seconds, mib = fresh.submit(cost_of_opening, folder).result(OPEN_S)
    return {"open_million_s": seconds, "open_million_mib": mib}


def cost_of_opening(folder: Path) -> tuple[float, float]:
    """Seconds, and MiB that are this process's alone."""
    process, before = psutil.Process(), psutil.Process().memory_full_info().uss
    started = time.perf_counter()
    store = Store(folder)
    seconds = time.perf_counter() - started
    mib = (process.memory_full_info().uss - before) / 2**20
    store.close()
    return seconds, mib


def timed(work: Callable[..., object], *args: object) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


# ---- rows --------------------------------------------------------------------------------------------------------


def trajectory(i: int) -> str:
    return f"g{i // SAMPLES}/{i % SAMPLES}"


def pending(first: int, count: int) -> pa.Table:
    """Accepted rows `first` to `first + count`, as `SCHEMAS["pending"]` has them."""
    orders = [i // SAMPLES for i in range(first, first + count)]
    fixed = {"purpose": "train", "seed": 0, "question": "Draw what you see.", "image_num": 0, "samples": SAMPLES}
    return _table("pending", first, count, order=orders, **{key: [value] * count for key, value in fixed.items()})


def generated(first: int, count: int, tokens: int, rng: np.random.Generator) -> pa.Table:
    """What was written for these rows: random tokens with their log-probs, and four characters a token."""
    shape = (count, tokens)
    return _table(
        "generated",
        first,
        count,
        prompt_ids=_lists(rng.integers(0, 32_000, (count, tokens // 10), np.int32)),
        token_ids=_lists(rng.integers(0, 32_000, shape, np.int32)),
        logprobs=_lists(-rng.random(shape, np.float32)),
        mask=_lists(np.ones(shape, np.uint8)),
        versions=_lists(np.ones(shape, np.int32)),
        text=["word" * tokens] * count,
        finish=["stop"] * count,
        worker=["rollout-0"] * count,
        seconds=[1.0] * count,
    )


def batch(first: int, rng: np.random.Generator) -> Batch:
    images = [rng.bytes(IMAGE_BYTES) for _ in range(IMAGES * BATCH)]
    return Batch(generated(first, BATCH, TOKENS, rng), images)


def _table(stage: str, first: int, count: int, **columns: Any) -> pa.Table:
    """Columns that are not given are null."""
    numbers, zeros = range(first, first + count), np.zeros(count, np.int16)
    names, groups = [trajectory(i) for i in numbers], [f"g{i // SAMPLES}" for i in numbers]
    columns |= {"trajectory": names, "group": groups, "attempt": zeros, "turn": zeros}
    schema = SCHEMAS[stage]
    return pa.Table.from_pydict({f.name: columns.get(f.name, pa.nulls(count, f.type)) for f in schema}, schema)


def _lists(values: np.ndarray) -> pa.LargeListArray:
    """One list a row of `values` (rows, length)."""
    rows, length = values.shape
    return pa.LargeListArray.from_arrays(np.arange(rows + 1, dtype=np.int64) * length, values.ravel())
