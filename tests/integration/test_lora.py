"""Adapters of the learner in vLLM: versions swapped under running requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engine import Completion, Engine
from learners.engine import Learner
from learners.packing import Sample
from learners.sft import build_policy

PROMPT = [1, 40, 41, 42]


def versions(folder: Path) -> Path:
    """A policy, and adapters `1` and `2` of two versions of it beside the merged policies `merged-1` and `merged-2`."""
    policy = folder / "policy"
    build_policy(policy, ["a text to learn a few pieces from"], vocab_size=300, hidden_size=64, layers=2, heads=2)
    rng = np.random.default_rng(0)
    samples = [
        Sample(np.array(PROMPT), ids, np.zeros(20), np.ones(20), advantage=1.0) for ids in rng.integers(0, 261, (4, 20))
    ]
    options: dict[str, Any] = {"lora": {"r": 8, "lora_alpha": 16}, "loss": "sft", "lr": 3e-2, "threads": 1}
    with closing(Learner(policy, **options)) as learner:
        for version in (1, 2):
            for _ in range(4):
                learner.step(samples)
            learner.export_adapter(folder / str(version))
            learner.export(folder / f"merged-{version}", policy)
    return policy


def logprobs(folder: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """What Transformers gives the tokens after `PROMPT`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[*PROMPT, *token_ids]])
    scores = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    return scores[len(PROMPT) - 1 :].detach()


@pytest.mark.integration
@pytest.mark.timeout(300)
async def test_requests_end_with_the_adapter_they_began_with_and_new_ones_use_the_new_one(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # vLLM forks, which does not go with used torch threads
        policy = apart.submit(versions, tmp_path).result(timeout=200)
    options = {"dtype": "float32", "max_model_len": 512, "enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    engine = Engine(str(policy), 0, options)
    try:
        await engine.start()
        sampling = {"max_tokens": 300, "seed": 1, "ignore_eos": True}
        await engine.adopt(tmp_path / "1", 1)
        long = asyncio.create_task(engine.complete("long", PROMPT, sampling))
        await engine.complete("short", PROMPT, sampling | {"max_tokens": 8})  # by now the long one is under way
        assert not long.done()
        await engine.adopt(tmp_path / "2", 2)
        new = await engine.complete("new", PROMPT, sampling | {"max_tokens": 30})
        old = await long
    finally:
        engine.close()
    for done, version in ((old, 1), (new, 2)):
        assert done.versions == [version] * len(done.token_ids)
        torch.testing.assert_close(
            torch.tensor(done.logprobs), logprobs(tmp_path / f"merged-{version}", done.token_ids), rtol=1e-3, atol=1e-3
        )
    assert not _alike(new, tmp_path / "merged-1")


def _alike(done: Completion, folder: Path) -> bool:
    return torch.allclose(torch.tensor(done.logprobs), logprobs(folder, done.token_ids), rtol=1e-3, atol=1e-3)
