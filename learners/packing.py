"""Samples into micro-batches: by token budget, several sequences a row where they fit.

Invariant: every sequence sits in exactly one row of one micro-batch, whole, and attends to itself alone. A row holds
its sequences one after the other, `position_ids` restart at 0 for each, and that restart is all the model is told:
Transformers builds the block-diagonal mask from it. The tail of a row goes on counting, so that a row with a single
sequence needs no mask at all and takes the fast causal kernel.

Only `prompt + response - 1` tokens go through the model: the last one predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(slots=True, eq=False)
class Sample:
    """One sampled sequence as the loss sees it.

    Attributes:
        prompt_ids: [P] token ids the policy was given, at least one.
        token_ids: [R] sampled token ids, at least one.
        logprobs: [R] float32, the sampler's log-prob of each sampled token.
        mask: [R] uint8, 1 where the policy is charged for the token.
        advantage: one number for the whole sequence, or [R], one a token.
        weight: multiplies the sequence's share of the loss and of its normaliser; 0 leaves it out.
        proximal: [R] float32, the learner's log-probs before the first update of the step, if they were taken.
        reference: [R] float32, those of the reference model, if there is one.

    Raises:
        ValueError: tokens and what belongs to each differ in length, or hold a value that would poison the step.
    """

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray
    advantage: float | np.ndarray = 0.0
    weight: float = 1.0
    proximal: np.ndarray | None = None
    reference: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.prompt_ids = _token_ids("prompt_ids", self.prompt_ids)
        self.token_ids = _token_ids("token_ids", self.token_ids)
        self.logprobs = np.asarray(self.logprobs, dtype=np.float32)
        mask = np.asarray(self.mask)
        size = self.token_ids.shape
        if self.logprobs.shape != size or mask.shape != size:
            raise ValueError(
                f"sample is misaligned: {size[0]} token_ids, logprobs of shape {self.logprobs.shape}, "
                f"mask of shape {mask.shape}; give one log-prob and one mask value a sampled token"
            )
        for name in ("advantage", "proximal", "reference"):
            if np.shape(values := getattr(self, name)) not in ((), size):
                raise ValueError(f"sample is misaligned: {size[0]} token_ids, {name} of shape {np.shape(values)}")
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("sample's mask holds a value other than 0 and 1")
        self.mask = mask.astype(np.uint8)
        if not np.isfinite(self.logprobs[self.mask == 1]).all():
            raise ValueError("sample's logprobs are not finite where the mask is 1; drop the sample")
        if not np.isfinite(self.advantage).all():
            raise ValueError(f"sample's advantage is {self.advantage}; it must be finite")
        if not (np.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"sample's weight is {self.weight}; it must be finite and not negative")

    def __len__(self) -> int:
        """Tokens that go through the model: `P + R - 1`."""
        return len(self.prompt_ids) + len(self.token_ids) - 1

    @property
    def charged(self) -> int:
        """Tokens that the policy is charged for and that count."""
        return int(self.mask.sum()) if self.weight > 0 else 0


def _token_ids(name: str, ids: object) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"sample's {name} must be a non-empty list of integers, not {array.dtype} {array.shape}")
    if array.min() < 0:
        raise ValueError(f"sample's {name} holds the negative id {array.min()}")
    return array.astype(np.int64)


#: A sequence shorter than this share of its micro-batch's L opens no row: no row is emptier than a fifth.
FULL_ROW = 0.8


@dataclass(frozen=True)
class Plan:
    """One micro-batch: `rows[r]` lists the indices of the sequences in row r, in order; `length` is L."""

    rows: tuple[tuple[int, ...], ...]
    length: int


def pack(lengths: Sequence[int], tokens_per_microbatch: int) -> list[Plan]:
    """Plans micro-batches of [rows, L] tokens with `rows * L <= tokens_per_microbatch`.

    First-fit decreasing: L is the longest sequence left, those of nearly that length get a row each, shorter ones fill
    the gaps or wait for a micro-batch of their own length. A sequence longer than the budget passes alone.

    Raises:
        ValueError: a length or the budget is below 1.
    """
    if tokens_per_microbatch < 1 or any(n < 1 for n in lengths):
        raise ValueError(f"tokens_per_microbatch ({tokens_per_microbatch}) and every length must be at least 1")
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    plans = []
    while left:
        length = lengths[left[0]]
        capacity = max(1, tokens_per_microbatch // length)
        rows: list[list[int]] = []
        room: list[int] = []
        rest = []
        for i in left:
            row = next((r for r, free in enumerate(room) if lengths[i] <= free), None)
            if row is not None:
                rows[row].append(i)
                room[row] -= lengths[i]
            elif len(rows) < capacity and lengths[i] >= FULL_ROW * length:
                rows.append([i])
                room.append(length - lengths[i])
            else:
                rest.append(i)
        plans.append(Plan(tuple(map(tuple, rows)), length))
        left = rest
    return plans


def shard(samples: Sequence[Sample], world_size: int) -> list[list[Sample]]:
    """Deals the samples to the ranks, longest first, each to the rank with the fewest tokens so far."""
    shards: list[list[Sample]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for sample in sorted(samples, key=len, reverse=True):
        rank = tokens.index(min(tokens))
        shards[rank].append(sample)
        tokens[rank] += len(sample)
    return shards


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Column t speaks of the token at t + 1, which is the one that position t predicts.

    Attributes:
        input_ids, position_ids: [rows, L] int64.
        targets: [rows, L] int64, the token to be predicted; 0 where there is none.
        logprobs: [rows, L] float32 of the sampler; 0 where the mask is 0.
        proximal, reference: [rows, L] float32, likewise of the policy before the first update of the step and of the
            reference model; None where the samples do not have them.
        advantages: [rows, L] float32.
        mask: [rows, L] float32, the sequence's weight where the target is charged to the policy, else 0.
        sequence: [rows, L] int64, which of the micro-batch's sequences the target belongs to; 0 where the mask is 0.
        sequences: number of sequences in the micro-batch.
        total_tokens, total_sequences: what a loss divides by: the sums over the whole optimiser step, all ranks and
            micro-batches together, of `mask`, and of the weights of sequences with a charged token.
        max_tokens: the longest response that may be sampled.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    sequence: torch.Tensor
    sequences: int
    proximal: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    total_tokens: float = 1.0
    total_sequences: float = 1.0
    max_tokens: float = 1.0

    @property
    def charged(self) -> torch.Tensor:
        """[rows, L] bool, where a token counts."""
        return self.mask > 0

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, L] sums of values over the charged tokens of each token's sequence."""
        totals = values.new_zeros(self.sequences)
        kept = torch.where(self.charged, values, 0.0)
        return totals.index_add(0, self.sequence.flatten(), kept.flatten())[self.sequence]

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, L] means of values over the charged tokens of each token's sequence."""
        return self.sums(values) / self.lengths

    @property
    def lengths(self) -> torch.Tensor:
        """[rows, L] charged tokens of each token's sequence, at least 1."""
        return self.sums(torch.ones_like(self.mask)).clamp(min=1.0)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors: dict[str, Any] = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


