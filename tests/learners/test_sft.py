"""The cold start: a policy from nothing, its tokenizer, and supervised training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learners.sft import build_policy, run_sft, train_tokenizer

TEXTS = [
    "Show the harbour of Århus at dusk.",
    "Plot 3 apples and 5 pears.",
    "绘制 a 🦊 in the snow\n<imgen>{'a': 1}</imgen>",
]
Docs = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built")
    build_policy(path, TEXTS, vocab_size=300, hidden_size=64, layers=2, heads=1, max_length=128, seed=5)
    return path


@pytest.fixture(scope="module")
def docs(policy: Path) -> Docs:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    pairs = [("cat", "It purrs."), ("dog", "It barks."), ("owl", "It hoots.")]
    return [
        (tokenizer.encode(f"<s><user>{question}<assistant>"), [*tokenizer.encode(answer), tokenizer.eos_token_id])
        for question, answer in pairs
    ]


def train(policy: Path, out: Path, docs: Docs, **options: Any) -> dict[str, float]:
    options = {"max_steps": 30, "docs_per_step": 2, "lr": 1e-2, "threads": 1} | options
    return run_sft(policy, out, docs, **options)


def test_the_chat_template_wraps_a_question_in_special_tokens(policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    chat = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Why?"}]
    as_text = tokenizer.apply_chat_template(chat[1:], add_generation_prompt=True, tokenize=False)
    assert as_text == "<s><user>Why?<assistant>"
    whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "So."}], tokenize=False)
    assert whole == "<s>Be brief. <user>Why?<assistant>So.</s>"
    ids = tokenizer.apply_chat_template(chat[1:], add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(as_text)
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<s>", "<user>"]
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]


@pytest.mark.parametrize("text", [*TEXTS, "", "  two  spaces , and a comma .", "\t\r\n", "ﬁ é"])
def test_any_text_survives_the_tokenizer(policy: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_built_policy_is_small_tied_and_the_same_for_the_same_seed(policy: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy)
    assert model.config.tie_word_embeddings and model.config.head_dim == 64
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(policy))
    build_policy(tmp_path, TEXTS, vocab_size=300, hidden_size=64, layers=2, heads=1, max_length=128, seed=5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_sft_learns_its_documents_and_exports_a_model_that_says_them(policy: Path, docs: Docs, tmp_path: Path) -> None:
    told: list[dict[str, float]] = []
    metrics = train(policy, tmp_path / "out", docs, max_steps=60, progress=told.append)
    assert metrics["steps"] == len(told) == 60
    assert metrics["loss"] < 0.3 < told[0]["loss"]
    assert [row["step"] for row in told] == list(range(1, 61))
    assert told[9]["lr"] > told[0]["lr"] and told[9]["lr"] > told[-1]["lr"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt, response in docs:
        said = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
        assert said.tolist() == response, tokenizer.decode(said)


def test_the_same_seed_gives_the_same_policy_also_in_place(policy: Path, docs: Docs, tmp_path: Path) -> None:
    shutil.copytree(policy, tmp_path / "in-place")
    train(policy, tmp_path / "out", docs, max_steps=3)
    train(tmp_path / "in-place", tmp_path / "in-place", docs, max_steps=3)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "in-place"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_budget_of_seconds_ends_the_training(policy: Path, docs: Docs, tmp_path: Path) -> None:
    metrics = train(policy, tmp_path / "out", docs, max_steps=None, max_seconds=0.5)
    assert metrics["steps"] >= 1 and 0.5 <= metrics["seconds"] < 20


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"docs": []}, "no documents"),
        ({"max_steps": None}, "needs a budget"),
        ({"max_steps": -1}, "needs a budget"),
        ({"docs_per_step": 0}, "docs_per_step"),
        ({"schedule": "steps"}, "no schedule"),
        ({"lr": -1.0}, "lr > 0"),
        ({"docs": [([1], [])]}, "non-empty"),
        ({"docs": [([1], [999])]}, "token id 999"),
    ],
)
def test_bad_input_to_sft_is_refused(
    policy: Path, docs: Docs, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        train(policy, tmp_path / "out", **({"docs": docs} | options))


@pytest.mark.parametrize(("size", "reason"), [({"vocab_size": 260}, "below 261"), ({"layers": 0}, "at least 1")])
def test_a_policy_of_no_size_is_refused(tmp_path: Path, size: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_policy(tmp_path, TEXTS, **size)


def test_a_small_corpus_yields_a_small_vocabulary() -> None:
    assert len(train_tokenizer(["aaaa"], 2048)) < 300
