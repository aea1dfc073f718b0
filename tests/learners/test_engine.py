"""The learner on one rank: its gradient, its steps, its checkpoints and its export."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from learners.checkpoint import differences
from learners.engine import MAX_SKIPPED, Learner, NotFinite, merged
from learners.losses import LOSSES
from learners.packing import Sample, pack
from tests.learners.rank import gradients_of_step

Make = Callable[..., Learner]


def reference_gradient(model_dir: Path, samples: list[Sample]) -> dict[str, Tensor]:
    """Of the GRPO loss without clipping, one sequence at a time, with nothing of ours but the samples."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    total = sum(float(s.mask.sum()) * s.weight for s in samples)
    for s in samples:
        ids = torch.tensor([[*s.prompt_ids, *s.token_ids]])
        said = len(s.token_ids)
        chosen = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[-said:, 0]
        ratio = (chosen - torch.from_numpy(s.logprobs)).exp()
        (-(ratio * s.advantage * s.weight * torch.from_numpy(s.mask)).sum() / total).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def weights(learner: Learner) -> dict[str, Tensor]:
    return dict(learner.weights())


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative distance between tensors of the same name."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


@pytest.mark.parametrize("tokens_per_microbatch", [10_000, 64, 5])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_gradient_is_that_of_one_big_batch_whatever_the_micro_batches(
    learner: Make, model_dir: Path, samples: list[Sample], zero_stage: int, tokens_per_microbatch: int
) -> None:
    wide = {"clip_low": 1.0, "clip_high": 1e9, "dual_clip": 1e9}
    engine = learner(
        zero_stage=zero_stage, tokens_per_microbatch=tokens_per_microbatch, loss_options=wide, grad_clip=0.0
    )
    gradient, metrics = gradients_of_step(engine, samples)
    expected = reference_gradient(model_dir, samples)
    assert distance(gradient, expected) < 1e-5
    assert metrics["grad_norm"] == pytest.approx(math.hypot(*(float(g.norm()) for g in expected.values())), rel=1e-4)
    assert metrics["microbatches"] == len(pack([len(s) for s in samples], tokens_per_microbatch))


@pytest.mark.parametrize("loss", LOSSES)
def test_steps_make_good_samples_likelier_and_bad_ones_less_so(learner: Make, samples: list[Sample], loss: str) -> None:
    options = {o: 10.0 for o in ("clip_low", "clip_high") if o in signature(LOSSES[loss].function).parameters}
    engine = learner(loss=loss, loss_options=options, lr=1e-2)

    def liking() -> float:
        gains = [1.0 if loss == "sft" else s.advantage for s in samples]
        return sum(g * s.weight * p.mean() for g, s, p in zip(gains, samples, engine.logprobs(samples), strict=True))

    before = liking()
    for _ in range(4):
        engine.step(samples)
    assert liking() > before


