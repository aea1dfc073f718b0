"""A tiny policy on disk and samples for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learners.engine import Learner
from learners.packing import Sample

VOCAB = 96

#: Prompt and response tokens of twelve samples; the short ones fit beside the long ones.
SIZES = [(8, 16), (5, 15), (7, 12), (3, 14), (6, 9), (9, 6), (2, 10), (4, 5), (1, 4), (1, 3), (1, 2), (2, 1)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 0.1 M parameters with a tied head."""
    return llama(tmp_path_factory.mktemp("policy"))


def llama(path: Path, **larger: int) -> Path:
    """Such a model, or one that is larger in some way."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32} | larger
    config = LlamaConfig(
        vocab_size=VOCAB,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def learner(model_dir: Path) -> Iterator[Callable[..., Learner]]:
    """Makes a learner of the tiny policy, in place of the one it made before; closes the last one."""
    with ExitStack() as last:

        def make(**options: Any) -> Learner:
            last.close()
            options = {"lr": 1e-3, "tokens_per_microbatch": 64, "threads": 1, "timeout_s": 60.0} | options
            return last.enter_context(closing(Learner(options.pop("model_dir", model_dir), **options)))

        yield make


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Samples of unlike lengths, weights and masks."""
    rng = np.random.default_rng(3)
    made = []
    for prompt, said in SIZES:
        mask = rng.random(said) < 0.8
        mask[0] = True
        made.append(
            Sample(
                rng.integers(0, VOCAB, prompt),
                rng.integers(0, VOCAB, said),
                rng.normal(-4.0, 0.5, said),
                mask,
                advantage=float(rng.normal()),
                weight=float(rng.choice([0.5, 1.0])),
            )
        )
    return made
