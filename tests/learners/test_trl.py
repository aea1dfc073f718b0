"""Losses, advantages, KL and corrections give the values and gradients of TRL's trainers, on the same samples.

TRL computes all of it inside its trainers. So real ones are built on a small policy, and only told what was sampled
(`_generate`) and what log-probs the models give (`_get_per_token_logps_and_entropies`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from learners.advantages import ADVANTAGES, Outcome, by_group, group_normalised
from learners.kl import k1
from learners.objective import make_objective, summary
from learners.packing import Batch, Plan, Sample, collate
from learners.sft import build_policy

LENGTHS = [5, 2, 7, 4, 3, 6, 1, 7]
GROUP = 4
LONGEST = 7
#: Of TRL's advantages; ours divides by a smaller one.
EPS = 1e-4


@dataclass
class Case:
    """Two groups of four samples with log-probs of four policies, all [8, 7], and their rewards."""

    sampler: Tensor
    proximal: Tensor
    reference: Tensor
    policy: Tensor
    entropy: Tensor
    rewards: Tensor
    ids: list[list[int]] = field(default_factory=list)

    @property
    def mask(self) -> Tensor:
        return torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def case() -> Case:
    made = torch.Generator().manual_seed(5)

    def near(values: Tensor, by: float) -> Tensor:
        return values + by * torch.randn(values.shape, generator=made)

    sampler = -3.0 * torch.rand(len(LENGTHS), LONGEST, generator=made) - 0.5
    proximal = near(sampler, 0.4)
    return Case(
        sampler,
        proximal,
        near(proximal, 0.3),
        near(proximal, 0.25).requires_grad_(),
        torch.rand(len(LENGTHS), LONGEST, generator=made).requires_grad_(),
        torch.randn(len(LENGTHS), generator=made),
        [torch.randint(5, 200, (n,), generator=made).tolist() for n in LENGTHS],
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trl")
    build_policy(path, ["a few words"], vocab_size=300, hidden_size=64, layers=1, heads=1)
    return path


class _Replayed:
    """What of a TRL trainer is told to it."""

    case: Case
    accelerator: Any
    ref_model: Any

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        if torch.is_grad_enabled():
            return self.case.policy, self.case.entropy, None
        frozen = model is self.ref_model
        return self.case.reference if frozen else self.case.proximal, None, None


class _Grpo(_Replayed, GRPOTrainer):
    def _generate(self, prompts: list) -> tuple:
        logprobs = [row[:n].tolist() for row, n in zip(self.case.sampler, LENGTHS, strict=True)]
        return [[1]] * len(LENGTHS), self.case.ids, None, [""] * len(LENGTHS), logprobs, {}, None, None


class _Rloo(_Replayed, RLOOTrainer):
    def _generate(self, prompts: list) -> tuple:
        return [[1]] * len(LENGTHS), self.case.ids, [""] * len(LENGTHS)


@pytest.fixture
def trl(policy: Path, tmp_path: Path, case: Case) -> Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """`trl(**options)`: loss, its gradient by log-prob, and what TRL made of the samples."""

    def run(rloo: bool = False, sampler_differs: bool = False, **options: Any) -> tuple[Tensor, Tensor, dict]:
        config, trainer = (RLOOConfig, _Rloo) if rloo else (GRPOConfig, _Grpo)
        args = config(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=len(LENGTHS),
            num_generations=GROUP,
            max_completion_length=LONGEST,
            **options,
        )
        made: Any = trainer(
            model=str(policy),
            reward_funcs=lambda **kwargs: case.rewards.tolist(),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 16}),
        )
        made.case = case
        made.use_vllm = sampler_differs
        # Without vLLM, TRL takes the log-probs anew only where they can differ from the policy's.
        made.args.gradient_accumulation_steps = 1
        made.args.steps_per_generation, made.num_iterations = 2, 1
        inputs = made._generate_and_score_completions([{"prompt": "a"}] * len(LENGTHS))
        made.args.steps_per_generation = made.current_gradient_accumulation_steps = 1
        case.policy.grad = case.entropy.grad = None
        loss = made._compute_loss(made.model, inputs)
        loss.backward()
        gradient = case.policy.grad
        assert gradient is not None
        return loss.detach(), gradient * case.mask, inputs

    return run


def batch_of(case: Case, advantages: Tensor) -> Batch:
    """Ours of the same samples, a row each."""
    samples = [
        Sample(
            np.array([1]), np.array(ids), case.sampler[i, :n].numpy(), np.ones(n), float(advantages[i]),
            proximal=case.proximal[i, :n].numpy(), reference=case.reference[i, :n].numpy(),
        )
        for i, (n, ids) in enumerate(zip(LENGTHS, case.ids, strict=True))
    ]  # fmt: skip
    batch = collate(samples, Plan(tuple((i,) for i in range(len(samples))), LONGEST))
    return replace(
        batch, total_tokens=float(sum(LENGTHS)), total_sequences=float(len(LENGTHS)), max_tokens=float(LONGEST)
    )


def ours(case: Case, advantages: Tensor, **options: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, its gradient by log-prob, and metrics; without a correction the sampler is the proximal policy."""
    batch = batch_of(case, advantages)
    if not options.get("correction"):
        assert batch.proximal is not None
        batch = replace(batch, logprobs=batch.proximal)
    logprobs = case.policy.detach().clone().requires_grad_()
    loss, metrics = make_objective(**options)(logprobs, batch)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad, summary({k: float(v) for k, v in metrics.items()})


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": (
        {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.28},
        {"loss": "grpo", "loss_options": {"clip_low": 0.2, "clip_high": 0.28}, "aggregation": "sequence_mean"},
    ),
    "dapo": (
        {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.15},
        {"loss": "grpo", "loss_options": {"clip_low": 0.1, "clip_high": 0.15}, "aggregation": "token_mean"},
    ),
    "dr_grpo": ({"loss_type": "dr_grpo", "epsilon": 0.2}, {"loss": "grpo", "aggregation": "fixed_length"}),
    "dual clip": (
        {"loss_type": "dapo", "epsilon": 0.2, "delta": 1.3},
        {"loss": "grpo", "loss_options": {"dual_clip": 1.3}},
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
        {"loss": "gspo", "loss_options": {"clip_low": 0.05, "clip_high": 0.1}},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"loss": "cispo", "loss_options": {"clip_high": 0.2}},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_trls(case: Case, trl: Callable[..., Any], name: str) -> None:
    theirs, mine = LOSSES[name]
    loss, gradient, inputs = trl(scale_rewards="none", **theirs)
    value, slope, metrics = ours(case, inputs["advantages"], **mine)
    assert value.item() == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(slope, gradient, atol=1e-5)
    assert slope.norm() > 0.01
    assert 0 < metrics["clip_share"] < 1  # some tokens are clipped, or the test would see half of the formula


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_kl_in_the_loss_is_trls(case: Case, trl: Callable[..., Any], unbiased: bool) -> None:
    loss, gradient, inputs = trl(loss_type="dapo", beta=0.7, use_bias_correction_kl=unbiased, scale_rewards="none")
    value, slope, _ = ours(case, inputs["advantages"], kl="k3", kl_coef=0.7, kl_unbiased=unbiased)
    assert value.item() == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(slope, gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "correction"),
    [
        ("token_truncate", {"truncate_tokens": {"cap": 1.4}}),
        ("token_mask", {"mask_tokens": {"low": 0.7, "high": 1.4}}),
        ("sequence_mask", {"weigh_sequences": {"cap": 1.4}}),
    ],
)
def test_a_correction_is_trls(
    case: Case, trl: Callable[..., Any], mode: str, correction: dict[str, dict[str, float]]
) -> None:
    low = {"vllm_importance_sampling_clip_min": 0.7} if mode == "token_mask" else {}
    loss, gradient, inputs = trl(
        sampler_differs=True,
        loss_type="dapo",
        scale_rewards="none",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.4,
        **low,
    )
    value, slope, metrics = ours(case, inputs["advantages"], correction=correction)
    assert value.item() == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(slope, gradient, atol=1e-5)
    assert 0 < metrics[f"{next(iter(correction))}_share"] < 1


