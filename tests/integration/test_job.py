"""A whole run submitted as a job: its working directory is a copy that Ray throws away, its run folder is not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.ray_head import ROOT, ray_head

SMALL = (
    "prompts.count=8",
    "prompts.heldout_count=4",
    "prompts.unseen=null",
    "policy.tiny={hidden_size: 64, layers: 2, heads: 1}",
    "sft.documents=320",
    "sft.epochs=1",
    "sft.threads=1",
    "tools={code: {}}",
    "rollout.max_tokens=220",
    "rollout.concurrency=8",
    "rollout.engine.max_num_seqs=8",
    "learner.threads=1",
    "learner.steps=2",
    "learner.prompts_per_step=2",
    "learner.samples_per_prompt=2",
    "learner.updates_per_step=1",
    "learner.warmup_steps=0",
    "learner.checkpoint_every=2",
    "stall_s=120",
)


@pytest.mark.integration
@pytest.mark.slow  # a minute and a half
@pytest.mark.timeout(600)
def test_a_run_submitted_as_a_ray_job_succeeds_and_leaves_its_run_folder(tmp_path: Path) -> None:
    train = ["llmi", "train", "examples/tiny.yaml", "name=job", f"run_dir={tmp_path}", *SMALL]
    with ray_head(dashboard=True) as head:
        submit = ["ray", "job", "submit", "--address", head.jobs, "--working-dir", ".", "--", *train]
        done = subprocess.run(submit, env=head.env, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["trajectories_trained"] == 8 and summary["trajectories_lost"] == 0
    assert {p.name for p in (tmp_path / "job" / "policy").iterdir()} >= {"config.json", "model.safetensors"}
    assert (tmp_path / "job" / "report.html").exists()
