"""Adapters: trained in place of the weights, and how they leave the learner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from learners.engine import Learner
from learners.lora import write_adapter
from learners.packing import Sample
from learners.sft import train_tokenizer

Make = Callable[..., Learner]

#: At stage 3, so small a model would stay whole without it.
SPLIT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def options(zero_stage: int, dtype: str = "float32", **lora: Any) -> dict[str, Any]:
    return {"lora": {"r": 4} | lora, "zero_stage": zero_stage, "dtype": dtype, "lr": 1e-2, "deepspeed": SPLIT}


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_exported_adapter_on_the_first_policy_is_the_exported_policy(
    learner: Make, samples: list[Sample], model_dir: Path, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path / "tokenizer")
    engine = learner(**options(zero_stage, dtype, use_rslora=True))
    for _ in range(3):
        engine.step(samples)
    engine.export(tmp_path / "policy", tmp_path / "tokenizer")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", engine.adapter_config, dict(engine.adapter()))
    load = AutoModelForCausalLM.from_pretrained
    first, merged = load(model_dir, dtype=dtype), load(tmp_path / "policy")
    beside = PeftModel.from_pretrained(load(model_dir, dtype=dtype), tmp_path / "adapter")
    ids = torch.arange(20)[None]
    changed, apart = (merged(ids).logits - first(ids).logits).norm(), (merged(ids).logits - beside(ids).logits).norm()
    assert changed > 0 and apart <= changed * (1e-4 if dtype == "float32" else 0.2)


def test_only_the_adapter_is_trained_kept_and_written_to_checkpoints(
    learner: Make, samples: list[Sample], model_dir: Path, tmp_path: Path
) -> None:
    engine = learner(**options(2))
    first = dict(engine.weights())
    stored = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert all(torch.equal(first[name], stored[name]) for name in first)  # it changes nothing yet
    engine.step(samples)
    changed = {name for name, tensor in engine.weights() if not torch.equal(tensor, first[name])}
    assert len(changed) == 2 * 7 and all(name.endswith("proj.weight") for name in changed)
    engine.save(tmp_path, "last")
    numbers = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    assert 16 * numbers < sum(f.stat().st_size for f in (tmp_path / "last").iterdir()) < 30 * numbers + 50_000


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_resumed_adapter_goes_on_exactly_as_the_first_would_have(
    learner: Make, samples: list[Sample], tmp_path: Path, zero_stage: int
) -> None:
    first = learner(**options(zero_stage))
    first.step(samples)
    first.save(tmp_path, "last")
    first.step(samples)
    expected: dict[str, Tensor] = dict(first.weights())
    second = learner(**options(zero_stage))
    second.load(tmp_path, "last")
    second.step(samples)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.weights())
    with pytest.raises(ValueError, match="of another model"):
        learner(**options(zero_stage, r=8)).load(tmp_path, "last")
    with pytest.raises(ValueError, match="of another model"):
        learner(zero_stage=zero_stage).load(tmp_path, "last")


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_reference_is_the_model_without_its_adapter_and_looking_at_it_changes_no_step(
    learner: Make, samples: list[Sample], model_dir: Path, tmp_path: Path, zero_stage: int
) -> None:
    found = []
    for looks in (False, True):
        engine = learner(**options(zero_stage), reference=model_dir)
        first = engine.logprobs(samples)
        for _ in range(3):
            engine.step(samples)
            still = engine.logprobs(samples, reference=True) if looks else first
            assert all(np.array_equal(a, b) for a, b in zip(still, first, strict=True))
        assert not np.array_equal(engine.logprobs(samples)[0], first[0])
        found.append(dict(engine.weights()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with pytest.raises(ValueError, match="it must be the model itself"):
        learner(**options(zero_stage), reference=tmp_path)


def test_adapters_go_with_recomputed_activations(learner: Make, samples: list[Sample]) -> None:
    kept = learner(**options(2)).step(samples)
    again = learner(**options(2), gradient_checkpointing=True).step(samples)
    assert again["grad_norm"] == pytest.approx(kept["grad_norm"], rel=1e-5) and kept["grad_norm"] > 0


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"lora_dropout": 0.1}, "lora has no option 'lora_dropout'"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens', which is no linear layer inside"),
        ({"target_modules": ["lm_head", "q_proj"]}, "'lm_head', which is no linear layer inside"),
        ({"target_modules": ["query"]}, "query"),
    ],
)
def test_an_adapter_that_could_not_be_served_is_refused(learner: Make, lora: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        learner(lora=lora)


def test_a_learner_of_all_weights_has_no_adapter(learner: Make) -> None:
    with pytest.raises(ValueError, match="it has no adapter without `lora`"):
        _ = learner().adapter_config
