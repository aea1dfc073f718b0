"""A policy that knows one document by heart, so that its answer can be told beforehand."""

from __future__ import annotations

from pathlib import Path


def by_heart(folder: Path, question: str, text: str) -> Path:
    """The smallest policy, trained on one document until it writes nothing else; returns its folder."""
    from transformers import AutoTokenizer

    from learners.sft import build_policy, run_sft

    build_policy(folder, [f"{question}\n{text}"] * 20, vocab_size=400, hidden_size=64, layers=2, heads=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert run_sft(folder, folder, [(prompt, answer)], lr=1e-2, max_steps=80, docs_per_step=1)["loss"] < 0.02
    return folder
