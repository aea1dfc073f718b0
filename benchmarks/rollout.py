"""Tokens a second of a rollout worker beside the same engine called directly, with the same requests.

The worker claims prompts from the store and puts what it wrote back; the engine beside it is handed all requests at
once, with their tokens made beforehand. Both sit in processes of their own, and take turns. Answers have a fixed
length, so that both do the same work whatever the policy is: one with random weights, unless the config names one.
"""

from __future__ import annotations

import statistics

from cluster.config import Config
from cluster.console import say
from cluster.rollout_pair import RolloutPair

OVERRIDES = ("rollout.max_tokens=128", "rollout.concurrency=64", "rollout.engine.max_num_seqs=64")
ROUNDS = 5
GROUPS, SAMPLES = 16, 8  # of a round: the engine is filled twice


def run(config: Config) -> dict[str, float]:
    """Returns both medians, and the median of the rounds' ratios."""
    speeds: dict[str, list[float]] = {"worker": [], "engine": []}
    with RolloutPair(config, GROUPS, SAMPLES) as pair:
        for turn in range(ROUNDS + 1):
            measured = {who: getattr(pair, who)(turn) for who in sorted(speeds, reverse=turn % 2 == 0)}
            if turn > 0:  # the first turn warms both up
                say("  ".join([f"round {turn}", *(f"{who} {speed:.0f} tokens/s" for who, speed in measured.items())]))
                for who, speed in measured.items():
                    speeds[who].append(speed)
    ratios = [w / e for w, e in zip(speeds["worker"], speeds["engine"], strict=True)]
    return {"worker_vs_engine": statistics.median(ratios)} | {
        f"{who}_tokens_per_s": statistics.median(found) for who, found in speeds.items()
    }