def test_the_step_reports_what_it_did(learner: Make, samples: list[Sample]) -> None:
    engine = learner(lr=1.0, warmup_steps=4)
    metrics = engine.step(samples)
    assert metrics["tokens"] == sum(map(len, samples))
    assert metrics["tokens_trained"] == sum(s.charged for s in samples)
    assert metrics["sequences"] == len(samples)
    assert metrics["lr"] == 0.25
    assert 0 < metrics["entropy"] <= math.log(96)
    assert 0 <= metrics["padding"] < 0.5
    assert metrics["forward_backward_s"] > 0 and metrics["optimizer_s"] > 0
    assert metrics.keys() >= {"ratio_mean", "ratio_max", "kl_behaviour", "clip_share"}
    assert engine.step(samples, lr=0.125)["lr"] == 0.125


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "loss and gradient not a number": lambda share: share * torch.nan,
    "loss infinite, gradient finite": lambda share: share + torch.inf,
    "loss finite, gradient infinite": lambda share: (share - share.detach()) * 1e30 * 1e30,
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize(
    ("zero_stage", "dtype", "deepspeed"),
    [
        (1, "float32", {}),
        (2, "bfloat16", {}),
        (3, "float32", {}),
        (3, "bfloat16", {}),
        (2, "float32", {"offload_optimizer": {"device": "cpu"}}),
        (3, "float32", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_reported(
    learner: Make, samples: list[Sample], zero_stage: int, dtype: str, deepspeed: dict[str, Any], broken: str
) -> None:
    engine = learner(dtype=dtype, zero_stage=zero_stage, deepspeed={"zero_optimization": deepspeed})
    loss = engine._loss
    engine._loss = lambda logprobs, batch: (BROKEN[broken](loss(logprobs, batch)[0]), {})  # type: ignore[assignment]
    before = weights(engine)
    assert engine.step(samples)["skipped"] == 1.0
    assert distance(weights(engine), before) == 0.0
    engine._loss = loss
    assert engine.step(samples)["skipped"] == 0.0
    assert 0 < distance(weights(engine), before) < 1


def test_a_node_that_cannot_read_its_disk_as_deepspeed_does_is_told_what_to_install(
    learner: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(RuntimeError, match=r"needs g\+\+ and libaio-dev \(by the Debian name\) on every node"):
        learner(zero_stage=3, deepspeed={"zero_optimization": {"offload_optimizer": disk}})


def test_the_learner_gives_up_after_so_many_skipped_steps_in_a_row(learner: Make, samples: list[Sample]) -> None:
    engine = learner()
    loss = engine._loss
    for steps in (MAX_SKIPPED - 1, MAX_SKIPPED):
        engine._loss = lambda logprobs, batch: (logprobs.sum() * torch.nan, {})  # type: ignore[assignment]
        for _ in range(steps - 1):
            assert engine.step(samples)["skipped"] == 1.0
        if steps < MAX_SKIPPED:
            engine._loss = loss
            assert engine.step(samples)["skipped"] == 0.0
    with pytest.raises(NotFinite, match=f"not finite in {MAX_SKIPPED} optimiser steps in a row .loss nan, gradient"):
        engine.step(samples)


def test_a_resumed_learner_goes_on_exactly_as_the_first_would_have(
    learner: Make, samples: list[Sample], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"warmup_steps": 3, "schedule": "cosine", "total_steps": 6}
    first = learner(**options)
    first.step(samples)
    first.save(tmp_path, "step-1", {"cursor": 7})
    rates = [first.step(samples)["lr"] for _ in range(2)]
    expected = weights(first)
    second = learner(**options)
    assert second.load(tmp_path, "step-1") == {"cursor": 7}
    assert [second.step(samples)["lr"] for _ in range(2)] == rates
    assert distance(weights(second), expected) == 0.0
    assert not (tmp_path / "latest").exists()


def test_a_missing_checkpoint_is_named_and_so_is_one_that_not_all_ranks_finished(learner: Make, tmp_path: Path) -> None:
    engine = learner()
    with pytest.raises(FileNotFoundError, match="no checkpoint 'step-9'"):
        engine.load(tmp_path, "step-9")
    engine.save(tmp_path, "step-1")
    (tmp_path / "step-1" / "state.json").unlink()  # it is written last
    with pytest.raises(FileNotFoundError, match="step-1' is incomplete: not all ranks had finished"):
        engine.load(tmp_path, "step-1")


def test_a_checkpoint_whose_shapes_names_or_stage_do_not_fit_is_refused_and_changes_nothing(
    learner: Make, samples: list[Sample], tmp_path: Path
) -> None:
    engine = learner()
    engine.step(samples)
    engine.save(tmp_path, "step-1")
    layers = LlamaConfig(vocab_size=96, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    LlamaForCausalLM(layers).save_pretrained(tmp_path / "other")
    other = learner(model_dir=tmp_path / "other")
    before = weights(other)
    with pytest.raises(ValueError, match=r"of another model.*lm_head.weight is missing.* and \d+ more"):
        other.load(tmp_path, "step-1")
    assert distance(weights(other), before) == 0.0
    with pytest.raises(ValueError, match="written with zero_stage 2; resume with it, not 3"):
        learner(zero_stage=3).load(tmp_path, "step-1")


def test_what_a_checkpoint_lacks_or_has_otherwise_is_said_by_name_and_shape() -> None:
    given = {"a": [2, 3], "b": [4], "c": [1]}
    assert differences(given, given) == ""
    assert differences(given, {"a": [3, 2], "b": [4], "d": [1]}) == (
        "d is missing, c is unknown, a has shape [2, 3] instead of [3, 2]"
    )


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_weights_are_copies_under_checkpoint_names(
    learner: Make, model_dir: Path, samples: list[Sample], zero_stage: int
) -> None:
    engine = learner(zero_stage=zero_stage)
    before = weights(engine)
    stored = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).state_dict()
    assert before.keys() == stored.keys() - {"lm_head.weight"}  # tied
    assert all(torch.equal(before[name], stored[name]) for name in before)
    engine.step(samples)
    assert all(torch.equal(before[name], stored[name]) for name in before)


def test_weights_can_be_half_and_matrix_products_alone_can_be(learner: Make, samples: list[Sample]) -> None:
    full = learner().step(samples)["loss"]
    half = learner(dtype="bfloat16")
    assert half.step(samples)["loss"] == pytest.approx(full, rel=0.05)
    assert {t.dtype for t in weights(half).values()} == {torch.bfloat16}
    mixed = learner(deepspeed={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
    assert mixed.step(samples)["loss"] == pytest.approx(full, rel=0.05)
    assert {t.dtype for t in weights(mixed).values()} == {torch.float32}


def test_recomputed_activations_give_the_same_step(learner: Make, samples: list[Sample]) -> None:
    kept, _ = gradients_of_step(learner(), samples)
    again, _ = gradients_of_step(learner(gradient_checkpointing=True), samples)
    assert distance(again, kept) < 1e-5


def exact_logprobs(model_dir: Path, sample: Sample, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """[R] log-probs and entropies of a sample's tokens by Transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
    said = len(sample.token_ids)
    every = torch.log_softmax(model(ids).logits[0, :-1] / temperature, -1)[-said:]
    return every.gather(-1, ids[0, -said:, None])[:, 0], -(every.exp() * every).sum(-1)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_log_probs_are_the_policys_and_the_references(
    learner: Make, model_dir: Path, samples: list[Sample], zero_stage: int
) -> None:
    engine = learner(zero_stage=zero_stage, reference=model_dir, lr=1e-2)
    expected = [exact_logprobs(model_dir, s)[0].detach().numpy() * s.mask for s in samples]
    for reference in (False, True):
        for found, exact in zip(engine.logprobs(samples, reference=reference), expected, strict=True):
            np.testing.assert_allclose(found, exact, atol=1e-5)
    engine.step(samples)
    moved, still = (engine.logprobs(samples, reference=r) for r in (False, True))
    assert max(np.abs(a - b).max() for a, b in zip(moved, expected, strict=True)) > 0.01
    assert max(np.abs(a - b).max() for a, b in zip(still, expected, strict=True)) < 1e-5
    assert engine.logprobs([]) == []


def test_a_reference_that_was_not_given_is_missed(learner: Make, samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="no reference model"):
        learner().logprobs(samples, reference=True)


def test_taking_log_probs_between_updates_changes_no_update(learner: Make, samples: list[Sample]) -> None:
    results = []
    for looks in (False, True):
        engine = learner(zero_stage=3)
        for _ in range(3):
            engine.step(samples)
            if looks:
                engine.logprobs(samples)
        results.append(weights(engine))
    assert distance(*results) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_bonus_adds_the_gradient_of_the_mean_entropy(
    learner: Make, model_dir: Path, samples: list[Sample], temperature: float
) -> None:
    plain, without = gradients_of_step(learner(temperature=temperature, grad_clip=0.0), samples)
    bonus, with_bonus = gradients_of_step(learner(temperature=temperature, grad_clip=0.0, entropy_bonus=0.5), samples)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    total = sum(s.charged * s.weight for s in samples)
    mean = torch.zeros(())
    for s in samples:
        ids = torch.tensor([[*s.prompt_ids, *s.token_ids]])
        every = torch.log_softmax(model(ids).logits[0, :-1] / temperature, -1)[-len(s.token_ids) :]
        mean = mean - ((every.exp() * every).sum(-1) * torch.from_numpy(s.mask)).sum() * s.weight / total
    mean.backward()
    assert with_bonus["entropy"] == without["entropy"] == pytest.approx(mean.item(), rel=1e-5)
    assert with_bonus["loss"] == pytest.approx(without["loss"] - 0.5 * mean.item(), rel=1e-5)
    exact = {n: -0.5 * p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance({n: bonus[n] - plain[n] for n in bonus}, exact) < 1e-4


def test_the_policy_that_learns_is_the_one_at_the_sampling_temperature(
    learner: Make, model_dir: Path, samples: list[Sample]
) -> None:
    engine = learner(temperature=0.7)
    for found, s in zip(engine.logprobs(samples), samples, strict=True):
        exact, _ = exact_logprobs(model_dir, s, 0.7)
        np.testing.assert_allclose(found, exact.detach().numpy() * s.mask, atol=1e-5)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_step_of_equal_rewards_changes_nothing_and_is_finite(
    learner: Make, samples: list[Sample], zero_stage: int
) -> None:
    engine = learner(zero_stage=zero_stage, correction={"truncate_tokens": {}})
    before = weights(engine)
    metrics = engine.step([replace(s, advantage=0.0) for s in samples])
    assert all(map(math.isfinite, metrics.values())) and metrics["grad_norm"] == 0.0
    assert distance(weights(engine), before) == 0.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is not one of"),
        ({"zero_stage": 0}, "zero_stage 0 is not one of"),
        ({"tokens_per_microbatch": 0}, "tokens_per_microbatch"),
        ({"loss": "ppo"}, "no loss 'ppo'"),
        ({"aggregation": "fixed_length"}, "needs max_tokens"),
        ({"schedule": "cosine"}, "needs total_steps"),
        ({"rank": 1}, "outside a world of 1"),
        ({"world_size": 2}, "master_port"),
    ],
)
def test_an_option_out_of_range_is_refused(learner: Make, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        learner(**options)


def test_a_missing_model_is_named_and_leaves_the_process_usable(learner: Make, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model in"):
        learner(model_dir=tmp_path)
    assert learner().steps == 0


def test_a_second_learner_in_the_process_is_refused(learner: Make, model_dir: Path) -> None:
    learner()
    with pytest.raises(RuntimeError, match="already holds a learner"):
        Learner(model_dir, lr=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": [96], "logprobs": [0.0], "mask": [1]}, "token id 96, but the model knows 96"),
        ({"mask": [0, 0]}, "nothing to learn from"),
        ({"weight": 0.0}, "nothing to learn from"),
    ],
)
def test_samples_that_teach_nothing_or_do_not_fit_the_model_are_refused(
    learner: Make, change: dict[str, Any], reason: str
) -> None:
    good: dict[str, Any] = {"prompt_ids": [1], "token_ids": [2, 3], "logprobs": [0.0, 0.0], "mask": [1, 1]}
    engine = learner()
    for samples in ([Sample(**(good | change))], [])[: 1 if "token" in reason else 2]:
        with pytest.raises(ValueError, match=reason):
            engine.step(samples)
    assert engine.step([Sample(**good)])["skipped"] == 0.0


def test_deepspeed_options_are_merged_key_by_key() -> None:
    base = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "bf16": {"enabled": True}}
    over = {"zero_optimization": {"overlap_comm": True}, "bf16": False}
    assert merged(base, over) == {"zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": False}
