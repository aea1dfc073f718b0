"""The policy as the learner calls it: token ids in, log-probs of the charged tokens out.

The head is applied only where a token is charged to the policy: prompts, padding and tool outputs never reach it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from learners.export import misfits
from learners.head import ScoringHead
from learners.packing import Batch
from learners.sequence import SequenceGroup

#: Config keys of models that change their logits after the head, which this module would miss.
_UNSUPPORTED = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def load_model(model_dir: str | Path, dtype: torch.dtype, zero3: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Loads a causal language model from a folder in Hugging Face format, never from the network.

    With `zero3`, a DeepSpeed config of that stage, each rank only ever holds its part of the weights.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the model changes its logits after the head, or its weights cannot be read or do not fit its config.
    """
    if not (Path(model_dir) / "config.json").is_file():
        raise FileNotFoundError(f"there is no model in '{model_dir}': config.json is missing")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    for key in _UNSUPPORTED:
        if getattr(config, key, None) not in (None, 1.0):
            raise ValueError(f"model '{model_dir}' sets '{key}', which the learner does not support")
    disable_progress_bar()
    if wrong := misfits(model_dir, strict=False):
        raise ValueError(f"the weights in '{model_dir}' do not fit its config.json: {wrong}")
    splits = _splits(zero3) if zero3 else None
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    del splits
    return model.train()


def _splits(config: Mapping[str, Any]) -> object:
    """As long as the returned object lives, Transformers splits the weights that it loads over the ranks."""
    from transformers.integrations import HfDeepSpeedConfig  # imports DeepSpeed: see learners.world

    return HfDeepSpeedConfig(dict(config))


class Policy(nn.Module):
    """Wraps a causal language model, so that one forward call yields log-probs instead of logits.

    The model's own head is turned into a `ScoringHead`.

    Args:
        temperature: logits are divided by it, as they are when the policy is sampled.
        sequence: the ranks that share a sequence with this one; micro-batches are then one row.

    Raises:
        ValueError: the head is not a linear map.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, sequence: SequenceGroup | None = None) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if type(head) not in (nn.Linear, ScoringHead):
            raise ValueError(f"the output head of {type(model).__name__} is a {type(head).__name__}, not a Linear")
        head.__class__ = ScoringHead
        self.model, self._temperature, self._sequence = model, temperature, sequence

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, charged: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores a micro-batch (`learners.packing.Batch`).

        Args:
            input_ids, position_ids, targets: [rows, L] int64.
            charged: [rows, L] bool, where the log-prob of the target is wanted.

        Returns:
            log-probs of the targets, and entropies of the distributions they were drawn from: both [rows, L] float32
            with gradients, 0 where not wanted.
        """
        if (group := self._sequence) is None:
            return self._score(input_ids, position_ids, targets, charged)
        length = input_ids.shape[1]
        logprobs, entropy = self._score(*map(group.mine, (input_ids, position_ids, targets, charged)))
        return group.whole(logprobs, length), group.whole(entropy, length)

    def _score(
        self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, charged: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
        ).last_hidden_state
        where = charged.flatten().nonzero().squeeze(-1)
        chosen = hidden.flatten(0, 1).index_select(0, where), targets.flatten().index_select(0, where)
        logprobs, entropy = (
            scores.new_zeros(charged.numel()).index_copy(0, where, scores).view(charged.shape)
            for scores in self.model.get_output_embeddings()(*chosen, self._temperature)
        )
        return logprobs, entropy


def score(policy: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a batch, both [rows, L]; `policy` is a `Policy` or an engine around one."""
    return policy(batch.input_ids, batch.position_ids, batch.targets, batch.charged)
