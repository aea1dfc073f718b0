"""Parts of the loop alone: documents without a learner, then a learner without engines, on two shards and two ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config import Config, ConfigError, load
from cluster.servers import RunFailed
from cluster.train import train
from replay.verify import verify
from replay.view import View

pytestmark = pytest.mark.integration


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")
def test_a_saved_store_trains_a_policy_again_and_again_without_engines(tiny: Callable[..., Config]) -> None:
    filled = tiny("filled", "train.only=rollout", "store.shards=2")
    summary = train(filled)
    assert summary["steps"] == 0 and summary["trajectories_trained"] == 0 and summary["trajectories_lost"] == 0
    saved = f"{filled.folder}/replay"
    assert View(saved).counts("train") == {"scored": 2 * 3 * 4}

    options = ["train.only=learn", f"train.store={saved}", "store.shards=2"]
    learned = train(tiny("learned", *options, "learner.ranks=2", "learner.zero_stage=3"))
    assert learned["steps"] == 2 and learned["trajectories_trained"] == 24 and learned["trajectories_lost"] == 0
    assert "evaluations" not in learned or not learned["evaluations"]
    assert View(saved).counts("train") == {"scored": 24}, "the saved store stays as it is"
    assert verify(learned_store := f"{tiny('learned', *options).folder}/replay").problems == []
    assert {s for s, _ in View(learned_store).ends("train").values()} == {"trained"}

    with pytest.raises(RunFailed, match=r"has 6 groups for training; learner\.steps x prompts_per_step asks for 27"):
        train(tiny("more", *options, "learner.steps=9"))


def test_a_learner_alone_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.only=learn needs a saved store in train\.store"):
        load(Path("examples/tiny.yaml"), ["train.only=learn"])
