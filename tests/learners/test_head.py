"""Scores from hidden states, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from learners import head as module
from learners.head import PIECE, ScoringHead
from learners.packing import Plan, Sample, collate
from learners.policy import Policy, score

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "log-probs": lambda logprobs, entropy: (logprobs * torch.linspace(-1, 2, len(logprobs))).sum(),
    "entropy": lambda logprobs, entropy: (entropy * torch.linspace(2, -1, len(entropy))).sum(),
    "both": lambda logprobs, entropy: (logprobs.exp() + 0.1 * entropy**2).sum(),
}


class Refuse(TorchDispatchMode):
    """Fails on any tensor larger than `most` numbers."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.largest = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                assert tensor.numel() <= self.most, f"{func} made a tensor of {tuple(tensor.shape)}"
        return out


def scored(head: nn.Module, hidden: Tensor, targets: Tensor, loss: Loss, temperature: float = 1.0) -> list[Tensor]:
    """Scores, and the gradients of the hidden states and of the head."""
    head.zero_grad()
    hidden = hidden.clone().requires_grad_()
    if isinstance(head, ScoringHead):
        logprobs, entropy = head(hidden, targets, temperature)
    else:
        distribution = torch.distributions.Categorical(logits=head(hidden).float() / temperature)
        logprobs, entropy = distribution.log_prob(targets), distribution.entropy()
    loss(logprobs, entropy).backward()
    gradients = [hidden.grad, *(p.grad for p in head.parameters())]
    return [logprobs.detach(), entropy.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [7, 1, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, loss: str, bias: bool, rows: int, temperature: float
) -> None:
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(16, 96, bias=bias), torch.randn(50, 16) * 3, torch.randint(0, 96, (50,))
    expected = scored(head, hidden, targets, LOSSES[loss], temperature)
    head.__class__ = ScoringHead
    monkeypatch.setattr(module, "PIECE", rows * 96)
    for mine, theirs in zip(scored(head, hidden, targets, LOSSES[loss], temperature), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_products_in_half_precision_give_float32_scores_and_gradients_in_the_weights_format() -> None:
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(16, 96, bias=False), torch.randn(50, 16), torch.randint(0, 96, (50,))
    exact = scored(head, hidden, targets, LOSSES["both"])
    head.__class__ = ScoringHead
    with torch.autocast("cpu", torch.bfloat16):
        mixed = scored(head, hidden, targets, LOSSES["both"])
    half = scored(deepcopy(head).to(torch.bfloat16), hidden.to(torch.bfloat16), targets, LOSSES["both"])
    assert [t.dtype for t in mixed] == [torch.float32] * 4
    assert [t.dtype for t in half] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for scores in (mixed, half):
        for mine, theirs in zip(scores, exact, strict=True):
            assert (mine.float() - theirs).norm() <= 0.02 * theirs.norm()


def test_no_token_at_all_scores_nothing() -> None:
    head = nn.Linear(16, 96, bias=False)
    head.__class__ = ScoringHead
    logprobs, _, *gradients = scored(head, torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64), LOSSES["both"])
    assert logprobs.shape == (0,) and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("entropy_bonus", [False, True])
def test_a_vocabulary_of_150_000_needs_no_logits_of_all_tokens(entropy_bonus: bool) -> None:
    config = LlamaConfig(
        vocab_size=150_000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    policy = Policy(LlamaForCausalLM(config))
    tokens = 600
    said = torch.randint(0, 150_000, (tokens,)).numpy()
    sample = Sample(said[:1], said, torch.zeros(tokens).numpy(), torch.ones(tokens).numpy())
    assert tokens * config.vocab_size > PIECE
    with Refuse(PIECE) as seen:
        logprobs, entropy = score(policy, collate([sample], Plan(((0,),), tokens)))
        (logprobs.sum() + entropy.sum() * entropy_bonus).backward()
    assert seen.largest > config.vocab_size * config.hidden_size  # it did look
    assert policy.model.get_output_embeddings().weight.grad is not None


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    )
    model.set_output_embeddings(nn.Sequential(nn.Linear(16, 96)))
    with pytest.raises(ValueError, match="is a Sequential, not a Linear"):
        Policy(model)
