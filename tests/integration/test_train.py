"""A whole run through the real engines: vLLM, Ray Serve, DeepSpeed, Arrow; then the same run taken up again."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.run_folder import REPORT, SUMMARY, RunFolder
from cluster.train import train
from replay.view import View

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]


def test_a_run_goes_from_prompts_to_a_policy_and_resumes(tiny: Callable[..., Config]) -> None:
    config = tiny("whole")
    summary = train(config)
    folder = RunFolder(config.folder)
    assert summary["steps"] == 2
    assert summary["trajectories_lost"] == 0
    assert summary["trajectories_trained"] == 2 * 3 * 4
    assert summary["policy_version"] == "0.2"
    assert 0 < summary["peak_pss_mib"] < 10 * 1024
    wanted = {f"{k}_{w}" for k in ("reward", "tool_accuracy") for w in ("before", "after")} | {"wall_s"}
    assert wanted <= json.loads(folder.read(SUMMARY)).keys()
    assert [row["step"] for row in folder.steps()] == [1, 2]
    assert {"reward", "staleness", "wait_s", "forward_backward_s", "publish_s"} <= folder.steps()[0].keys()
    page = folder.read(REPORT)
    assert "Documents before and after" in page
    assert not re.search(r"""<(script|link|iframe)|src=["']?https?:|url\(["']?https?:""", page), (
        "it loads from the network"
    )
    _loads_everywhere(folder)
    _tokens_are_as_sampled(folder)
    _checkpoints_are(folder, ["step000001.0", "step000002.0"])

    again = train(tiny("whole", "learner.steps=3", "learner.keep=1"), resume=True)
    assert again["steps"] == 3
    assert again["trajectories_lost"] == 0
    assert again["trajectories_trained"] == 3 * 3 * 4
    assert again["policy_version"] == "1.3"
    assert again["reward_before"] == summary["reward_before"], "the measure before training is not taken twice"
    folder = RunFolder(config.folder)
    assert [row["step"] for row in folder.steps()] == [1, 2, 3]
    tags = ["step000001.0", "step000002.0", "step000003.1"]
    rewards = dict(zip(tags, (row["reward"] for row in folder.steps()), strict=True))
    _checkpoints_are(folder, sorted({max(tags, key=lambda tag: rewards[tag]), tags[-1]}))


def _checkpoints_are(folder: RunFolder, tags: list[str]) -> None:
    """Those of the newest and the best, each with a policy that can be served; the run's own is the newest's."""
    assert folder.checkpoints.tags() == tags
    manifest = folder.checkpoints.committed()
    assert manifest and manifest["tag"] == tags[-1] and manifest["best"]["tag"] in tags
    policies = [Path(folder.checkpoints.url, tag, "policy") for tag in tags]
    assert all((policy / "model.safetensors").exists() and (policy / "tokenizer.json").exists() for policy in policies)
    assert (policies[-1] / "model.safetensors").samefile(Path(folder.policy, "model.safetensors"))


def _loads_everywhere(folder: RunFolder) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.policy)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert AutoModelForCausalLM.from_pretrained(folder.policy).generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]


def _tokens_are_as_sampled(folder: RunFolder) -> None:
    """Every token has its log-prob, mask and version; the text is what the tokens say; versions are never mixed up."""
    store = View(folder.replay)
    try:
        columns = ["prompt_ids", "token_ids", "logprobs", "mask", "versions", "text", "reward", "components"]
        rows = store.get(store.find("train", ["trained"]), columns).to_pylist()
    finally:
        store.close()
    for row in rows:
        n = len(row["token_ids"])
        assert n == len(row["logprobs"]) == len(row["mask"]) == len(row["versions"]) > 0
        assert all(p <= 0 for p in row["logprobs"])
        assert row["versions"] == sorted(row["versions"])
        assert max(row["versions"]) <= 2
        assert 0 <= row["reward"] <= 1
