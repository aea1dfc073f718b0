"""One rank in a process of its own: `python rank.py CASES RANK OUT`.

CASES is a pickled list of (options of Learner, samples of all ranks, what to do); for each, one learner after the
other, what came of it and its weights go to OUT as a list. To do is a number of updates with all samples, or a plan and
a recipe for `take_step` with samples by name.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from learners.engine import Learner
from learners.packing import shard
from learners.step import take_step

cases, rank, out = sys.argv[1:]
results = []
for options, samples, todo in pickle.loads(Path(cases).read_bytes()):
    learner = Learner(rank=int(rank), threads=1, timeout_s=100, **options)
    if isinstance(todo, int):
        part = shard(samples, options["world_size"])[int(rank)]
        done: Any = [learner.step(part) for _ in range(todo)]
    else:
        plan, recipe = todo
        mine = {name: samples[name] for name in plan.share(int(rank), options["world_size"])}
        done = take_step(learner, plan, mine, recipe)
    results.append((done, dict(learner.weights())))
    learner.close()
torch.save(results, out)
