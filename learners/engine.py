"""The learner: one DeepSpeed engine a rank, which turns samples into optimiser steps.

Invariant: a step is the same whatever the number of ranks and micro-batches. Every share of the loss divides by the
totals of the whole step, DeepSpeed's averaging over ranks is undone, and ranks that run out of micro-batches run
fillers of zero weight, so that all ranks meet in every collective call.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ReduceOp

from learners.export import checkpoint_form, write_model
from learners.objective import Options, make_objective, summary
from learners.packing import Batch, Sample, collate, filler, pack, uncollate
from learners.policy import Policy, load_model, score
from learners.schedule import Schedule
from learners.world import join, leave, reduced

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Learner:
    """One rank. All ranks call the same methods in the same order: every call is collective.

    Args:
        model_dir: the policy in Hugging Face format.
        rank, world_size, master_addr, master_port: the ranks' meeting place; port 0 is for a world of one.
        lr, warmup_steps, total_steps, schedule, min_lr_ratio: the learning rate (`learners.schedule.Schedule`).
        betas, weight_decay: of AdamW.
        grad_clip: largest norm of the gradient.
        zero_stage: 1, 2 or 3.
        dtype: of the weights in the forward pass, float32 or bfloat16; the optimiser's own copy is float32.
        loss, loss_options, aggregation, correction, kl, kl_coef, kl_unbiased: of
            `learners.objective.make_objective`.
        entropy_bonus: how much of the mean entropy per token, in nats, is taken off the loss.
        reference: folder of the model that a KL is taken to.
        temperature: of the sampling. The policy that learns is the one that is sampled from.
        max_tokens: the longest response that may be sampled; the aggregation `fixed_length` divides by it.
        tokens_per_microbatch: rows x L of a forward pass, at most; one longer sequence passes alone. On CPUs small ones
            are fastest (500 to 1,000 tokens): their activations stay in the cache.
        gradient_checkpointing: recompute activations in the backward pass.
        threads: of torch on the CPU; None leaves them as they are.
        timeout_s: how long a rank waits for the others in any call.
        deepspeed: DeepSpeed's own options, merged last; gradient accumulation alone is the learner's.
            `{"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}` keeps float32 weights and multiplies matrices
            in bfloat16, which CPUs with such instructions do 1.4 times as fast.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: no model, an option out of range, ranks that do not meet.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        lr: float,
        rank: int = 0,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int = 0,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        schedule: str = "constant",
        min_lr_ratio: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        zero_stage: int = 2,
        dtype: str = "float32",
        loss: str = "grpo",
        loss_options: Mapping[str, float] | None = None,
        aggregation: str | None = None,
        correction: Options | None = None,
        kl: str | None = None,
        kl_coef: float = 0.0,
        kl_unbiased: bool = False,
        entropy_bonus: float = 0.0,
        reference: str | Path | None = None,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        tokens_per_microbatch: int = 1024,
        gradient_checkpointing: bool = False,
        threads: int | None = None,
        timeout_s: float = 600.0,
        deepspeed: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype '{dtype}' is not one of {', '.join(_DTYPES)}")
        if zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage {zero_stage} is not one of 1, 2, 3")
        if tokens_per_microbatch < 1:
            raise ValueError(f"tokens_per_microbatch is {tokens_per_microbatch}; it must be at least 1")
        self.rank, self.world_size, self.steps = rank, world_size, 0
        self.schedule = Schedule(lr, warmup_steps, total_steps, schedule, min_lr_ratio)
        if aggregation == "fixed_length" and max_tokens is None:
            raise ValueError("the aggregation 'fixed_length' needs max_tokens, the length that it divides by")
        self._loss = make_objective(loss, loss_options, aggregation, correction, kl, kl_coef, kl_unbiased)
        self._entropy_bonus, self._max_tokens = entropy_bonus, max_tokens or 1
        self._budget = tokens_per_microbatch
        config = merged(
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": grad_clip,
                "bf16": {"enabled": dtype == "bfloat16"},
                "zero_optimization": {"stage": zero_stage},
                "steps_per_print": None,
            },
            deepspeed or {},
        )
        stage = config["zero_optimization"]["stage"]
        # Stage 3 reduces after every backward pass: whole gradients of a model that is split would not fit a rank.
        self._reduce_once = config["managed_gradient_accumulation"] = stage < 3
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = join(rank, world_size, master_addr, master_port, timeout_s)
        try:
            self.model = load_model(model_dir, _DTYPES[dtype], config if stage == 3 else None)
            if gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self._optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True
            )
            policy = Policy(self.model, temperature, learns_entropy=entropy_bonus > 0)
            self._engine = _initialize(policy, self._optimizer, config)
            self._reference = _frozen(reference, _DTYPES[dtype], temperature, config) if reference else None
        except BaseException:
            leave()
            raise

    def step(self, samples: Sequence[Sample], *, lr: float | None = None) -> dict[str, float]:
        """One optimiser step over all ranks' samples.

        Args:
            samples: this rank's share of them (`packing.shard`), which may be empty.
            lr: overrides the schedule.

        Returns:
            Metrics of the whole step, but for the seconds the same on all ranks: `loss` and the loss's own;
            `entropy` in nats, mean over the charged tokens; `grad_norm` before clipping; `lr`; `skipped`, 1 if the
            gradient was not finite and nothing changed; `tokens` through the model and `tokens_trained`, the charged
            ones; `sequences`; `microbatches` of a rank; `padding`, the share of positions wasted;
            `forward_backward_s`, `optimizer_s`.

        Raises:
            ValueError: no charged token on any rank, or a token id that the model does not have.
        """
        started = time.perf_counter()
        batches, totals = self._plan(samples)
        with self._one_reduction():
            shares = [self._accumulate(batch) for batch in batches]
        metrics = totals | summary(self._combined(shares))
        middle = time.perf_counter()
        metrics["lr"] = self.schedule.at(self.steps) if lr is None else lr
        for group in self._optimizer.param_groups:
            group["lr"] = metrics["lr"]
        self._engine.step()
        self.steps += 1
        metrics["grad_norm"] = float(self._engine.get_global_grad_norm())
        metrics["skipped"] = float(not self._engine.was_step_applied())
        return metrics | {"forward_backward_s": middle - started, "optimizer_s": time.perf_counter() - middle}

    @torch.no_grad()
    def logprobs(self, samples: Sequence[Sample], *, reference: bool = False) -> list[np.ndarray]:
        """Log-probs of the responses' tokens by the policy as it stands, or by the reference.

        Returns:
            [R] float32 of each sample, 0 where the policy is not charged for the token.
        """
        model = self._reference if reference else self._engine
        if model is None:
            raise ValueError("this learner has no reference model")
        plans = pack([len(s) for s in samples], self._budget)
        (rounds,) = map(int, reduced([len(plans)], ReduceOp.MAX, self.device))
        found: list[np.ndarray] = [np.zeros(0)] * len(samples)
        model.eval()
        for i in range(rounds):
            batch = collate(samples, plans[i]) if i < len(plans) else filler()
            values = score(model, batch.to(self.device))[0].cpu().numpy()
            for j, row in uncollate(values, samples, plans[i]) if i < len(plans) else ():
                found[j] = row
        self._engine.train()
        return found

    def _plan(self, samples: Sequence[Sample]) -> tuple[list[Batch], dict[str, float]]:
        """This rank's micro-batches, as many as on every other rank, and the totals of the step."""
        plans = pack([len(s) for s in samples], self._budget)
        own = {
            "total_tokens": sum(s.charged * s.weight for s in samples),
            "total_sequences": sum(s.weight for s in samples if s.charged),
            "tokens_trained": sum(s.charged for s in samples),
            "tokens": sum(len(s) for s in samples),
            "positions": sum(len(p.rows) * p.length for p in plans),
            "sequences": len(samples),
        }
        totals = dict(zip(own, reduced([*own.values()], ReduceOp.SUM, self.device), strict=True))
        highest = max((int(max(s.prompt_ids.max(), s.token_ids.max())) for s in samples), default=0)
        microbatches, highest = map(int, reduced([len(plans), highest], ReduceOp.MAX, self.device))
        if highest >= (vocab := self.model.config.vocab_size):
            raise ValueError(f"a sample holds token id {highest}, but the model knows {vocab}: not its tokenizer?")
        weight, sequences = totals.pop("total_tokens"), totals.pop("total_sequences")
        if weight == 0:
            raise ValueError("no sample of this step has a charged token and a weight; there is nothing to learn from")
        batches = [collate(samples, plan) for plan in plans] + [filler()] * (microbatches - len(plans))
        totals["padding"] = 1.0 - totals["tokens"] / totals.pop("positions")
        totals["microbatches"] = microbatches
        by: dict[str, Any] = {"total_tokens": weight, "total_sequences": sequences, "max_tokens": self._max_tokens}
        return [replace(b, **by) for b in batches], totals

    def _one_reduction(self) -> AbstractContextManager[None]:
        return self._engine.coalesce_grad_reduction() if self._reduce_once else nullcontext()

    def _accumulate(self, batch: Batch) -> dict[str, Tensor]:
        """Adds the batch's share to the gradient; returns the shares of the metrics."""
        batch = batch.to(self.device)
        logprobs, entropy = score(self._engine, batch)
        share, metrics = self._loss(logprobs, batch)
        mean_entropy = (entropy * batch.mask).sum() / batch.total_tokens
        share = share - self._entropy_bonus * mean_entropy
        # DeepSpeed averages over ranks; the shares are meant to be summed.
        self._engine.backward(share * self.world_size, scale_wrt_gas=False)
        return metrics | {"loss": share.detach(), "entropy": mean_entropy.detach()}

    def _combined(self, shares: list[dict[str, Tensor]]) -> dict[str, float]:
        """Shares of metrics over micro-batches and ranks: summed, or their largest where the name ends in `_max`."""
        out: dict[str, float] = {}
        for op, fold in ((ReduceOp.SUM, torch.sum), (ReduceOp.MAX, torch.amax)):
            names = sorted(n for n in shares[0] if n.endswith("_max") == (op == ReduceOp.MAX))
            own = fold(torch.tensor([[s[n] for n in names] for s in shares], dtype=torch.float64), 0)
            out |= dict(zip(names, reduced(own.tolist(), op, self.device), strict=True))
        return out

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Streams copies of all weights under their Hugging Face checkpoint names.

        Every rank must run the iterator to its end. A tied output head is left out.
        """
        import deepspeed

        kept = self.model.state_dict().keys()  # without the buffers that are not saved
        buffers = ((n, b) for n, b in self.model.named_buffers() if n in kept)
        for name, tensor in [*self.model.named_parameters(), *buffers]:
            with deepspeed.zero.GatheredParameters([tensor]):
                copies = checkpoint_form(self.model, name, tensor.detach())
            yield from copies.items()

    def save(self, folder: str | Path, tag: str, client_state: Mapping[str, Any] | None = None) -> None:
        """Writes weights, optimiser and `client_state` (picklable) to `folder/tag`, a DeepSpeed checkpoint.

        It counts once every rank has returned; `latest` is not written: what is committed is for the caller to say.
        """
        state = {"learner_steps": self.steps, "client": dict(client_state or {})}
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)

    def load(self, folder: str | Path, tag: str) -> dict[str, Any]:
        """Resumes from a checkpoint of the same number of ranks; returns its `client_state`.

        Raises:
            FileNotFoundError: there is no such checkpoint.
        """
        if not (Path(folder) / tag).is_dir():
            raise FileNotFoundError(f"there is no checkpoint '{tag}' in '{folder}'")
        path, state = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise FileNotFoundError(f"checkpoint '{tag}' in '{folder}' is incomplete")
        self.steps = state["learner_steps"]
        return state["client"]

    def export(self, out_dir: str | Path, tokenizer_dir: str | Path) -> None:
        """Writes the policy in Hugging Face format (rank 0), with the tokenizer of `tokenizer_dir`."""
        weights = {name: tensor.cpu() for name, tensor in self.weights() if self.rank == 0}
        if self.rank == 0:
            write_model(out_dir, self.model, weights, tokenizer_dir)

    def close(self) -> None:
        """Frees the engine and leaves the process group; the process may make another learner after it."""
        self._engine.destroy()
        if self._reference is not None:
            self._reference.destroy()
        leave()


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` on top, dictionaries merged key by key."""
    both = {
        k: merged(base[k], v) for k, v in over.items() if isinstance(v, Mapping) and isinstance(base.get(k), Mapping)
    }
    return {**base, **over, **both}


def _initialize(policy: Policy, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    import deepspeed

    # The default buckets hold 500 million numbers; a small model should not pay for them.
    size = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())
    config = merged({"zero_optimization": {"reduce_bucket_size": min(size, 500_000_000)}}, config)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    return engine


def _frozen(model_dir: str | Path, dtype: torch.dtype, temperature: float, config: Mapping[str, Any]) -> Any:
    """An engine around a model that does not learn; under ZeRO-3 each rank holds its part of it."""
    import deepspeed

    stage = 3 if config["zero_optimization"]["stage"] == 3 else 0
    kept = {k: v for k, v in config.items() if k in ("train_micro_batch_size_per_gpu", "bf16", "torch_autocast")}
    kept["zero_optimization"] = config["zero_optimization"] if stage == 3 else {"stage": 0}
    model = load_model(model_dir, dtype, kept if stage == 3 else None).requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=Policy(model, temperature), config=kept)
    return engine
