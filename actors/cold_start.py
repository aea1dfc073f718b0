"""The cold start as an actor: supervised training of a policy on synthetic documents, with progress to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from replay.folders import written


@ray.remote
class ColdStart:
    """Builds a tiny policy and trains it, in a thread; `progress` answers meanwhile (use `max_concurrency=2`)."""

    def __init__(self) -> None:
        self._progress: tuple[int, int, str] = (0, 1, "")

    def run(
        self, url: str, tiny: Mapping[str, Any], sft: Mapping[str, Any], seed: int, max_tokens: int
    ) -> dict[str, float]:
        """Write a cold-started policy to `url`; returns the last metrics.

        Args:
            url: folder of the policy, in Hugging Face form: a path or `s3://...`.
            tiny: size of the model.
            sft: `documents`, `right`, `epochs`, `documents_per_step`, `lr`, `threads`, `tokens_per_microbatch`.
            seed: of documents, weights and order.
            max_tokens: longest answer that a rollout may have; every document must fit.
        """
        with written(url) as folder:
            return self._write(folder, tiny, sft, seed, max_tokens)

    def progress(self) -> tuple[int, int, str]:
        """(steps done, steps in all, a note)."""
        return self._progress

    def _write(
        self, folder: str, tiny: Mapping[str, Any], sft: Mapping[str, Any], seed: int, max_tokens: int
    ) -> dict[str, float]:
        from transformers import AutoTokenizer

        from corpus.documents import PIECES, cold_start
        from learners.sft import build_policy, run_sft

        pairs = [(p.question, text) for p, text in cold_start(sft["documents"], seed, sft["right"])]
        build_policy(folder, (f"{q}\n{t}" for q, t in pairs), pieces=PIECES, **tiny, seed=seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        docs = [
            (_prompt(tokenizer, q), [*tokenizer.encode(t, add_special_tokens=False), tokenizer.eos_token_id])
            for q, t in pairs
        ]
        longest = max(len(ids) for _, ids in docs)
        if longest > max_tokens:
            raise ValueError(
                f"a cold-start document has {longest} tokens, rollout.max_tokens is {max_tokens}; raise it"
            )
        steps = max(1, round(sft["epochs"] * len(docs) / sft["documents_per_step"]))
        self._progress = (0, steps, "")
        return run_sft(
            folder,
            folder,
            docs,
            max_steps=steps,
            docs_per_step=sft["documents_per_step"],
            lr=sft["lr"],
            dtype=sft["dtype"],
            tokens_per_microbatch=sft["tokens_per_microbatch"],
            threads=sft["threads"],
            seed=seed,
            progress=lambda row: self._tell(row, steps),
        )

    def _tell(self, row: Mapping[str, float], steps: int) -> None:
        self._progress = (int(row["step"]), steps, f"loss {row['loss']:.3f}")


def _prompt(tokenizer: Any, question: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