def test_the_entropy_bonus_is_trls(case: Case, trl: Callable[..., Any]) -> None:
    loss, _, inputs = trl(loss_type="dapo", entropy_coef=0.1, scale_rewards="none")
    plain, _, _ = ours(case, inputs["advantages"])
    bonus = 0.1 * (case.entropy * case.mask).sum() / case.mask.sum()
    assert (plain - bonus).item() == pytest.approx(loss.item(), abs=1e-5)


def outcomes(rewards: Tensor, penalties: list[np.ndarray] | None = None) -> list[list[Outcome]]:
    costs = penalties or [np.zeros(n) for n in LENGTHS]
    flat = [Outcome(float(r), p) for r, p in zip(rewards, costs, strict=True)]
    return [flat[:GROUP], flat[GROUP:]]


def flattened(advantages: list[list[np.ndarray]]) -> list[float]:
    return [float(a) for group in advantages for a in group]


def test_group_advantages_are_trls(case: Case, trl: Callable[..., Any]) -> None:
    scaled = by_group(lambda rewards: group_normalised(rewards, EPS))
    assert flattened(scaled(outcomes(case.rewards))) == pytest.approx(trl()[2]["advantages"].tolist(), abs=1e-5)
    centred = trl(scale_rewards="none")[2]["advantages"]
    assert flattened(ADVANTAGES["dr_grpo"](outcomes(case.rewards))) == pytest.approx(centred.tolist(), abs=1e-5)


def test_rloo_is_trls(case: Case, trl: Callable[..., Any]) -> None:
    loss, gradient, inputs = trl(rloo=True, beta=0.0, epsilon=0.2)
    advantages = flattened(ADVANTAGES["rloo"](outcomes(case.rewards)))
    assert advantages == pytest.approx(inputs["advantages"].tolist(), abs=1e-5)
    value, slope, metrics = ours(case, torch.tensor(advantages), loss="rloo")
    assert value.item() == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(slope, gradient, atol=1e-5)
    assert 0 < metrics["clip_share"] < 1


def test_the_kl_in_the_reward_is_trls(case: Case, trl: Callable[..., Any]) -> None:
    _, _, inputs = trl(rloo=True, beta=0.3)
    kl = [0.3 * k1(p[:n] - r[:n]).numpy() for p, r, n in zip(case.proximal, case.reference, LENGTHS, strict=True)]
    advantages = flattened(ADVANTAGES["rloo"](outcomes(case.rewards, kl)))
    assert advantages == pytest.approx(inputs["advantages"].tolist(), abs=1e-5)
