"""Ulysses sequence parallelism (arXiv 2309.14509): the ranks of a group share each sequence, too long for one of them.

A rank runs its share of a sequence's tokens through the model; attention alone sees them all, for a share of its heads
(DeepSpeed's `UlyssesSPAttentionHF`). The log-probs are put together again, so that losses see whole sequences. To
DeepSpeed's optimiser all ranks are alike: each brings the gradient of its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_ATTENTION = "sdpa"


class SequenceGroup:
    """This rank's group of `size` consecutive ranks. While it lives, the process's models attend across the group.

    Raises:
        ValueError: the ranks do not divide into such groups, or the model's heads over one.
    """

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        if size < 2 or dist.get_world_size() % size:
            raise ValueError(
                f"sequence_parallel {size} must be at least 2 and divide the number of ranks, {dist.get_world_size()}"
            )
        self.size = size
        self._plain = ALL_ATTENTION_FUNCTIONS[_ATTENTION]
        groups = UlyssesSPAttentionHF.register_with_transformers(
            model, core_attn_implementation=_ATTENTION, sequence_parallel_size=size, micro_batch_size=1
        )
        self._group, self._rank = groups.get_sequence_parallel_group(), groups.get_sequence_parallel_rank()

    def mine(self, whole: Tensor) -> Tensor:
        """[1, L] -> [1, ceil(L / size)], this rank's share; the last one's is filled up with zeros."""
        short = -whole.shape[1] % self.size
        return pad(whole, (0, short)).chunk(self.size, 1)[self._rank].contiguous()

    def whole(self, mine: Tensor, length: int) -> Tensor:
        """[1, ceil(L / size)] -> [1, L] on every rank of the group; each gets the gradient of its own share."""
        return _Gather.apply(mine, self._group, self._rank)[:, :length]

    def close(self) -> None:
        """Models attend within their own rank again."""
        ALL_ATTENTION_FUNCTIONS[_ATTENTION] = self._plain


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Any, rank: int) -> Tensor:
        ctx.size, ctx.rank = dist.get_world_size(group), rank
        shares = [torch.empty_like(mine) for _ in range(ctx.size)]
        dist.all_gather(shares, mine.contiguous(), group)
        return torch.cat(shares, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Every rank of the group computes the same loss, so no other has anything to add.
        return grads[0].chunk(ctx.size, 1)[ctx.rank], None, None
