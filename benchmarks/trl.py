"""This project beside TRL's GRPOTrainer: samples a second, and what the policies are worth after equal samples.

Both begin with the same Llama of 16 M parameters with a vocabulary of 49,152, cold-started here, and have the same
prompts, reward, batches of 64 answers of 128 tokens, loss, optimiser, numbers and threads: ours shares them out between
engine and learner, TRL has all of them all the time. TRL generates through Transformers, as it does without a GPU.

TRL's steps take so long that it takes as many as ours up to the first checkpoint; the policies of then are compared,
both measured in the same way. Seconds a step are means over all steps but the first, checkpoints included. Ours goes on
for some more steps, so that what the engine wrote ahead during the first weighs little.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from statistics import mean
from typing import Any

import ray

from cluster.cold_start import small_policy
from cluster.config import Config, ConfigError, Learner
from cluster.console import Progress, say
from cluster.pools import PING_S, init_ray
from cluster.run_folder import RunFolder
from cluster.servers import RunFailed, actor_options
from cluster.train import train
from cluster.trl_rival import TrlRival
from cluster.word_craft import documents, prompts, vocabulary
from corpus.prompts import save
from evals.heldout import noise

MEASURED = 16  # times that each question is asked
OVERRIDES = (
    "prompts.heldout=null",
    "prompts.unseen=null",
    "policy.tiny={vocab_size: 49152, hidden_size: 256, layers: 4, heads: 4}",
    "sft.documents=192",
    "sft.documents_per_step=8",
    "rollout.max_tokens=128",
    "rollout.concurrency=64",
    "rollout.engine.max_num_seqs=64",
    "rollout.engine.max_model_len=256",
    "tools={}",
    "judges={text: {judge: 'cluster.word_craft:Critic'}}",
    "learner.steps=12",
    "learner.prompts_per_step=8",
    "learner.samples_per_prompt=8",
    "learner.updates_per_step=1",
    "learner.loss_options={clip_low: 0.2, clip_high: 0.2}",
    "learner.advantage=grpo",
    "learner.lr=5.0e-4",
    "learner.betas=[0.9, 0.999]",
    "learner.schedule=constant",
    "learner.warmup_steps=0",
    "learner.checkpoint_every=8",
    "learner.keep=100",
)


def run(config: Config) -> dict[str, float]:
    """Returns our samples a second over TRL's (`samples_vs_trl`), the mean reward of our policy less that of TRL's
    after as many samples (`reward_minus_trl`) with its standard error (`reward_noise`), and what these are made of.

    Raises:
        ConfigError: there are too few steps.
        RunFailed: TRL is not installed, or one of the two failed.
    """
    c = config.learner
    _check(c)
    folder, asked = Path(config.folder), prompts()
    folder.mkdir(parents=True)
    save(asked, folder / "train.parquet")
    init_ray()
    start, questions = small_policy(config, documents, texts=vocabulary(), ended=False), [p.question for p in asked]
    ended = _rival(config, "TRL step", "train", config, start, f"{folder}/trl", questions, c.checkpoint_every)
    ours = _ours(config, start)
    train(ours)
    [policy] = Path(ours.folder, "checkpoints").glob(f"step{c.checkpoint_every:06d}.*/policy")
    policies = {"before": start, "trl": f"{folder}/trl/checkpoint-{c.checkpoint_every}", "ours": str(policy)}
    answers = {
        who: _rival(config, f"answers, {who}", "measure", where, questions * MEASURED, config)
        for who, where in policies.items()
    }
    rewards = {who: mean(of) for who, of in answers.items()}
    times = {"trl": ended, "ours": [row["time"] for row in RunFolder(ours.folder).steps()]}
    speeds = {who: c.prompts_per_step * c.samples_per_prompt / _mean_gap(at) for who, at in times.items()}
    for who, speed in speeds.items():
        say(f"{who}: {speed:.2f} samples/s, reward {rewards['before']:.3f} -> {rewards[who]:.3f}")
    return {
        "samples_vs_trl": speeds["ours"] / speeds["trl"],
        "reward_minus_trl": rewards["ours"] - rewards["trl"],
        "reward_noise": noise(answers["ours"], answers["trl"]),
        **{f"samples_per_s_{who}": speed for who, speed in speeds.items()},
        **{f"reward_{who}": reward for who, reward in rewards.items()},
    }


def _check(learner: Learner) -> None:
    if missing := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]:
        raise RunFailed(
            f"this benchmark compares with TRL, but {' and '.join(missing)} cannot be imported: "
            "`pip install --no-deps -r requirements/dev.txt` installs what is missing"
        )
    if not 2 <= learner.checkpoint_every <= learner.steps:
        raise ConfigError("TRL takes learner.checkpoint_every steps: at least 2, and at most learner.steps")


def _ours(config: Config, start: str) -> Config:
    """Our run, from the policy in `start`."""
    return config.model_copy(
        update={
            "name": f"{config.name}-ours",
            "run_dir": config.folder,
            "prompts": config.prompts.model_copy(update={"train": f"{config.folder}/train.parquet"}),
            "policy": config.policy.model_copy(update={"path": start, "tiny": None}),
        }
    )


def _mean_gap(times: list[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1)


def _rival(config: Config, what: str, task: str, *args: Any) -> Any:
    """What TRL's process gives for one task. It has all the threads that engine and learner share, and ends then."""
    options = actor_options(config.learner, config.rollout.threads + config.learner.threads, alone=True)
    cls: Any = TrlRival
    rival = cls.options(**options, max_concurrency=2).remote()
    done, progress = getattr(rival, task).remote(*args), Progress(what, 1)
    try:
        deadline, last = time.monotonic() + config.stall_s, (0, 0)
        while not ray.wait([done], timeout=1.0)[0]:
            if (now := ray.get(rival.progress.remote(), timeout=PING_S)) != last:
                deadline, last = time.monotonic() + config.stall_s, now
                progress.show_of(*now)
            if time.monotonic() > deadline:
                raise RunFailed(f"{what}: nothing moved in {config.stall_s:g} s; it stands at {now[0]} of {now[1]}")
        progress.show_of(*ray.get(rival.progress.remote(), timeout=PING_S))
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise RunFailed(f"{what} failed: {error.cause!r}") from error
    finally:
        ray.kill(rival)
