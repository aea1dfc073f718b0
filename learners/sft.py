"""Cold start: a small policy with its own tokenizer, built from nothing, and supervised steps through the learner.

`build_policy` writes a Llama with random weights and a byte-level BPE; `run_sft` trains any policy on documents until
its budget of steps or seconds is spent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from learners.engine import Learner
from learners.packing import Sample
from learners.schedule import Schedule

#: Special tokens of a policy built here; their ids are their places.
PAD, BOS, EOS, USER, ASSISTANT = SPECIAL = ("<pad>", "<s>", "</s>", "<user>", "<assistant>")

#: `<s>SYSTEM<user>QUESTION<assistant>ANSWER</s>`
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<user>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<assistant>{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

#: vLLM's attention on the CPU takes this head size, among others.
HEAD_DIM = 64

Doc = tuple[Sequence[int], Sequence[int]]
Progress = Callable[[dict[str, float]], None]


def build_policy(
    out_dir: str | Path,
    texts: Iterable[str],
    *,
    pieces: Sequence[str] = (),
    vocab_size: int = 2048,
    hidden_size: int = 256,
    layers: int = 4,
    heads: int = 4,
    intermediate_size: int | None = None,
    max_length: int = 2048,
    seed: int = 0,
) -> None:
    """Writes a Llama with random weights and tied embeddings, and its tokenizer, in Hugging Face format.

    Args:
        texts: what the tokenizer learns its merges from.
        pieces: strings that become one token each, on top of the vocabulary.
        vocab_size: largest vocabulary; a small corpus yields fewer.
        heads: of 64 numbers each, for queries, keys and values alike; they need not add up to `hidden_size`.
        intermediate_size: of the gated MLP; by default 8/3 of the hidden size, rounded up to a multiple of 32.
        max_length: positions.

    Raises:
        ValueError: a vocabulary below 261 (256 bytes and the special tokens), or a size below 1.
    """
    sizes = {"hidden_size": hidden_size, "layers": layers, "heads": heads, "max_length": max_length}
    if bad := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"a policy needs sizes of at least 1, not {bad}")
    tokenizer = train_tokenizer(texts, vocab_size, pieces)
    pad, bos, eos = (tokenizer.convert_tokens_to_ids(t) for t in (PAD, BOS, EOS))
    config = tiny_config(len(tokenizer), hidden_size, layers, heads, intermediate_size, max_length)
    config.update({"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def tiny_config(
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int | None = None,
    max_length: int = 2048,
) -> LlamaConfig:
    """The config of such a Llama, but for its tokenizer's special tokens; arguments are those of `build_policy`."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or -(-hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, pieces: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens, the chat template and `pieces`; it adds no token by itself.

    Raises:
        ValueError: `vocab_size` has no room for 256 bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL):
        raise ValueError(f"vocab_size {vocab_size} is below {len(alphabet) + len(SPECIAL)}: bytes and special tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def run_sft(
    model_dir: str | Path,
    out_dir: str | Path,
    docs: Iterable[Doc],
    *,
    lr: float = 2e-3,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    docs_per_step: int = 32,
    warmup_steps: int = 10,
    schedule: str = "linear",
    min_lr_ratio: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
    **learner: Any,
) -> dict[str, float]:
    """Trains the policy of `model_dir` on documents, in this process, and writes the result to `out_dir`.

    The budget is what comes first, steps or seconds; the learning rate falls along it. Runs with the same seed and a
    budget of steps alone are alike.

    Args:
        docs: pairs of prompt ids (with the special tokens) and response ids (with the end token), shuffled anew each
            time round; only responses are learnt.
        out_dir: may be `model_dir`.
        progress: called after each step with its metrics, `step` and `done` (share of the budget, 0..1).
        learner: more options of `Learner`.

    Returns:
        `steps`, `seconds`, `tokens`, and `loss`, the mean of the last ten steps.

    Raises:
        ValueError: no documents, no budget, or an option out of range.
    """
    samples = [_sample(prompt, response) for prompt, response in docs]
    if not samples:
        raise ValueError("there are no documents to train on")
    if not (max_steps or max_seconds) or min(max_steps or 1, max_seconds or 1, docs_per_step) <= 0:
        raise ValueError(
            f"training needs a budget: max_steps ({max_steps}) or max_seconds ({max_seconds}) above 0, "
            f"and docs_per_step ({docs_per_step}) above 0"
        )
    shape = Schedule(lr, kind=schedule, min_ratio=min_lr_ratio, total_steps=max_steps or 1)
    engine = Learner(model_dir, lr=lr, loss="sft", **learner)
    started, losses, tokens = time.monotonic(), [], 0.0
    try:
        for step, batch in enumerate(_batches(samples, docs_per_step, seed)):
            done = _spent(step, time.monotonic() - started, max_steps, max_seconds)
            if done >= 1.0:
                break
            metrics = engine.step(batch, lr=shape.after_warmup(done) * min(1.0, (step + 1) / max(1, warmup_steps)))
            losses.append(metrics["loss"])
            tokens += metrics["tokens"]
            if progress:
                progress(metrics | {"step": step + 1, "done": done})
        engine.export(out_dir, model_dir)
    finally:
        engine.close()
    seconds = time.monotonic() - started
    return {"steps": len(losses), "seconds": seconds, "tokens": tokens, "loss": float(np.mean(losses[-10:]))}


def _sample(prompt: Sequence[int], response: Sequence[int]) -> Sample:
    said = np.asarray(response)
    return Sample(np.asarray(prompt), said, np.zeros(said.shape), np.ones(said.shape))


def _batches(samples: list[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """Endless batches of `size` documents (fewer if there are fewer), each time round in another order."""
    rng = random.Random(seed)
    size = min(size, len(samples))
    while True:
        order = rng.sample(samples, len(samples))
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def _spent(step: int, seconds: float, max_steps: int | None, max_seconds: float | None) -> float:
    """Share of the budget behind us."""
    return max(step / max_steps if max_steps else 0.0, seconds / max_seconds if max_seconds else 0.0)
