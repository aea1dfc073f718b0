"""One rank in a process of its own: `python rank.py CASES RANK OUT`.

CASES is a pickled list of (options of Learner, samples of all ranks, steps); for each, one learner after the other, its
metrics and weights go to OUT as a list.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch

from learners.engine import Learner
from learners.packing import shard

cases, rank, out = sys.argv[1:]
results = []
for options, samples, steps in pickle.loads(Path(cases).read_bytes()):
    learner = Learner(rank=int(rank), threads=1, timeout_s=100, **options)
    mine = shard(samples, options["world_size"])[int(rank)]
    results.append(([learner.step(mine) for _ in range(steps)], dict(learner.weights())))
    learner.close()
torch.save(results, out)
