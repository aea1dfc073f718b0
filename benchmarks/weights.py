"""GB/s of the ways that weights take to an engine, beside a warm memory copy, and how long a whole update takes.

A way is timed from the first tensor of the publisher until the engine's process has mapped all of them; all that a run
does on the way is in it: checksums on both sides, the hub, the engine's worker. `object_store` is the way to another
node, on one machine: no network is in it. `update_s` goes on until the engine generates with weights that came through
shared memory. The first two rounds take fresh pages and are left out; so do the first two publications of a run.
"""

from __future__ import annotations

import statistics

from cluster.config import Config
from cluster.console import say
from cluster.weight_paths import PATHS, WeightPaths

OVERRIDES = (
    "policy.tiny.hidden_size=1024",
    "policy.tiny.layers=12",
    "policy.tiny.heads=16",
    "rollout.engine.dtype=float32",
)
WARM, ROUNDS = 2, 7


def run(config: Config) -> dict[str, float]:
    """Returns medians over the rounds; `shm_vs_memcpy` is the median of the rounds' ratios."""
    rounds: list[dict[str, float]] = []
    with WeightPaths(config) as paths:
        for turn in range(WARM + ROUNDS):
            seconds = {"memcpy": paths.memcpy()}
            for path in PATHS:
                seconds[path], updated, pause = paths.publish(path)
                if path == "shm":
                    whole = {"update_s": updated, "pause_s": pause}
            if turn < WARM:
                continue
            rounds.append({f"{k}_gb_s": paths.nbytes / s / 1e9 for k, s in seconds.items()} | whole)
            rounds[-1]["shm_vs_memcpy"] = seconds["memcpy"] / seconds["shm"]
            say("  ".join([f"round {len(rounds)}", *(f"{k} {v:.2f}" for k, v in rounds[-1].items())]))
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} | {"mb": paths.nbytes / 1e6}
