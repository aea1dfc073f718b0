"""How the losses of tokens add up to the loss of a step: the weight of every token, [rows, L], 0 where none counts.

Each divides by totals of the whole step, never by those of its micro-batch: so the shares of all micro-batches and
ranks add up.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from learners.packing import Batch


def token_mean(batch: Batch) -> Tensor:
    """Mean over all tokens of the step: long sequences weigh more (DAPO, arXiv 2503.14476)."""
    return batch.mask / batch.total_tokens


def sequence_mean(batch: Batch) -> Tensor:
    """Mean over sequences of the mean over tokens: every sequence weighs the same (DeepSeekMath, arXiv 2402.03300)."""
    return batch.mask / batch.lengths / batch.total_sequences


def fixed_length(batch: Batch) -> Tensor:
    """Mean over sequences of the sum over tokens, divided by `max_tokens` for all (Dr. GRPO, arXiv 2503.20783)."""
    return batch.mask / batch.max_tokens / batch.total_sequences


#: Name in a config -> aggregation.
AGGREGATIONS: dict[str, Callable[[Batch], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "fixed_length": fixed_length,
}
