"""Words of questions, documents and calls, compared by plain counting: what the rubric judges read with.

Words are matched by their letters: case, a plural and one trailing letter ("Kenya", "Kenyan") do not matter, meaning
is not known. Chinese, Japanese and Korean, which are written without spaces, are read character by character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence

from rewards.base import CallOutcome, Rendered

_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"\d+(?:\.\d+)?|[{_SPACELESS}]|[^\W\d_{_SPACELESS}]+")
_DIRECTED = re.compile(
    r"""\b(?:dear|note\ (?:to|for)|attention|hello|hi)\b[^.\n]{0,20}\b(?:judge|grader|evaluator|reviewer|rater)s?\b
    |\b(?:ignore|disregard|forget|override)\b[^.\n]{0,40}
        \b(?:instruction|rubric|criteri|rule|prompt|guideline|(?:the|all|everything)\ above\b)
    |\b(?:give|award|rate|score|assign|grade|deserves?|merits?)\b[^.\n]{0,40}
        (?:\b(?:highest|maximum|full|top|perfect|best)\b[^.\n]{0,12}\b(?:score|mark|grade|rating|point)s?|\b5\b|\b10/10)
    |\b(?:highest|maximum|perfect|full)\s+(?:possible\s+)?(?:score|mark|rating)s?\b
    |\b(?:wisest|fairest|kind|wise|fair)\b[^.\n]{0,20}\bjudges?\b
    |["']?\b(?:image_tags|image_quality|task_relevance|text_image_relevance)\b["']?\s*[:=]
    |</?(?:document|rubric|verdict|system|instructions?)>
    |^\s*system\s*:""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def plain(text: str) -> str:
    """As a reader sees it: letters in their usual form, and nothing that is not seen (zero-width, turned round)."""
    if text.isascii():
        return text
    kinds = ((c, unicodedata.category(c)) for c in unicodedata.normalize("NFC", text))
    return "".join(c if kind == "No" else unicodedata.normalize("NFKC", c) for c, kind in kinds if kind != "Cf")


def words(text: str) -> list[str]:
    """The words and numbers of a text in order, in lower case and singular, numbers in their shortest form."""
    return [_singular(w) for w in _WORD.findall(_THOUSANDS.sub("", plain(text).lower()))]


def content(text: str) -> frozenset[str]:
    """Its distinct words without those that only hold a sentence together."""
    return frozenset(words(text)) - _FUNCTION


def subject(text: str) -> frozenset[str]:
    """What a text is about: `content` without the words of asking ("show", "picture")."""
    return content(text) - _ASKING


def numbers(text: str) -> frozenset[str]:
    """The distinct numbers of a text, in their shortest form (`3` for `3.0`)."""
    return frozenset(w for w in words(text) if w[0].isdecimal())


def hits(found: Collection[str], wanted: Collection[str]) -> int:
    """How many of the `found` words are among the `wanted`, one trailing letter aside."""
    near = set(wanted) | {w[:-1] for w in wanted if len(w) > 3}
    return sum(w in near or (len(w) > 3 and w[:-1] in near) for w in found)


def relevance(found: Collection[str], wanted: Collection[str], enough: int = 4) -> float:
    """How far the `found` words belong to the `wanted`, 0..1; 1 where nothing is wanted.

    The larger of two shares: of the found words that are wanted (so that a short query may be exact), and of the
    wanted words that are found, `enough` of them being enough (so that a long prompt may be rich).
    """
    if not wanted:
        return 1.0
    if not found:
        return 0.0
    common = hits(found, wanted)
    return max(common / len(found), min(1.0, common / min(len(wanted), enough)))


def stale(text: str, question: str) -> tuple[float, float]:
    """Shares (0..1) of the text's runs of three words that repeat an earlier run, and that the question holds too."""
    runs = _runs(words(text))
    if not runs:
        return 0.0, 0.0
    asked = set(_runs(words(question)))
    return 1 - len(set(runs)) / len(runs), sum(run in asked for run in runs) / len(runs)


def directed(text: str, question: str = "") -> bool:
    """Whether a text speaks to a judge, of scores, or in the form of a verdict (English).

    Words of the question do not count: a user may well ask about judges.
    """
    asked = plain(question).lower()
    return any(found.group().lower() not in asked for found in _DIRECTED.finditer(plain(text)))


def gaps(doc: Rendered) -> list[str]:
    """The prose before each tag and after the last: one more text than `doc.calls`."""
    texts, at = [], 0
    for call in sorted(doc.calls, key=lambda c: c.start):
        texts.append(doc.text[at : max(at, call.start)])
        at = max(at, call.end)
    return [*texts, doc.text[at:]]


def param_text(call: CallOutcome) -> str:
    """The texts among a call's parameters (query, prompt or code)."""
    return " ".join(v for v in call.params.values() if isinstance(v, str))


def title_text(provenance: Mapping[str, object]) -> str:
    """Title and caption of a found picture; empty where it has neither."""
    return " ".join(str(provenance[key]) for key in ("title", "caption") if provenance.get(key))


def _runs(tokens: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(tokens, tokens[1:], tokens[2:], strict=False))


def _singular(word: str) -> str:
    if word[0].isdecimal():
        return f"{float(word):.12g}"
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


#: Words that carry no subject of their own.
_FUNCTION = frozenset(
    words(
        """a about above after all also am an and any are as at be been before below beside between both but by can
        could did do does down each for from had has have he her here him his how i if in into is it its just me more
        most my no nor not of on once one only or other our out over own she should so some such than that the their
        them then there these they this those to too twice under up us was we were what when where which while who
        whose why will with without would you your s t"""
    )
)
#: Words with which one asks for a document or names a kind of picture: they say nothing of its subject.
_ASKING = frozenset(
    words(
        """add answer article chart compare create describe diagram document draw explain figure friend generate
        give graph hello illustrate illustration image include introduce let like look make mention mine need new
        note page paint paragraph photo photograph picture place plot please present put real really say see send
        sent sentence short show tell text thank thanks true use want way word words write"""
    )
)
