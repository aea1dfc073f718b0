from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from cluster.config import load
from cluster.trl_rival import _options, _rewards
from cluster.word_craft import GOOD, OTHER, WORDS, documents, prompts, reward, vocabulary
from corpus.prompts import load as loaded
from corpus.prompts import save
from learners.sft import train_tokenizer


def test_the_reward_rises_with_the_share_of_good_words_and_with_nothing_else() -> None:
    assert reward("?", " sun rain sun rain") == pytest.approx(0.7) == pytest.approx(reward("?", "bird fish"))
    assert reward("?", " ".join(GOOD)) == pytest.approx(1.0)
    assert reward("?", " ".join(OTHER)) == pytest.approx(0.4) == pytest.approx(reward("?", ""))


def test_documents_say_both_kinds_of_words_alike_one_token_each() -> None:
    texts = [text for _, text in documents(40, seed=0)]
    assert sum(reward("?", text) for text in texts) / len(texts) == pytest.approx(0.7, abs=0.02)
    tokenizer = train_tokenizer([*islice(vocabulary(), 500), *texts], 1024)
    assert {len(tokenizer.encode(text)) for text in texts} == {WORDS}


def test_prompts_come_back_from_their_file(tmp_path: Path) -> None:
    save(prompts(), tmp_path / "train.parquet")
    found, problems = loaded(str(tmp_path / "train.parquet"), "train")
    assert not problems and {p.question for p in found} == {p.question for p in prompts()}


def test_trl_is_paid_what_a_run_pays() -> None:
    asked, said = [[{"role": "user", "content": "?"}]] * 2, ["sun rain", "bread bread"]
    answers = [[{"role": "assistant", "content": text}] for text in said]
    assert _rewards(prompts=asked, completions=answers, trainer_state=None) == [reward("?", text) for text in said]


def test_trl_is_given_the_recipe_of_the_config() -> None:
    from benchmarks import trl

    options = _options(load(Path("examples/tiny.yaml"), [*trl.OVERRIDES, "learner.lr=1.0e-3"]))
    assert options["per_device_train_batch_size"] == 64 and options["num_generations"] == 8
    assert options["max_completion_length"] == 128 and not options["bf16"]
    assert (options["learning_rate"], options["epsilon"], options["epsilon_high"]) == (1e-3, 0.2, 0.2)
