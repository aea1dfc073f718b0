"""Rubric judges: the criteria of the published judges checked by code, for runs without a judge model.

They count words, numbers and pixels; they know no meaning. So they are cheap, deterministic and smooth enough to train
on, and can be fooled by text that says the right words in a poor way. Whether a tool fits the request is not judged
here: that is what `rewards.rules.coverage` and `right_calls` measure, and words of a question are a poor witness of it.
Announcements ("Here is an image:") are known in English only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rewards.base import CallOutcome, JudgeFailed, Rendered, Verdict
from rewards.judges.looks import Look, look
from rewards.judges.words import (
    content,
    directed,
    gaps,
    numbers,
    param_text,
    plain,
    relevance,
    stale,
    subject,
    title_text,
    words,
)
from rewards.rules import NONE_ALLOWED

_IMAGE = r"(?:image|picture|photo|photograph|illustration|drawing|chart|graph|plot|diagram|figure|map)s?\b"
_FEW_WORDS = r"(?:\w+\W+){0,2}"
_ANNOUNCED = re.compile(
    rf"\b(?:here|below|following)(?:['’]s| is| are)\W+{_FEW_WORDS}{_IMAGE}"
    rf"|\b(?:see|look at|view)\W+{_FEW_WORDS}{_IMAGE}\W*(?:below|above|here\b|:)",
    re.IGNORECASE,
)
_POINTS = re.compile(rf"\b(?:{_IMAGE}|(?:below|following|here)\b)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?。！？\n]+")
_DRAWS = re.compile(r"\b(?:plt|sns|ax\w*)(?:\[[^\]]{0,20}\])?\.\w+\(|\.plot\b")
_LABELS = re.compile(r"title|label|legend|annotate|\btext\(")

#: Words of prose and of a tag's surroundings that are enough.
_ENOUGH_WORDS, _ENOUGH_AROUND = 8, 3
#: Words that name a subject, a setting and one visual detail; a query or an edit may be one word.
_SPECIFIC = {"diffusion": 3, "search": 1, "edit": 1}
_MOST_IMAGES = 10
#: What a picture is worth that the document has shown before.
_SHOWN_BEFORE = 0.25
#: What the quality of a chart is worth that is cut off.
_CLIPPED = 0.5
_CRITERIA = ("image_quality", "task_relevance", "text_image_relevance")


class RubricTextJudge:
    """Reads question and raw answer; gives `text` and `image_tags`, 1..5.

    `text` is 1 if there is no prose, if an image is announced, if a tag sits in a code fence, or if any of the answer
    speaks to the judge or asks for a score. Else it is the
    weakest of: enough words; no repeated and no copied phrases; words of the question taken up; not cut off (2).

    `image_tags` is the mean over the tags of the weakest of: relevance (its words belong to the question's), quality
    (subject, setting, one detail; for code the question's numbers, a drawing and labels), integration (prose beside
    it, no tag directly before or after, not made before). A malformed tag, and a tag where no image is allowed, is 1.
    Without a tag it is 5 where no image is allowed, 3 (nothing to praise or to blame) elsewhere, 1 without prose.
    """

    name = "rubric_text"
    sees_images = False

    def judge(self, doc: Rendered) -> Verdict:
        """Score one document; never fails."""
        parts = gaps(doc)
        text, why_text = _text(doc, parts)
        tags, why_tags = _tags(doc, parts)
        return Verdict({"text": text, "image_tags": tags}, {"text": why_text, "image_tags": why_tags})


class RubricImageJudge:
    """Opens the made pictures; gives `image_quality`, `task_relevance` and `text_image_relevance`, 1..5.

    Each is a mean over the pictures. Quality: it opens, is not tiny, its middle is not of one colour, and the rim of a
    chart is (else something is cut off, and it counts half). Task
    relevance: a found picture's title and caption, or else the words of its call, belong to the question's; an edit
    must differ from what was there. Text-image relevance: the same words belong to the prose's. A picture shown
    before counts a quarter, a blank or corrupt one nothing. No picture, or more than ten: all 1.
    """

    name = "rubric_image"
    sees_images = True

    def judge(self, doc: Rendered) -> Verdict:
        """Score one document.

        Raises:
            JudgeFailed: a picture of the document is not among its blobs.
        """
        made = [(call, sha) for call in doc.calls if call.status == "ok" for sha in call.images]
        if not 0 < len(made) <= _MOST_IMAGES:
            return Verdict(dict.fromkeys(_CRITERIA, 1.0), dict.fromkeys(_CRITERIA, f"{len(made)} pictures"))
        pool = {blob.sha256: blob for blob in doc.given} | dict(doc.blobs)
        if missing := [sha for _, sha in made if sha not in pool]:
            raise JudgeFailed(f"picture {missing[0][:12]} is not among the document's blobs: fill Rendered.blobs")
        rows, reasons = _rate_pictures(doc, made, {sha: look(pool[sha]) for _, sha in made})
        scores = [1 + 4 * sum(column) / len(rows) for column in zip(*rows, strict=True)]
        why = "; ".join(reasons) or "every picture opens"
        return Verdict(dict(zip(_CRITERIA, scores, strict=True)), dict.fromkeys(_CRITERIA, why))


Row = tuple[float, float, float]


def _rate_pictures(
    doc: Rendered, made: Sequence[tuple[CallOutcome, str]], looks: Mapping[str, Look | str]
) -> tuple[list[Row], list[str]]:
    """The three criteria of each picture as shares of 0..1, and what is wrong with any."""
    asked, told = subject(doc.question), subject(" ".join(gaps(doc)))
    edited = any(call.source == "edit" for call, _ in made)
    earlier = [seen for blob in doc.given if edited and isinstance(seen := look(blob), Look)]
    shown: list[Look] = []
    rows: list[Row] = []
    reasons = []
    for number, (call, sha) in enumerate(made, 1):
        seen = looks[sha]
        if isinstance(seen, str):
            rows.append((0.0, 0.0, 0.0))
            reasons.append(f"picture {number} {seen}")
            continue
        unchanged = call.source == "edit" and any(map(seen.same, earlier))
        clipped = call.source == "code" and not seen.framed
        again = any(map(seen.same, shown))
        worth = seen.visible * (_SHOWN_BEFORE if again else 1.0)
        faults = {
            "shows little or nothing": seen.visible < 1,
            "was shown before": again,
            "is not changed": unchanged,
            "is cut off at its rim": clipped,
        }
        reasons += [f"picture {number} {fault}" for fault, there in faults.items() if there]
        task = 0.0 if unchanged else _belongs(call, asked)
        quality = seen.size * (_CLIPPED if clipped else 1.0)
        rows.append((worth * quality, worth * task, worth * _belongs(call, told)))
        shown.append(seen)
        earlier.append(seen)
    return rows, reasons


def _scale(share: float) -> float:
    """A share of 0..1 as a score of 1..5."""
    return 1 + 4 * min(1.0, max(0.0, share))


def _text(doc: Rendered, parts: Sequence[str]) -> tuple[float, str]:
    prose = "\n".join(parts)
    if not (told := words(prose)):
        return 1.0, "no prose"
    if any(_ANNOUNCED.search(plain(part)) for part in parts) or any(map(_leads_in, parts[:-1])):
        return 1.0, "an image is announced"
    if any(_fenced(doc.text, call) for call in doc.calls):
        return 1.0, "a tag sits in a code fence"
    if directed(doc.text, doc.question):
        return 1.0, "it speaks to the judge"
    repeated, copied = stale(prose, doc.question)
    # A tenth of repeated phrases is natural, and half of the question may well be taken up.
    checks = [
        (_scale(len(told) / _ENOUGH_WORDS), "very short"),
        (_scale(1 - 2 * max(0.0, repeated - 0.1)), "repeats itself"),
        (_scale(1 - 2 * max(0.0, copied - 0.5)), "copies the question"),
        (_scale(_on_topic(prose, doc.question)), "off topic"),
        (5.0 if doc.finished else 2.0, "cut off"),
    ]
    return _weakest(checks, "on topic and whole")


def _on_topic(prose: str, question: str) -> float:
    """How far the prose, or its best sentence, takes up the words of the question, 0..1; two of them are enough."""
    asked = subject(question) - numbers(question)
    return max(relevance(subject(text), asked, enough=2) for text in (prose, *_SENTENCE_END.split(prose)))


def _leads_in(before: str) -> bool:
    """Whether the line right before a tag ends in a colon and speaks of a picture."""
    *_, line = plain(before).rstrip().split("\n")
    return line.endswith(":") and bool(_POINTS.search(line))


def _tags(doc: Rendered, parts: Sequence[str]) -> tuple[float, str]:
    """The mean over the tags, and what is wrong with the worst."""
    if not doc.calls:
        if not words(doc.text):
            return 1.0, "an empty answer"
        return (5.0, "no image is wanted") if doc.image_num == NONE_ALLOWED else (3.0, "no tag")
    if doc.image_num == NONE_ALLOWED:
        return 1.0, "a tag where no image is wanted"
    calls = sorted(doc.calls, key=lambda c: c.start)
    around = [len(words(part)) for part in parts]
    asked = subject(doc.question)
    keys = [_asks(call) for call in calls]
    rated = []
    for i, call in enumerate(calls):
        in_row = (i > 0 and not around[i]) or (i + 1 < len(calls) and not around[i + 1])
        beside = max(around[i], around[i + 1])
        rated.append(_tag(call, asked, beside, in_row, again=keys.index(keys[i]) < i))
    return sum(score for score, _ in rated) / len(rated), min(rated)[1]


def _asks(call: CallOutcome) -> tuple[object, ...]:
    """What a call asks for, whatever the case, the signs and the order of its words; code counts as it is written."""
    said = words(param_text(call))
    others = sorted(f"{k} {v}" for k, v in call.params.items() if not isinstance(v, str))
    return (call.source, *others, *(said if call.source == "code" else sorted(set(said))))


def _tag(call: CallOutcome, asked: frozenset[str], beside: int, in_row: bool, again: bool) -> tuple[float, str]:
    """One tag's weakest link; `beside` are the words of prose before or after it."""
    if call.status == "invalid":
        return 1.0, f"malformed tag: {call.reason}"
    # An edit's instruction names the change, its description what is seen after it: either may word it as asked.
    about = [param_text(call), *([call.description] if call.source == "edit" else [])]
    checks = [
        (_scale(_softened(call, _closest(about, asked))), "not relevant to the question"),
        (_scale(0.8 * _specific(call, asked) + 0.2 * min(1.0, len(content(call.description)) / 2)), "not specific"),
        (_scale(beside / _ENOUGH_AROUND), "no prose beside it"),
        (3.0 if in_row else 5.0, "several tags in a row"),
        (2.0 if again else 5.0, "the same tag again"),
    ]
    return _weakest(checks, "relevant, specific and integrated")


def _weakest(checks: Sequence[tuple[float, str]], praise: str) -> tuple[float, str]:
    score, fault = min(checks)
    return score, fault if score < 5 else praise


def _fenced(text: str, call: CallOutcome) -> bool:
    return text.count("```", 0, call.start) % 2 == 1 or text[: call.start].endswith("`")


def _softened(call: CallOutcome, share: float) -> float:
    """An edit is half relevant by pointing at a picture: its instruction is often worded anew ("grey", "no colour")."""
    return 0.5 + 0.5 * share if call.source == "edit" else share


def _specific(call: CallOutcome, asked: frozenset[str]) -> float:
    """How much a call says, 0..1; code by the numbers asked for, whether it draws, and whether it labels."""
    said = param_text(call)
    if call.source != "code":
        return min(1.0, len(content(said or call.description)) / _SPECIFIC.get(call.source, 2))
    wanted = {word for word in asked if word[0].isdecimal()}
    data = len(wanted & numbers(said)) / len(wanted) if wanted else 1.0
    return 0.5 * data + 0.25 * bool(_DRAWS.search(said)) + 0.25 * bool(_LABELS.search(said))


def _belongs(call: CallOutcome, wanted: frozenset[str]) -> float:
    """How far what a picture shows, as its title or its call tells, belongs to the `wanted` words, 0..1."""
    found = title_text(call.provenance)
    told = [str(call.provenance.get("title", "")), found] if found else [param_text(call), call.description]
    return _softened(call, _closest(told, wanted))


def _closest(texts: Sequence[str], wanted: frozenset[str]) -> float:
    return max(relevance(subject(text), wanted) for text in texts)
