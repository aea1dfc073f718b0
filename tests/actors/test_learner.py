"""A learner rank's step on a real store: whatever the groups hold, each ends once, with a reason."""
# ruff: noqa: F401, F811 (the fixture of another folder)

from __future__ import annotations

import math
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.learner import LearnerRank
from learners.sft import train_tokenizer
from replay.store import Claim, Retention, Store
from tests.learners.conftest import model_dir
from tests.replay.rows import Clock, pending, row

MAX_TOKENS = 8


class LocalStore:
    """A store in this process, with the verbs that a rank uses, as `actors.store.StoreClient` has them."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def now(self, result: Any, timeout_s: float = 120.0) -> Any:
        return result

    def claim(self, stage: str, wait_s: float, **options: Any) -> Claim | None:
        claim = self.store.claim(stage, **options)
        if claim is None:
            raise TimeoutError("the learner waits for groups that the test does not have")
        return claim

    def __getattr__(self, verb: str) -> Any:
        return getattr(self.store, verb)


class Rank(LearnerRank.__ray_metadata__.modified_class):  # type: ignore[name-defined]
    """A rank that nobody pulls weights from."""

    def _publish(self) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store", Clock())
    yield made
    made.close()


@pytest.fixture
def rank(store: Store, model_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(options: dict[str, Any] | None = None, model: Path = model_dir, **recipe: Any) -> Any:
        plain = {
            **{"steps": 100, "prompts_per_step": 2, "updates_per_step": 1, "passes": 1, "max_staleness": 1},
            **{"checkpoint_every": 100, "keep": 1, "advantage": "grpo", "correction": {"truncate_tokens": {}}},
            **{"kl": {"coef": 0.0, "estimator": "k3", "into": "loss"}, "dynamic_sampling": False},
            **{"overlong": {"buffer": 0, "penalty": 1.0, "masked": False}, "shuffled": False, "seed": 0},
            **{"max_tokens": MAX_TOKENS, "weights": "host", "adapter": False, "turns": False, "credit_calls": 0.0},
        }
        made.append(
            Rank(
                0,
                1,
                LocalStore(store),
                None,
                model=str(model),
                options={"lr": 1e-3, "correction": {"truncate_tokens": {}}, "max_tokens": MAX_TOKENS} | (options or {}),
                recipe=plain | recipe,
                checkpoints=f"{tmp_path}/checkpoints",
                policy=f"{tmp_path}/policy",
                incarnation=0,
            )
        )
        made[-1].setup(("127.0.0.1", 0), None)
        return made[-1]

    yield make
    for one in made:
        one._learner.close()


def put(store: Store, group: str, *samples: dict[str, Any]) -> None:
    """A group of scored samples; `tokens` of each are 3 unless it says otherwise."""
    store.put("pending", pending(group, len(samples)))
    for i, sample in enumerate(samples):
        name, n = f"{group}/{i}", sample.get("tokens", 3)
        tokens = {"prompt_ids": [1, 2], "token_ids": list(range(4, 4 + n)), "versions": [0] * n, "mask": [1] * n}
        tokens |= {"logprobs": sample.get("logprobs", [-4.0] * n), "finish": sample.get("finish", "stop")}
        tokens |= sample.get("generated", {})
        store.put("generated", row("generated", name, **tokens))
        store.put("rendered", row("rendered", name, calls=sample.get("calls", [])))
        parts = sample.get("components", [])
        store.put("scored", row("scored", name, reward=sample.get("reward", 0.1 * i), components=parts))


def ends(store: Store) -> dict[str, tuple[str, str]]:
    return store.ends("train")


def test_a_step_trains_its_groups_and_says_how_far_the_sampler_was(store: Store, rank: Callable[..., Any]) -> None:
    put(store, "a", {}, {}, {})
    put(store, "b", {}, {})
    learner = rank(updates_per_step=2, passes=2)
    learner._one_step()
    (step,) = learner.history(0)
    assert {status for status, _ in ends(store).values()} == {"trained"}
    assert all(map(math.isfinite, step.values()))
    assert step.keys() >= {"kl_mismatch", "ess", "clip_share", "truncate_tokens_share", "score_s", "equal_rewards"}
    assert step["ratio_mean"] != 1.0 and 0 < step["ess"] <= 1


def test_the_other_ranks_hear_of_all_that_rank_0_does_alone(
    store: Store, rank: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these may take longer than the others wait for a silent rank."""
    alone, seen = [], set()

    def led(work: Callable[[], Any], rank: int, ranks: int) -> Any:
        alone.append(work)
        result = work()
        alone.pop()
        return result

    def watched(name: str) -> None:
        assert alone, name
        seen.add(name)

    class Watched(LocalStore):
        def __getattribute__(self, verb: str) -> Any:
            if verb in ("claim", "ack", "state", "version", "collect"):
                watched(verb)
            return super().__getattribute__(verb)

        def state(self, purpose: str) -> dict[str, dict[str, int]]:
            return {"groups": self.store.groups(purpose)}

    put(store, "a", {}, {})
    put(store, "b", {}, {})
    monkeypatch.setattr("actors.learner.led", led)
    learner = rank(checkpoint_every=1, retention=Retention())
    learner._store = Watched(store)
    monkeypatch.setattr(learner._learner, "export", lambda *args: None)
    monkeypatch.setattr("actors.learner.copy", lambda *args: watched("copy"))
    monkeypatch.setattr(learner._checkpoints, "commit", lambda *args: watched("commit"))
    learner._one_step()
    assert seen == {"claim", "ack", "state", "version", "collect", "commit", "copy"}