def collate(samples: Sequence[Sample], plan: Plan) -> Batch:
    """Lays the plan's samples out as tensors of [rows, L]."""
    shape = (len(plan.rows), plan.length)
    ids, positions, targets, sequence = (np.zeros(shape, dtype=np.int64) for _ in range(4))
    logprobs, proximal, reference, advantages, mask = (np.zeros(shape, dtype=np.float32) for _ in range(5))
    places = _places(samples, plan)
    for number, (i, row, start, said) in enumerate(places):
        s = samples[i]
        ids[row, start : start + len(s)] = np.concatenate([s.prompt_ids, s.token_ids[:-1]])
        positions[row, start:] = np.arange(shape[1] - start)
        targets[row, said] = s.token_ids
        for out, values in ((logprobs, s.logprobs), (proximal, s.proximal), (reference, s.reference)):
            if values is not None:
                out[row, said] = np.where(s.mask == 1, values, 0.0)
        advantages[row, said] = s.advantage
        mask[row, said] = s.mask * s.weight
        sequence[row, said] = number
    with_proximal = all(samples[i].proximal is not None for i, *_ in places)
    with_reference = all(samples[i].reference is not None for i, *_ in places)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        logprobs=torch.from_numpy(logprobs),
        advantages=torch.from_numpy(advantages),
        mask=torch.from_numpy(mask),
        sequence=torch.from_numpy(sequence),
        sequences=len(places),
        proximal=torch.from_numpy(proximal) if with_proximal else None,
        reference=torch.from_numpy(reference) if with_reference else None,
    )


def uncollate(values: np.ndarray, samples: Sequence[Sample], plan: Plan) -> Iterator[tuple[int, np.ndarray]]:
    """From [rows, L] values of a micro-batch, the index of each of its samples and the [R] values of its tokens."""
    for i, row, _, said in _places(samples, plan):
        yield i, values[row, said]


def _places(samples: Sequence[Sample], plan: Plan) -> list[tuple[int, int, int, slice]]:
    """Of each sequence of a plan: its index, its row, where it starts, and the columns that predict its response."""
    places = []
    for row, indices in enumerate(plan.rows):
        start = 0
        for i in indices:
            end = start + len(samples[i])
            places.append((i, row, start, slice(start + len(samples[i].prompt_ids) - 1, end)))
            start = end
    return places


def filler() -> Batch:
    """A micro-batch of two tokens without weight: a rank that has run out runs it to stay in step with the others."""
    zero = np.zeros(1, dtype=np.int64)
    sample = Sample(np.zeros(2, dtype=np.int64), zero, zero, zero, proximal=zero, reference=zero)
    return collate([sample], Plan(((0,),), len(sample)))
