"""Exported folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from learners.engine import Learner
from learners.export import write_model
from learners.packing import Sample
from learners.sft import train_tokenizer

Make = Callable[..., Learner]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_loads_with_equal_logits_and_its_tokenizer(
    learner: Make, samples: list[Sample], tmp_path: Path, tokenizer_dir: Path, zero_stage: int, dtype: str
) -> None:
    engine = learner(zero_stage=zero_stage, dtype=dtype)
    engine.step(samples)
    weights = dict(engine.weights())
    for _ in range(2):  # the second replaces the first
        engine.export(tmp_path / "out", tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    expected = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    missing = expected.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("text") == [
        *AutoTokenizer.from_pretrained(tokenizer_dir).encode("text")
    ]
    assert not list(tmp_path.glob("*.part"))


def test_fused_experts_are_exported_one_by_one(
    learner: Make, samples: list[Sample], tmp_path: Path, tokenizer_dir: Path
) -> None:
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        max_position_embeddings=64,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    engine = learner(model_dir=tmp_path / "moe")
    engine.export(tmp_path / "out", tokenizer_dir)
    stored, out = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "out"))
    assert stored.keys() == out.keys() and all(torch.equal(stored[name], out[name]) for name in stored)
    assert any(name.endswith("experts.3.down_proj.weight") for name in out)
    assert engine.step(samples)["skipped"] == 0.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"norm.weight has shape \[3\] instead of \[64\]"),
        (lambda w: w.update({"model.norms.weight": torch.ones(3)}), "model.norms.weight is unknown"),
    ],
)
def test_weights_of_the_wrong_name_or_shape_are_not_exported_and_what_was_there_stays(
    model_dir: Path, tmp_path: Path, tokenizer_dir: Path, change: Callable[[dict[str, Tensor]], None], reason: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    good = load_file(model_dir / "model.safetensors")
    write_model(tmp_path / "out", model, good, tokenizer_dir)
    bad = dict(good)
    change(bad)
    with pytest.raises(ValueError, match=f"was not written to.*{reason}"):
        write_model(tmp_path / "out", model, bad, tokenizer_dir)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == good.keys()
    assert [p.name for p in tmp_path.glob("out*")] == ["out"]


def test_a_folder_without_a_tokenizer_is_refused_and_nothing_is_written(learner: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        learner().export(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
