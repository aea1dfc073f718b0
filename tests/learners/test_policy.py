"""Log-probs and entropies of the charged tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from learners.engine import Learner
from learners.packing import Plan, Sample, collate
from learners.policy import Policy, load_model, score


def test_log_probs_and_entropies_are_those_of_the_model(model_dir: Path, samples: list[Sample]) -> None:
    s = samples[0]
    batch = collate([s], Plan(((0,),), len(s)))
    logprobs, entropy = score(Policy(load_model(model_dir, torch.float32)), batch)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = torch.distributions.Categorical(logits=model(batch.input_ids).logits)
    charged = batch.mask > 0
    torch.testing.assert_close(logprobs[charged], expected.log_prob(batch.targets)[charged])
    torch.testing.assert_close(entropy[charged], expected.entropy()[charged])
    assert (logprobs[~charged] == 0).all() and (entropy[~charged] == 0).all()
    assert logprobs.requires_grad and entropy.requires_grad


def test_a_model_that_changes_its_logits_after_the_head_is_refused(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("model.norm.weight"), "do not fit its config.json: model.norm.weight is missing"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"norm.weight has shape \[3\] instead of \[64\]"),
        (lambda w: w.update({"norm": w.pop("model.norm.weight")}), "norm.weight is missing, norm is unknown"),
    ],
)
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_weights_of_the_wrong_name_or_shape_are_refused_not_made_up(
    model_dir: Path, tmp_path: Path, learner: Callable[..., Learner], zero_stage: int, change: Any, reason: str
) -> None:
    weights = load_file(model_dir / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ValueError, match=reason):
        learner(model_dir=tmp_path, zero_stage=zero_stage)


def test_weights_that_were_cut_off_are_refused(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path, torch.float32)


def test_weights_that_the_model_has_no_use_for_are_left_alone(model_dir: Path, tmp_path: Path) -> None:
    weights = load_file(model_dir / "model.safetensors") | {"mtp.layers.0.weight": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    assert load_model(tmp_path, torch.float32).num_parameters() > 0
