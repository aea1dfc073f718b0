"""Credit lands on the tokens of the tag, and nowhere else."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from learners.credit import Credit, by_token, of_group
from learners.sft import train_tokenizer

TAG = "<imgen>{'source': 'code'}</imgen>"
TEXTS = [f"Un café 🍎 {TAG} и дом.", f"{TAG}{TAG}", f"A flag.\n{TAG}\nAnd 5 🍐🍐 more: {TAG}", TAG]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: an emoji is several tokens."""
    return train_tokenizer(["Un flag. And more: <imgen>{'source': 'code'}</imgen>"] * 9, 280)


def spans(text: str) -> list[tuple[int, int]]:
    found, at = [], text.find(TAG)
    while at >= 0:
        found.append((at, at + len(TAG)))
        at = text.find(TAG, at + 1)
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_each_tag_have_its_credit_and_no_others(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    credits = [Credit(start, end, i + 1.0) for i, (start, end) in enumerate(spans(text))]
    found = by_token(credits, text, ids, lambda some: tokenizer.decode(some, skip_special_tokens=True))
    for i, credit in enumerate(credits):
        own = [token for token, of in zip(ids, found, strict=True) if of == i + 1.0]
        assert tokenizer.decode(own).strip() == TAG, credit
    assert found[-1] == 0 and set(found) <= {0.0, *(c.advantage for c in credits)}


def test_text_that_is_not_the_tokens_own_is_not_credited(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(f"See {TAG}", add_special_tokens=False)
    assert not by_token([Credit(0, len(TAG), 1.0)], TAG, ids, tokenizer.decode).any()
    assert by_token([], "", ids, tokenizer.decode).shape == (len(ids),)


def test_credits_of_a_group_add_up_to_nothing_over_its_calls() -> None:
    calls = {"a": [(0, 9, 1.0), (9, 20, 0.0)], "b": [(3, 5, 0.5)], "c": []}
    found = of_group(calls, 2.0)
    assert found == {"a": [Credit(0, 9, 1.0), Credit(9, 20, -1.0)], "b": [Credit(3, 5, 0.0)]}
    assert np.isclose(sum(c.advantage for of in found.values() for c in of), 0.0)
    assert of_group({"a": [], "b": []}, 1.0) == {}
    assert of_group({"a": [(0, 9, 1.0)]}, 1.0) == {"a": [Credit(0, 9, 0.0)]}  # no other call to compare with
