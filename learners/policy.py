"""The policy as the learner calls it: token ids in, log-probs of the charged tokens out.

The head is applied only where a token is charged to the policy: prompts, padding and tool outputs never reach it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from learners.packing import Batch

#: Logits kept for the backward pass, in numbers (1 GiB of float32). Beyond it they are made in pieces, and made again.
KEPT_LOGITS = 2**28

#: Config keys of models that change their logits after the head, which this module would miss.
_UNSUPPORTED = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def load_model(model_dir: str | Path, dtype: torch.dtype, zero3: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Loads a causal language model from a folder in Hugging Face format, never from the network.

    With `zero3`, a DeepSpeed config of that stage, each rank only ever holds its part of the weights.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the model changes its logits after the head.
    """
    if not (Path(model_dir) / "config.json").is_file():
        raise FileNotFoundError(f"there is no model in '{model_dir}': config.json is missing")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    for key in _UNSUPPORTED:
        if getattr(config, key, None) not in (None, 1.0):
            raise ValueError(f"model '{model_dir}' sets '{key}', which the learner does not support")
    disable_progress_bar()
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

    Args:
        temperature: logits are divided by it, as they are when the policy is sampled.
        learns_entropy: entropies carry a gradient.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, learns_entropy: bool = False) -> None:
        super().__init__()
        self.model, self._temperature, self._learns_entropy = model, temperature, learns_entropy

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, charged: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores a micro-batch (`learners.packing.Batch`).

        Args:
            input_ids, position_ids, targets: [rows, L] int64.
            charged: [rows, L] bool, where the log-prob of the target is wanted.

        Returns:
            log-probs of the targets, and entropies of the distributions they were drawn from: both [rows, L]
            float32, 0 where not wanted.
        """
        hidden = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
        ).last_hidden_state
        where = charged.flatten().nonzero().squeeze(-1)
        scores = self._scores(hidden.flatten(0, 1).index_select(0, where), targets.flatten().index_select(0, where))
        out = scores.new_zeros(charged.numel(), 2).index_copy(0, where, scores).view(*charged.shape, 2)
        return out[..., 0], out[..., 1] if self._learns_entropy else out[..., 1].detach()

    def _scores(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[N, hidden], [N] -> [N, 2] log-probs and entropies."""
        piece = max(1, KEPT_LOGITS // self.model.get_output_embeddings().out_features)
        if len(hidden) <= piece:
            return self._score(hidden, targets)
        pieces = zip(hidden.split(piece), targets.split(piece), strict=True)
        return torch.cat([checkpoint(self._score, h, t, use_reentrant=False) for h, t in pieces])

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        if self._temperature != 1.0:
            logits = logits / self._temperature
        distribution = torch.log_softmax(logits, dim=-1)
        chosen = distribution.gather(-1, targets[:, None])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._learns_entropy):
            entropy = -(distribution.exp() * distribution).sum(-1, keepdim=True)
        return torch.cat([chosen, entropy], dim=-1)


def score(policy: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a batch, both [rows, L]; `policy` is a `Policy` or an engine around one."""
    return policy(batch.input_ids, batch.position_ids, batch.targets, batch.mask > 0)
