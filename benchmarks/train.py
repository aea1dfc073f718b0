"""What an optimiser step of a whole run is spent on, and how much of its time each stage is idle.

Seconds are medians over the steps; `wait_s` is what the learner waited for complete groups. The default run is short,
and its policy hardly cold-started: `policy.path=FOLDER policy.tiny=null` takes a better one.
"""

from __future__ import annotations

import statistics

from cluster.config import Config
from cluster.run_folder import RunFolder
from cluster.train import train

OVERRIDES = (
    "prompts.heldout_count=16",
    "prompts.unseen=null",
    "sft.documents=1600",
    "sft.epochs=1",
    "learner.steps=12",
    "learner.checkpoint_every=12",
)
SECONDS = ("step_s", "wait_s", "forward_backward_s", "optimizer_s", "publish_s")
STAGES = {"rollout": "idle_rollout", "render": "idle_render", "score": "idle_score", "learn": "idle_learn"}


def run(config: Config) -> dict[str, float]:
    """Train as the config says; returns `SECONDS` and the idle share of each stage."""
    idle = train(config)["idle"]
    steps = RunFolder(config.folder).steps()
    return {key: statistics.median(s[key] for s in steps) for key in SECONDS} | {
        key: idle[stage] for stage, key in STAGES.items()
    }
