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

from learners.checkpoint import UNIVERSAL, State, flush, on_disk, restore_swapped, universal
from learners.export import checkpoint_form, write_model
from learners.lora import adapter_parts, add_adapter, parts, without_adapter, written_config
from learners.objective import Options, make_objective, summary
from learners.packing import Batch, Plan, Sample, collate, filler, pack, uncollate
from learners.policy import Policy, load_model, score
from learners.schedule import Schedule
from learners.sequence import SequenceGroup
from learners.world import join, leave, led, reduced, together

#: Steps in a row that were skipped, because loss or gradient was not finite, after which the learner gives up.
MAX_SKIPPED = 5

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NotFinite(RuntimeError):
    """Loss or gradient was not finite in too many steps in a row."""


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
        reference: folder of the model that a KL is taken to; with `lora` it must be `model_dir`, and takes no memory.
        temperature: of the sampling. The policy that learns is the one that is sampled from.
        max_tokens: the longest response that may be sampled; the aggregation `fixed_length` divides by it.
        tokens_per_microbatch: rows x L of a forward pass, at most; one longer sequence passes alone. On CPUs small ones
            are fastest (500 to 1,000 tokens): their activations stay in the cache.
        gradient_checkpointing: recompute activations in the backward pass.
        sequence_parallel: ranks that share every sequence (`learners.sequence`); 1 for whole sequences. With more, a
            micro-batch is one sequence, of which a rank holds a share.
        lora: options of an adapter that is trained instead of the weights (`learners.lora`).
        threads: of torch on the CPU; None leaves them as they are.
        timeout_s: how long a rank waits for the others in any call.
        deepspeed: DeepSpeed's own options, merged last; a config may not hold those that the learner sets. Offload is
            `{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}`; with an `optimizer`, such as
            `{"optimizer": {"type": "SGD"}}`, DeepSpeed makes that one instead of AdamW.
            `{"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}` keeps float32 weights and multiplies matrices
            in bfloat16, which CPUs with such instructions do 1.4 times as fast.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: no model, an option out of range, ranks that do not meet, no access
            to NVMe.
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
        sequence_parallel: int = 1,
        lora: Mapping[str, Any] | None = None,
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
        if lora is not None and reference not in (None, model_dir):
            raise ValueError("with lora the reference is the model without its adapter, so it must be the model itself")
        self.rank, self.world_size, self.steps, self._skipped = rank, world_size, 0, 0
        self.schedule = Schedule(lr, warmup_steps, total_steps, schedule, min_lr_ratio)
        if aggregation == "fixed_length" and max_tokens is None:
            raise ValueError("the aggregation 'fixed_length' needs max_tokens, the length that it divides by")
        self._loss = make_objective(loss, loss_options, aggregation, correction, kl, kl_coef, kl_unbiased)
        self._entropy_bonus, self._max_tokens = entropy_bonus, max_tokens or 1
        self._budget = tokens_per_microbatch
        self._sequence: SequenceGroup | None = None
        config = merged(
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": grad_clip,
                "bf16": {"enabled": dtype == "bfloat16"},
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # it would be compiled at start-up; torch's is as fast
                "steps_per_print": None,
            },
            deepspeed or {},
        )
        config = _through_disk(config)
        stage = self._stage = config["zero_optimization"]["stage"]
        # Stage 3 reduces after every backward pass: whole gradients of a model that is split would not fit a rank.
        self._reduce_once = config["managed_gradient_accumulation"] = stage < 3
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = join(rank, world_size, master_addr, master_port, timeout_s)
        try:
            self.model = load_model(model_dir, _DTYPES[dtype], config if stage == 3 else None)
            self._lora = add_adapter(self.model, lora) if lora is not None else None
            if gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            trained = [p for p in self.model.parameters() if p.requires_grad]
            adamw = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
            if sequence_parallel != 1:
                self._sequence = SequenceGroup(self.model, sequence_parallel)
            self._engine = _initialize(Policy(self.model, temperature, self._sequence), trained, adamw, config)
            self._reference: Any = None
            if reference is not None and self._lora is None:
                beside = _beside(config)
                frozen = load_model(reference, _DTYPES[dtype], beside if stage == 3 else None).requires_grad_(False)
                self._reference = _frozen(Policy(frozen, temperature, self._sequence), beside)
            elif reference is not None:
                self._reference = self._engine
        except BaseException:
            self._leave()
            raise

    @property
    def shard(self) -> tuple[int, int]:
        """(which, of how many): the share of a step's samples that is this rank's. Ranks may have the same one."""
        size = self._sequence.size if self._sequence else 1
        return self.rank // size, self.world_size // size

    def step(self, samples: Sequence[Sample], *, lr: float | None = None) -> dict[str, float]:
        """One optimiser step over all ranks' samples.

        Args:
            samples: this rank's share of them (`packing.shard`, `self.shard`), which may be empty.
            lr: overrides the schedule.

        Returns:
            Metrics of the whole step, but for the seconds the same on all ranks: `loss` and the loss's own;
            `entropy` in nats, mean over the charged tokens; `grad_norm` before clipping; `lr`; `skipped`, 1 if loss or
            gradient was not finite and nothing changed; `tokens` through the model and `tokens_trained`, the charged
            ones; `sequences`; `microbatches` of a rank; `padding`, the share of positions wasted;
            `forward_backward_s`, `optimizer_s`.

        Raises:
            ValueError: no charged token on any rank, or a token id that the model does not have.
            NotFinite: `MAX_SKIPPED` steps in a row were skipped.
            RankLost: another rank died, or did not answer in time.
        """
        with together(self.rank, self.world_size):
            metrics = self._step(samples, lr)
        self._give_up_if_hopeless(metrics)
        return metrics

    def _step(self, samples: Sequence[Sample], lr: float | None) -> dict[str, float]:
        started = time.perf_counter()
        batches, totals = self._plan(samples)
        with self._one_reduction():
            shares = [self._accumulate(batch) for batch in batches]
        metrics = totals | summary(self._combined(shares))
        middle = time.perf_counter()
        metrics["lr"] = self.schedule.at(self.steps) if lr is None else lr
        for group in self._engine.optimizer.param_groups:
            group["lr"] = metrics["lr"]
        self._engine.step()
        self.steps += 1
        metrics["grad_norm"] = float(self._engine.get_global_grad_norm())
        metrics["skipped"] = float(not self._engine.was_step_applied())
        return metrics | {"forward_backward_s": middle - started, "optimizer_s": time.perf_counter() - middle}

    def _give_up_if_hopeless(self, metrics: Mapping[str, float]) -> None:
        self._skipped = self._skipped + 1 if metrics["skipped"] else 0
        if self._skipped >= MAX_SKIPPED:
            raise NotFinite(
                f"loss or gradient was not finite in {MAX_SKIPPED} optimiser steps in a row (loss {metrics['loss']:g}, "
                f"gradient norm {metrics['grad_norm']:g}, lr {metrics['lr']:g}); nothing was changed by them: resume "
                "from the last checkpoint with a lower learning rate"
            )

    @torch.no_grad()
    def logprobs(self, samples: Sequence[Sample], *, reference: bool = False) -> list[np.ndarray]:
        """Log-probs of the responses' tokens by the policy as it stands, or by the reference.

        Returns:
            [R] float32 of each sample, 0 where the policy is not charged for the token.

        Raises:
            ValueError: there is no reference.
            RankLost: another rank died, or did not answer in time.
        """
        model = self._reference if reference else self._engine
        if model is None:
            raise ValueError("this learner has no reference model")
        bare = without_adapter(self.model) if reference and self._lora else nullcontext()
        with together(self.rank, self.world_size), bare:
            return self._logprobs(model, samples)

    def _logprobs(self, model: Any, samples: Sequence[Sample]) -> list[np.ndarray]:
        plans = self._packed(samples)
        (rounds,) = map(int, self._reduced([len(plans)], ReduceOp.MAX))
        found: list[np.ndarray] = [np.zeros(0)] * len(samples)
        model.eval()
        for i in range(rounds):
            batch = collate(samples, plans[i]) if i < len(plans) else filler()
            values = score(model, batch.to(self.device))[0].cpu().numpy()
            for j, row in uncollate(values, samples, plans[i]) if i < len(plans) else ():
                found[j] = row
        self._engine.train()
        return found

    def _packed(self, samples: Sequence[Sample]) -> list[Plan]:
        lengths = [len(s) for s in samples]
        return [Plan(((i,),), n) for i, n in enumerate(lengths)] if self._sequence else pack(lengths, self._budget)

    def _plan(self, samples: Sequence[Sample]) -> tuple[list[Batch], dict[str, float]]:
        """This rank's micro-batches, as many as on every other rank, and the totals of the step."""
        plans = self._packed(samples)
        own = {
            "total_tokens": sum(s.charged * s.weight for s in samples),
            "total_sequences": sum(s.weight for s in samples if s.charged),
            "tokens_trained": sum(s.charged for s in samples),
            "tokens": sum(len(s) for s in samples),
            "positions": sum(len(p.rows) * p.length for p in plans),
            "sequences": len(samples),
        }
        totals = dict(zip(own, self._reduced([*own.values()], ReduceOp.SUM), strict=True))
        highest = max((int(max(s.prompt_ids.max(), s.token_ids.max())) for s in samples), default=0)
        microbatches, highest = map(int, self._reduced([len(plans), highest], ReduceOp.MAX))
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
        if self._entropy_bonus:
            share = share - self._entropy_bonus * mean_entropy
        # DeepSpeed averages over ranks; the shares are meant to be summed. A loss that is not finite must not be
        # followed even where its gradient is: it poisons the gradient, and then DeepSpeed skips the step on all ranks.
        scale = torch.where(share.detach().isfinite(), self.world_size, torch.nan)
        self._engine.backward(share * scale, scale_wrt_gas=False)
        return metrics | {"loss": share.detach(), "entropy": mean_entropy.detach()}

    def _combined(self, shares: list[dict[str, Tensor]]) -> dict[str, float]:
        """Shares of metrics over micro-batches and ranks: summed, or their largest where the name ends in `_max`."""
        out: dict[str, float] = {}
        for op, fold in ((ReduceOp.SUM, torch.sum), (ReduceOp.MAX, torch.amax)):
            names = sorted(n for n in shares[0] if n.endswith("_max") == (op == ReduceOp.MAX))
            own = fold(torch.tensor([[s[n] for n in names] for s in shares], dtype=torch.float64), 0)
            out |= dict(zip(names, self._reduced(own.tolist(), op), strict=True))
        return out

    def _reduced(self, values: list[float], op: ReduceOp.RedOpType) -> list[float]:
        """Over all ranks; in a sum, those that share their samples count once."""
        alike = self.world_size // self.shard[1] if op == ReduceOp.SUM else 1
        return [v / alike for v in reduced(values, op, self.device)]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Streams copies of all weights under their Hugging Face checkpoint names, an adapter merged into them.

        Every rank must run the iterator to its end. A tied output head is left out.
        """
        import deepspeed

        for part in parts(self.model):
            with deepspeed.zero.GatheredParameters(part.made_of):
                copies = checkpoint_form(self.model, part.name, part.merged())
            yield from copies.items()

    def adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Streams copies of the adapter's own weights under PEFT's names, likewise; `adapter_config` is of them."""
        import deepspeed

        for name, parameter in adapter_parts(self.model):
            with deepspeed.zero.GatheredParameters([parameter]):
                copy = parameter.detach().clone()
            yield name, copy

    @property
    def adapter_config(self) -> str:
        """PEFT's adapter_config.json.

        Raises:
            ValueError: the learner trains no adapter.
        """
        if self._lora is None:
            raise ValueError("the learner trains all weights: it has no adapter without `lora`")
        return written_config(self._lora)

    def save(self, folder: str | Path, tag: str, client: Mapping[str, Any] | None = None) -> None:
        """Writes weights, optimiser and `client` (JSON) to `folder/tag`; it is a checkpoint once every rank is done.

        `latest` is not written: what is committed is for the caller to say.

        Raises:
            RankLost: another rank died, or did not answer in time; `folder/tag` is no checkpoint.
        """
        home = Path(folder) / tag
        with together(self.rank, self.world_size):
            # It begins and ends with a barrier. Frozen weights are those of the model that the learner started from.
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
            flush(home)
            reduced([0.0], ReduceOp.SUM, self.device)
        if self.rank == 0:
            State(self.world_size, self._stage, self.steps, self._shapes(), dict(client or {})).write(home)

    def load(self, folder: str | Path, tag: str) -> Mapping[str, Any]:
        """Resumes from a checkpoint, of any number of ranks; returns its `client`.

        Raises:
            FileNotFoundError: there is no such checkpoint, or it is incomplete.
            ValueError: it is of another model, or of a ZeRO stage or an offload that this learner cannot read.
            RuntimeError, TimeoutError: it could not be converted for this number of ranks.
        """
        home = Path(folder) / tag
        state = State.read(home)
        state.check(self._stage, self._shapes())
        swapped = self._engine.zero_nvme_offload_optimizer()
        if on_disk(home) != swapped or (swapped and state.ranks != self.world_size):
            raise ValueError(
                f"checkpoint '{home}' is of {state.ranks} ranks with `offload_optimizer` "
                f"{'to NVMe' if on_disk(home) else 'not to NVMe'}; resume with the same (without NVMe, on any number)"
            )
        if state.ranks != self.world_size:
            home = universal(home)
        self._engine._config.load_universal_checkpoint = home.name == UNIVERSAL
        path, _ = self._engine.load_checkpoint(str(home.parent), tag=home.name, load_module_strict=self._lora is None)
        if path is None:
            raise FileNotFoundError(f"checkpoint '{home}' is incomplete: DeepSpeed's files are missing")
        if swapped:
            restore_swapped(self._engine.optimizer, self._engine._get_zero_ckpt_name(str(home.parent), home.name))
        # From a universal one, DeepSpeed gives all pieces of ZeRO-3 the same step counter, and each would count it up.
        for held in self._engine.optimizer.optimizer.state.values():
            if torch.is_tensor(held.get("step")):
                held["step"] = held["step"].clone()
        self.steps = state.steps
        return state.client

    def _shapes(self) -> dict[str, list[int]]:
        return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self.model.named_parameters()}

    def export(self, url: str | Path, tokenizer_dir: str | Path) -> None:
        """Writes the policy in Hugging Face format (rank 0), with the tokenizer of `tokenizer_dir`.

        Args:
            url: a path or `s3://...`; what was there is replaced once the policy is whole.
        """
        weights = {name: tensor.cpu() for name, tensor in self.weights() if self.rank == 0}
        led(lambda: write_model(url, self.model, weights, tokenizer_dir), self.rank, self.world_size)

    def release(self) -> None:
        """Hand back what torch holds of the accelerator's memory without need, for whoever shares it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Frees the engine and leaves the process group; the process may make another learner after it."""
        self._engine.destroy()
        if self._reference not in (None, self._engine):
            self._reference.destroy()
        self._leave()

    def _leave(self) -> None:
        if self._sequence is not None:
            self._sequence.close()
        leave()


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` on top, dictionaries merged key by key."""
    both = {
        k: merged(base[k], v) for k, v in over.items() if isinstance(v, Mapping) and isinstance(base.get(k), Mapping)
    }
    return {**base, **over, **both}


def _initialize(policy: Policy, trained: list[Tensor], adamw: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    import deepspeed

    # The default buckets hold 500 million numbers; a small model should not pay for them.
    size = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())
    config = merged({"zero_optimization": {"reduce_bucket_size": min(size, 500_000_000)}}, config)
    optimizer = None if "optimizer" in config else adamw
    engine, *_ = deepspeed.initialize(model=policy, model_parameters=trained, optimizer=optimizer, config=config)
    return engine


def _through_disk(config: dict[str, Any]) -> dict[str, Any]:
    """The config, if DeepSpeed can read and write this node's NVMe where it asks for that.

    DeepSpeed 0.19 asks twice for a weight's buffer when it fetches weights from NVMe ahead of time: that is off.

    Raises:
        RuntimeError: it cannot.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    zero = config["zero_optimization"]
    optimizer, weights = ((zero.get(f"offload_{what}") or {}).get("device") for what in ("optimizer", "param"))
    if "nvme" in (optimizer, weights) and not AsyncIOBuilder().is_compatible(verbose=False):
        raise RuntimeError(
            "offload to NVMe goes through DeepSpeed's async_io, which it compiles at its first start: it needs g++ and "
            "libaio-dev (by the Debian name) on every node with a learner rank"
        )
    return merged({"zero_optimization": {"stage3_prefetch_bucket_size": 0}}, config) if weights == "nvme" else config


def _beside(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same for another model, whose weights need a folder of their own on NVMe."""
    disk = (config["zero_optimization"].get("offload_param") or {}).get("nvme_path")
    return merged(config, {"zero_optimization": {"offload_param": {"nvme_path": f"{disk}/reference"}}} if disk else {})


def _frozen(policy: Policy, config: Mapping[str, Any]) -> Any:
    """An engine around a model that does not learn; under ZeRO-3 each rank holds its part of it."""
    import deepspeed

    kept = {k: v for k, v in config.items() if k in ("train_micro_batch_size_per_gpu", "bf16", "torch_autocast")}
    zero = config["zero_optimization"]
    engine, *_ = deepspeed.initialize(
        model=policy, config=kept | {"zero_optimization": zero if zero["stage"] == 3 else {"stage": 0}}
    )
    return engine
