"""A small craft that needs neither tools nor pictures: which words to say. The work of `llmi bench trl`.

The policy says one word after the other, of two lists in equal shares, and never ends by itself: so all answers are as
long as they may be. It earns the more, the more of its words are of the first list.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from replay.record import Prompt
from rewards.base import Rendered, Verdict
from rewards.hybrid import TEXT_CRITERIA, score
from rewards.rules import NONE_ALLOWED

GOOD = ("sun", "bread", "garden", "friend", "river", "music", "summer", "bird")
OTHER = ("rain", "stone", "cellar", "stranger", "road", "noise", "winter", "fish")
TOPICS = ("a walk", "the house", "my day", "a journey", "the village", "an evening", "the market", "a letter")
PHRASES = ("Tell me about {}.", "Say something about {}.", "What comes to mind with {}?", "Words on {}, please.")
WORDS = 160  # of a document: more than any answer has tokens
_SYLLABLES = tuple(map("".join, itertools.product("bdfgklmn", "aeiou")))


class Critic:
    """The judge: from 1 point for no good word to 5 for good words alone."""

    name, sees_images = "critic", False

    def judge(self, doc: Rendered) -> Verdict:
        words = doc.text.split()
        share = sum(word in GOOD for word in words) / max(1, len(words))
        return Verdict(dict.fromkeys(TEXT_CRITERIA, 1.0 + 4.0 * share))


def reward(question: str, text: str) -> float:
    """What a run pays for this answer: 0.4 + 0.6 times the share of good words."""
    doc = Rendered(question, text, [], NONE_ALLOWED, ())
    return score(doc, Critic().judge(doc), None).reward


def prompts() -> list[Prompt]:
    """Every phrase with every topic."""
    questions = [phrase.format(topic) for phrase in PHRASES for topic in TOPICS]
    return [Prompt(f"words-{k}", question, image_num=NONE_ALLOWED) for k, question in enumerate(questions)]


def documents(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and answers, each word drawn from both lists alike."""
    rng, asked = random.Random(seed), [prompt.question for prompt in prompts()]
    for _ in range(n):
        yield rng.choice(asked), "".join(f" {word}" for word in rng.choices(GOOD + OTHER, k=WORDS))


def vocabulary() -> Iterator[str]:
    """64,000 words that nobody says, for a tokenizer as large as those of real models."""
    return (" " + "".join(syllables) for syllables in itertools.product(_SYLLABLES, repeat=3))
