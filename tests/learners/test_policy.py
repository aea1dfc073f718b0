"""Log-probs and entropies of the charged tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from learners import policy as module
from learners.packing import Plan, Sample, collate
from learners.policy import Policy, load_model, score


def test_log_probs_and_entropies_are_those_of_the_model(model_dir: Path, samples: list[Sample]) -> None:
    s = samples[0]
    batch = collate([s], Plan(((0,),), len(s)))
    logprobs, entropy = score(Policy(load_model(model_dir, torch.float32)), batch)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = torch.distributions.Categorical(logits=model(batch.input_ids).logits)
    charged = batch.mask > 0
    torch.testing.assert_close(logprobs[charged], expected.log_prob(batch.targets)[charged])
    torch.testing.assert_close(entropy[charged], expected.entropy()[charged])
    assert (logprobs[~charged] == 0).all() and (entropy[~charged] == 0).all()
    assert logprobs.requires_grad and not entropy.requires_grad


def test_scoring_in_pieces_gives_the_same_log_probs_and_gradients(
    model_dir: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(samples, Plan(tuple((i,) for i in range(len(samples))), max(map(len, samples))))
    results = []
    for kept in (2**28, 96 * 7):
        monkeypatch.setattr(module, "KEPT_LOGITS", kept)
        policy = Policy(load_model(model_dir, torch.float32))
        logprobs, entropy = score(policy, batch)
        logprobs.sum().backward()
        results.append([logprobs, entropy, *(p.grad for p in policy.parameters())])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        load_model(tmp_path, torch.float32)
