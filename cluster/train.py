"""The driver: a run from prompts to a better policy. It builds the pools, watches them, measures before and after.

It never carries a row: workers move those among themselves through the store. It is a plain `ray.tune.Trainable`, in
which one iteration is one optimiser step. As a trial of Ray Tune it has a run folder, and so a store, of its own; a
Tune checkpoint is a pointer to the manifest in a run folder. A trial that finds its own pointer goes on; one that is
given another trial's begins as its clone, with those weights and a new store.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.result import DONE, SHOULD_CHECKPOINT

from cluster import report
from cluster.cold_start import starting_policy
from cluster.config import Config
from cluster.console import Progress, say
from cluster.memory import PeakMemory
from cluster.pools import STAGES, Pools, init_ray, placement
from cluster.run_folder import CONFIG, RunFolder
from cluster.servers import RunFailed
from corpus import keywords, prompts
from evals.heldout import COLUMNS, summarise
from replay.record import version
from replay.view import View, copy, is_store

#: A trial works where it was started, and not in a folder of Tune's, so that a config's paths hold in it.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")

DRIVER_CPUS = 0.1  # of a trial's process
_POINTER = "run.json"


def train(config: Config, resume: bool = False, trainer_class: type[Trainer] | None = None) -> dict[str, Any]:
    """Run a config to its end; returns the summary. Raises RunFailed."""
    started = time.monotonic()
    folder = RunFolder(config.folder)
    folder.check()
    if not resume:
        folder.check_begin(config)
    if config.train.store and not resume and not is_store(config.train.store):
        raise RunFailed(f"there is no replay store in {config.train.store}, which train.store names")
    init_ray()
    session = ray._private.worker._global_node.get_session_dir_path()
    with PeakMemory(session) as memory:
        trainer = (trainer_class or Trainer)({"config": config.model_dump(), "resume": resume})
        try:
            if config.train.only == "rollout":
                trainer.fill()
            else:
                while not trainer.train()["done"]:
                    pass
            summary = trainer.finish()
        finally:
            trainer.stop()
    summary |= {"wall_s": round(time.monotonic() - started, 1), "peak_pss_mib": round(memory.peak_mib)}
    _keep(summary, trainer.folder)
    return summary


def _keep(summary: dict[str, Any], folder: RunFolder) -> None:
    folder.summarise(summary)
    report.write(folder)


#: What runs, by `train.only`.
_STAGES = {None: STAGES, "rollout": ("rollout", "render", "score"), "learn": ("learn",)}


class Trainer(tune.Trainable):
    """One run. The first `step` starts everything and measures the policy before; each waits for an optimiser step.

    Attributes:
        pools_class: what it builds.
        run, folder: its config and its run folder.
    """

    pools_class: type[Pools] = Pools

    def setup(self, config: dict[str, Any]) -> None:
        self.run = Config.model_validate(config["config"])
        self._started, self._since = False, time.monotonic()
        if self._trial_info:
            self.run = self.run.model_copy(update={"name": f"{self.run.name}-{self.trial_id}"})
        self.folder = RunFolder(self.run.folder)
        self._resume = self.folder.has(CONFIG) if self._trial_info else config.get("resume", False)

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """The driver, and in one bundle all actors of a trial; Serve's replicas belong to Serve, and ask themselves.

        A trial that needs several nodes is given its bundles by `tune.with_resources`.
        """
        total: dict[str, float] = defaultdict(float)
        for name, n, asked in placement(Config.model_validate(config["config"])):
            if not name.startswith(("tool ", "judge ")):
                for resource, amount in {"CPU": asked.cpus, "GPU": asked.gpus, **asked.resources}.items():
                    total[resource] += n * amount
        return tune.PlacementGroupFactory([{"CPU": DRIVER_CPUS}, {k: round(v, 4) for k, v in total.items() if v}])

    def start(self) -> None:
        """Start everything, and measure the policy before."""
        self.folder.open(self.run, self._resume)
        self._sets = {name: self._prompts(name) for name in ("train", "heldout", "unseen")}
        self._incarnation = self.folder.checkpoints.begin()
        checkpoint, origin = self.folder.checkpoints.committed(), self.folder.origin()
        self._done = checkpoint["step"] if checkpoint else 0
        self.folder.rewind(self._done)
        if self.run.train.store and not is_store(self.folder.replay):
            copy(self.run.train.store, self.folder.replay)
        if self.run.train.only == "learn":
            self._check_enough()
        model = starting_policy(self.run, self.folder.start)
        say(f"starting tool servers, judges, rollout workers and learner of {self.run.name!r}")
        first = origin * self.run.learner.prompts_per_step
        self._pools = self.pools_class(self.run, model, self._incarnation, checkpoint, first)
        self._started = True
        self._pools.start(_STAGES[self.run.train.only])
        self._rows: list[dict[str, Any]] = []
        self._fetched = 0
        if self._done == origin and self.run.train.only is None:
            self._measure("before")
        self._pools.begin()
        self._progress = Progress("optimiser step", self.run.learner.steps)
        self._moved = time.monotonic()

    def fill(self) -> None:
        """Without a learner: wait until the documents of all steps lie in the store."""
        self.start()
        c = self.run.learner
        documents = c.steps * c.prompts_per_step * c.samples_per_prompt
        progress = Progress("documents", documents)
        self._pools.wait_for("train", documents, progress.show_of)

    def step(self) -> dict[str, Any]:
        """Wait for an optimiser step; a trial finishes with the last one, and gives the summary's numbers too."""
        if not self._started:
            self.start()
        row: dict[str, Any] = {}
        if self._done < self.run.learner.steps:
            row = self._next_row()
            self._done = row["step"]
            self.folder.log(row)
            note = f"reward {row['reward']:.3f}  {row['step_s']:.1f} s (waited {row['wait_s']:.1f})"
            self._progress.show(self._done, note)
        done = self._done >= self.run.learner.steps
        if done and self._trial_info:
            summary = self.finish() | {"wall_s": round(time.monotonic() - self._since, 1)}
            _keep(summary, self.folder)
            row |= {k: v for k, v in summary.items() if isinstance(v, int | float)}
        committed = done or self._done % self.run.learner.checkpoint_every == 0
        return row | {DONE: done, SHOULD_CHECKPOINT: committed}

    def finish(self) -> dict[str, Any]:
        """Measure after, check the store; returns the summary."""
        final = version(self._incarnation, self._done)
        if self.run.train.only is None:
            self._pools.wait_for_version(final)
            self._pools.focus("after-heldout")
            self._measure("after")
        watched = self._pools.watch()
        self._pools.stop()
        return self._summary(watched, final)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A Tune checkpoint is a pointer to our manifest."""
        (Path(checkpoint_dir) / _POINTER).write_text(json.dumps({"run": self.folder.url}))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from the manifest that it points to: as the same run, or as a clone of another trial's."""
        run = json.loads((Path(checkpoint) / _POINTER).read_text())["run"]
        self.cleanup()
        self._started, self._resume = False, True
        if run != self.folder.url:
            self.folder.clone(RunFolder(run), self.run)

    def cleanup(self) -> None:
        if self._started:
            self._pools.stop()

    def _next_row(self) -> dict[str, Any]:
        """Wait for one optimiser step, watching everyone meanwhile."""
        while not self._rows:
            self._rows = self._pools.steps(self._fetched)
            self._fetched += len(self._rows)
            if self._rows:
                self._moved = time.monotonic()
                break
            stages = self._pools.watch()
            if time.monotonic() - self._moved > self.run.stall_s:
                raise RunFailed(self._stalled(stages))
            time.sleep(0.5)
        return self._rows.pop(0)

    def _check_enough(self) -> None:
        groups = View(self.folder.replay).groups("train")["accepted"]
        c = self.run.learner
        if groups < c.steps * c.prompts_per_step:
            raise RunFailed(
                f"the store {self.run.train.store} has {groups} groups for training; learner.steps x prompts_per_step "
                f"asks for {c.steps * c.prompts_per_step}: lower one of them"
            )

    def _stalled(self, stages: dict[str, Any]) -> str:
        state = self._pools.store.now(self._pools.store.state("train"))
        kinds = ("infrastructure", "judge", "data")
        failures = {s: {k: int(w[k]) for w in ws for k in kinds if w.get(k)} for s, ws in stages.items()}
        c = self.run.learner
        return (
            f"no optimiser step in {self.run.stall_s:g} s (stall_s); one takes {c.prompts_per_step} complete groups of "
            f"{c.samples_per_prompt} documents, and the store holds {state['counts']}; "
            f"failures: { ({s: f for s, f in failures.items() if f} or 'none') }"
        )

    def _prompts(self, name: str) -> list[Any]:
        c = self.run.prompts
        source = {"train": c.train, "heldout": c.heldout, "unseen": c.unseen}[name]
        if source is None:
            return []
        n = c.count if name == "train" else c.heldout_count
        found, problems = prompts.load(source, name, n, self.run.seed, known=self.run.tools)
        for problem in problems:
            say(f"skipped a prompt: {problem}")
        return found

    def _measure(self, when: str) -> None:
        for name in ("heldout", "unseen"):
            if self._sets[name]:
                purpose = f"{when}-{name}"
                if when == "after":
                    self._pools.focus(purpose)
                progress = Progress(f"documents {when} training, {name} prompts", len(self._sets[name]))
                self._pools.evaluate(purpose, self._sets[name], progress.show_of)

    def _summary(self, stages: dict[str, Any], final: int) -> dict[str, Any]:
        store = View(self.folder.replay)
        try:
            found = {
                p: summarise(store.get(store.find(p), COLUMNS).to_pylist())
                for when in ("before", "after")
                for p in (f"{when}-heldout", f"{when}-unseen")
                if store.find(p)
            }
            groups, counts = store.groups("train"), store.counts("train")
            lost = store.lost("train")
        finally:
            store.close()
        before, after = found.get("before-heldout"), found.get("after-heldout")
        out: dict[str, Any] = {"name": self.run.name, "seed": self.run.seed, "steps": self._done}
        if before and after:
            out |= {
                f"{k}_{w}": s[k] for k in ("reward", "tool_accuracy") for w, s in (("before", before), ("after", after))
            }
            out["keyword_rule"] = keywords.measure(self._sets["heldout"])
        out |= {
            "policy_version": f"{self._incarnation}.{self._done}",
            "trajectories_trained": counts.get("trained", 0),
            "trajectories_lost": lost,
            "groups": groups,
            "evaluations": found,
            "idle": {s: _idle(ws) for s, ws in stages.items() if ws},
        }
        return out


def _idle(workers: list[dict[str, float]]) -> float:
    """Share of the time in which a stage's workers had nothing to do."""
    return round(1 - sum(w["busy_s"] for w in workers) / max(sum(w["alive_s"] for w in workers), 1e-9), 3)
