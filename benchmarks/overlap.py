"""What it is worth that generating, drawing, judging and learning go on at the same time.

The same run twice: once with stages that take turns, as in the published system, and once asynchronously. 64 documents
a step with one tool call each; the tool answers after 2 s, 16 calls at a time, and the judges after 1 s, 8 documents at
a time. So a synchronous step cannot take less than 64 * 2 / 16 + 64 / 8 = 16 s and what generation and learning take;
an asynchronous one is bounded by its slowest stage, 8 s here. Both have the same policy, prompts, seeds and steps, the
same actors, and tools and judges that are real Serve deployments with a sleep in them.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from cluster.cold_start import small_policy
from cluster.config import Config
from cluster.console import say
from cluster.pools import init_ray
from cluster.run_folder import RunFolder
from cluster.slow_servers import PIECES, documents, install, prompts
from cluster.synchronous import SynchronousTrainer
from cluster.train import Trainer, train
from corpus.prompts import save
from evals.heldout import noise
from replay.view import View

HELDOUT = 8  # times that each question is asked
_JUDGE = "{judge: 'cluster.slow_servers:Critic', concurrency: 8, options: {seconds: 1.0}}"
OVERRIDES = (
    "prompts.heldout_count=256",
    "prompts.unseen=null",
    "policy.tiny={vocab_size: 512, hidden_size: 128, layers: 2, heads: 2}",
    "sft.documents=2400",
    "rollout.max_tokens=64",
    "rollout.concurrency=64",
    "rollout.engine.max_num_seqs=64",
    "rollout.engine.max_model_len=128",
    "tools={paint: {concurrency: 16, options: {seconds: 2.0}}}",
    f"judges={{text: {_JUDGE}, image: {_JUDGE}}}",
    "render.concurrency=32",
    "score={workers: 2, concurrency: 8}",
    "learner.steps=20",
    "learner.prompts_per_step=8",
    "learner.samples_per_prompt=8",
    "learner.updates_per_step=2",
    "learner.max_staleness=2",
    "learner.lr=6.0e-4",
    "learner.warmup_steps=0",
    "learner.checkpoint_every=1000",
)


def run(config: Config) -> dict[str, float]:
    """Returns how many times as long the synchronous run takes (`async_vs_sync`), from the start of the first step to
    the end of the last, and by how much the asynchronous policy's reward on held-out prompts differs after as many
    samples (`reward_minus_sync`), with the standard error of that (`reward_noise`). Of each run: seconds a step, those
    that the learner works, rewards before and after, tool calls a document, versions between a document's oldest token
    and its training, and documents written again because they were too old.
    """
    folder = Path(config.folder)
    folder.mkdir(parents=True)
    install(folder / "package")
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "heldout")}
    save(prompts(), files["train"], "train")
    save(prompts(HELDOUT), files["heldout"], "heldout")
    init_ray()
    policy = small_policy(config, documents, pieces=PIECES)
    shared = {
        "run_dir": config.folder,
        "prompts": config.prompts.model_copy(update=files),
        "policy": config.policy.model_copy(update={"path": policy, "tiny": None}),
    }
    in_turns = {"name": f"{config.name}-sync", "learner": config.learner.model_copy(update={"max_staleness": 0})}
    at_once = {"name": f"{config.name}-async"}
    sync, theirs = _arm(config.model_copy(update=shared | in_turns), SynchronousTrainer)
    overlapped, ours = _arm(config.model_copy(update=shared | at_once), Trainer)
    results = {
        "async_vs_sync": sync["step_s"] / overlapped["step_s"],
        "reward_minus_sync": overlapped["reward_after"] - sync["reward_after"],
        "reward_noise": noise(ours, theirs),
    }
    for name, arm in (("sync", sync), ("async", overlapped)):
        results |= {f"{name}_{key}": value for key, value in arm.items()}
    return results


def _arm(config: Config, trainer: type[Trainer]) -> tuple[dict[str, float], list[float]]:
    """What a run was like, and the held-out documents' rewards after it."""
    say(f"overlap: {config.name}")
    summary, steps = train(config, trainer_class=trainer), RunFolder(config.folder).steps()
    store = View(f"{config.folder}/replay")
    written = store.get(store.find("train"), ["calls"])
    after = store.get(store.find("after-heldout"), ["reward_strict"]).column("reward_strict").to_pylist()
    figures = {
        "step_s": (steps[-1]["time"] - steps[0]["time"] + steps[0]["step_s"]) / len(steps),
        "learn_s": statistics.fmean(s["step_s"] - s["wait_s"] for s in steps),
        "reward_before": summary["reward_before"],
        "reward_after": summary["reward_after"],
        "calls": statistics.fmean(map(len, written.column("calls").to_pylist())),
        "staleness": statistics.fmean(s["staleness"] for s in steps),
        "written_again": statistics.fmean(written.column("attempt").to_pylist()),
    }
    return figures, after
