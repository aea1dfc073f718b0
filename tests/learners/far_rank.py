"""One rank on a node of its own: `python far_rank.py OPTIONS RANK TMPDIR OUT`, which shares nothing but a bucket.

OPTIONS is a pickled (options of Learner, samples of all ranks, URL of the checkpoints, tag to load or None). It loads,
takes a step and saves `one`; or takes one more step and writes its weights to OUT.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from pathlib import Path

import torch

from learners.engine import Learner
from learners.packing import shard
from replay.checkpoints import Checkpoints

file, rank, tempfile.tempdir, out = sys.argv[1:]
options, samples, url, tag = pickle.loads(Path(file).read_bytes())
learner = Learner(rank=int(rank), threads=1, timeout_s=100, **options)
checkpoints, mine = Checkpoints(url), shard(samples, options["world_size"])[int(rank)]
if tag is None:
    learner.step(mine)
    with checkpoints.writing("one") as (folder, name):
        learner.save(folder, name, {"step": 1})
else:
    assert learner.load(*checkpoints.fetched(tag)) == {"step": 1}
learner.step(mine)
torch.save(dict(learner.weights()), out)
learner.close()
