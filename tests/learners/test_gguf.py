"""A GGUF file as a policy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from learners.gguf import convert
from learners.sft import build_policy

TEXT = "Plot 3 apples and 5 pears."


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    build_policy(path, [TEXT], vocab_size=280, hidden_size=128, layers=2, heads=2, max_length=128, seed=5)
    return path


def _rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order that GGUF has them: the halves of each head interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write(policy: Path, file: Path) -> LlamaForCausalLM:
    """The policy as llama.cpp's converter writes it, not quantised."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    c, vocabulary = model.config, tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    out = gguf.GGUFWriter(file, "llama")
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(vocabulary)
    special = set(tokenizer.all_special_tokens)
    out.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocabulary])
    merges = [m if isinstance(m, str) else " ".join(m) for m in _merges(tokenizer)]
    out.add_token_merges(merges)
    out.add_bos_token_id(tokenizer.bos_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if ".q_proj." in name:
            tensor = _rotary(tensor, c.num_attention_heads)
        if ".k_proj." in name:
            tensor = _rotary(tensor, c.num_key_value_heads)
        in_gguf = names.get_name(name, try_suffixes=(".weight",))
        assert in_gguf is not None, name
        out.add_tensor(in_gguf, tensor.float().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model


def _merges(tokenizer: object) -> list[str | list[str]]:
    import json

    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]  # type: ignore[attr-defined]


def test_a_converted_model_says_what_the_original_says(policy: Path, tmp_path: Path) -> None:
    original = _write(policy, tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "policy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(policy)(TEXT, return_tensors="pt").input_ids
    torch.testing.assert_close(copy(ids).logits, original.float()(ids).logits, atol=0.05, rtol=0.05)  # bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "policy")(TEXT).input_ids == ids[0].tolist()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "learners.gguf", str(tmp_path / "no.gguf"), str(tmp_path / "policy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no.gguf" in done.stderr and "Traceback" not in done.stderr


def test_a_file_that_is_no_gguf_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    command = [sys.executable, "-m", "learners.gguf", str(tmp_path / "bad.gguf"), str(tmp_path / "policy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "bad.gguf" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "policy").exists()