def test_the_weights_of_a_resumed_run_stay_where_they_are_while_others_are_sent_directly(
    rank: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class First:
        def __init__(self, *args: Any) -> None:
            made.append(weakref.ref(self))

    monkeypatch.setattr("actors.learner.Publisher", First)
    direct = SimpleNamespace(DirectSender=lambda *args: args)  # the real one imports vLLM
    monkeypatch.setitem(sys.modules, "actors.weight_senders", direct)
    learner = rank(weights="nccl")
    assert learner._sender == ("nccl", None, 0, 1)
    assert made[0]() is not None, "engines of other nodes have nowhere to pull from"


def test_a_group_with_equal_rewards_is_trained_on_and_counted(store: Store, rank: Callable[..., Any]) -> None:
    put(store, "a", {"reward": 0.5}, {"reward": 0.5})
    put(store, "b", {"reward": 0.25}, {"reward": 0.25})
    learner = rank()
    learner._one_step()
    (step,) = learner.history(0)
    assert step["equal_rewards"] == 1.0 and step["grad_norm"] == 0.0 and step["skipped"] == 0.0
    assert all(map(math.isfinite, step.values()))


def test_dynamic_sampling_replaces_groups_with_equal_rewards(store: Store, rank: Callable[..., Any]) -> None:
    put(store, "a", {"reward": 0.5}, {"reward": 0.5})
    for group in "bc":
        put(store, group, {}, {})
    learner = rank(dynamic_sampling=True)
    learner._one_step()
    (step,) = learner.history(0)
    assert ends(store)["a/0"] == ("dropped_filtered", "all rewards of the group are equal")
    assert {ends(store)[t][0] for t in ("b/0", "b/1", "c/0", "c/1")} == {"trained"}
    assert step["groups_dropped"] == 1 and step["equal_rewards"] == 0
    assert store.groups("train")["ended"] - store.groups("train")["trained"] == 1  # its place is given back


def test_an_empty_response_and_one_that_is_not_finite_are_dropped_with_their_reasons(
    store: Store, rank: Callable[..., Any]
) -> None:
    put(store, "a", {"tokens": 0}, {}, {})
    put(store, "b", {"logprobs": [-1.0, math.nan, -1.0]}, {}, {})
    put(store, "c", {"tokens": 0}, {})
    put(store, "d", {}, {})
    learner = rank(prompts_per_step=3)
    learner._one_step()
    found = ends(store)
    assert found["a/0"] == ("dropped_data", "the response is empty")
    assert found["b/0"] == ("dropped_data", "the sampler gave log-probs that are not finite")
    assert found["c/0"] == ("dropped_data", "the response is empty")
    assert found["c/1"] == ("dropped_filtered", "fewer than two valid samples")
    assert {found[t][0] for t in ("a/1", "a/2", "b/1", "b/2", "d/0", "d/1")} == {"trained"}
    (step,) = learner.history(0)
    assert step["samples_dropped"] == 3 and step["groups_dropped"] == 1
    assert all(map(math.isfinite, step.values()))


def test_an_answer_that_was_cut_off_costs_what_the_recipe_says(store: Store, rank: Callable[..., Any]) -> None:
    cut = {"tokens": MAX_TOKENS, "finish": "length"}
    put(store, "a", cut, {"tokens": 5}, {})
    put(store, "b", {}, {})
    plain = rank()
    plan, _ = plain._deal(plain._valid(plain._store.claim("scored", 0, limit=2, by_group=True, lease_s=9,
        columns=["reward", "finish", "logprobs", "mask", "versions", "components"])), 0)  # fmt: skip
    assert [reward for _, reward, _ in plan.groups[0]] == pytest.approx([0.0, 0.1, 0.2])
    assert not plan.without_weight


def test_overlong_answers_are_fined_over_the_buffer_and_may_be_left_out_of_the_loss(
    store: Store, rank: Callable[..., Any]
) -> None:
    cut = {"tokens": MAX_TOKENS, "finish": "length", "reward": 1.0}
    put(store, "a", cut, {"tokens": 6, "reward": 1.0}, {"reward": 1.0})
    put(store, "b", cut, cut)
    put(store, "c", {}, {})
    learner = rank(overlong={"buffer": 4, "penalty": 0.5, "masked": True}, advantage="dr_grpo")
    learner._one_step()
    (step,) = learner.history(0)
    assert ends(store)["b/0"] == ("dropped_filtered", "all answers of the group were cut off")
    assert step["overlong"] == pytest.approx(-0.5 * (1.0 + 0.5) / 5)
    assert step["cut_off"] == pytest.approx(1 / 5)
    assert step["tokens_trained"] == 6 + 3 + 3 + 3
    assert step["reward"] == pytest.approx((3.0 + 0.0 + 0.1) / 5)


@pytest.mark.parametrize("into", ["loss", "reward"])
def test_a_kl_to_the_reference_is_charged_where_the_recipe_says(
    store: Store, rank: Callable[..., Any], into: str
) -> None:
    for group in "abcd":
        put(store, group, {}, {})
    in_loss = {"kl": "k3", "kl_coef": 0.1} if into == "loss" else {}
    learner = rank({"lr": 1e-2} | in_loss, kl={"coef": 0.1, "estimator": "k3", "into": into})
    learner._one_step()
    learner._one_step()
    first, second = learner.history(0)
    assert first["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl_reference"] > 1e-5


def test_the_tokens_of_a_tag_are_credited_with_what_its_call_was_worth(
    store: Store, rank: Callable[..., Any], model_dir: Path, tmp_path: Path
) -> None:
    text = "See <imgen>{}</imgen> there."
    tokenizer = train_tokenizer([text] * 9, 300)
    shutil.copytree(model_dir, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ids = tokenizer.encode(text, add_special_tokens=False)
    n, call = len(ids), {"start": 4, "end": 21, "source": "code", "params": "{}", "status": "ok"}
    tokens = {"token_ids": ids, "text": text, "versions": [0] * n, "mask": [1] * n, "logprobs": [-4.0] * n}
    answers = [{"generated": tokens, "calls": [call], "components": [("call/0", s)]} for s in (1.0, 0.5)]
    put(store, "a", *answers, {})
    learner = rank(prompts_per_step=1, credit_calls=0.5, model=tmp_path / "model")
    plan, _, stats = learner._plan()
    credit = learner._credit(plan, learner._read(plan))
    assert credit.keys() == {"a/0", "a/1"}  # the third has no call
    tag = credit["a/0"] != 0
    assert tokenizer.decode([i for i, of in zip(ids, tag, strict=True) if of]).strip() == "<imgen>{}</imgen>"
    np.testing.assert_allclose(credit["a/0"][tag], 0.5 * 0.25)
    np.testing.assert_allclose(credit["a/1"], -credit["a/0"])
    assert "reward/call/0" not in stats
