"""The hybrid reward: rules, a text judge and an image judge, summed as published or in a corrected form.

Both are terms over the same components (`rewards.components`), and a config may give terms of its own.

With v pictures, n = `image_num`, T and I the text judge's scores, m the mean of the image judge's three (all 1..5):

    R_llm = ((1.4 T + 0.6 I) / 2 - 1) / 4          (1.5 and 0.5 for vision-language policies)
    R_mllm = (m - 1) / 4                           (0 with more than 10 pictures)

`published` (LLM-I.md), R_mllm being 1 where there is no picture to judge, as its known holes tell:

    R = 0.2 R_rule + 0.3 R_mllm R_rule + 0.5 R_llm

`default`:

    R = R_rule (0.2 + 0.8 F) (0.4 + 0.4 R_llm + 0.2 M)

    F  fit of the calls: share of required tools that succeeded x share of calls that succeeded and were wanted
    M  R_mllm; without a picture 0 where pictures are free, R_llm where none is allowed

What it changes, and why:
- It is a product, not a sum. Where pictures are required and none was made, R_rule = 0 and so is R: good prose does
  not pay for them. The published sum still gives 0.5.
- With a free number of pictures a text-only answer has M = 0 and reaches 0.8, where good pictures reach 1. The
  published one gives it 1.0, so that pictures can only lower it.
- F charges the wrong tool (R falls to a fifth or less), the superfluous call and the failed one. The published sum
  only counts pictures, whatever made them. A tool that was never called is not covered, and no success of R_tool.
- So tool precision (`right_calls`) and missed opportunities (`coverage`, the number of pictures, and M where they are
  free) are in F, R_rule and M. `precision` and `missed` tell of them apart from success, and can be terms or gates.
- An outage of a tool or a judge has no place in it: a call without an end of its own and a verdict without its
  scores raise, so that the trajectory is tried again and never scored low.
- Judges are given the user's own pictures (`Rendered.given`): what was made of one can be compared with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from rewards.base import JudgeFailed, Rendered, Verdict
from rewards.components import DEFAULT, KINDS, Terms, total
from rewards.process import CALL, call_scores
from rewards.rules import (
    NONE_ALLOWED,
    accurate,
    count_images,
    coverage,
    missed,
    right_calls,
    rule,
    rule_strict,
    tool_precision,
    tool_reward,
)

TEXT_CRITERIA = ("text", "image_tags")
IMAGE_CRITERIA = ("image_quality", "task_relevance", "text_image_relevance")
#: More pictures than this get the lowest image scores, unseen.
MOST_IMAGES = 10


@dataclass(frozen=True)
class Score:
    """What a document earned.

    Attributes:
        reward: what the policy is trained on: 0..1, but for terms of one's own.
        reward_strict: the default hybrid with the strict 0/1 rule, 0..1, whatever the policy is trained on.
        accurate: counts for tool accuracy.
        components: what the sums are made of, by name; judges' criteria as given (1..5), all else 0..1 or a count.
    """

    reward: float
    reward_strict: float
    accurate: bool
    components: dict[str, float]


def wants_image_verdict(doc: Rendered) -> bool:
    """Whether `score` reads the image judge's verdict. Raises ValueError for a call that never came to an end."""
    return 0 < count_images(doc) <= MOST_IMAGES


def score(
    doc: Rendered,
    text: Verdict,
    image: Verdict | None,
    kind: str = "default",
    multimodal: bool = False,
    *,
    terms: Terms | None = None,
    process: bool = False,
) -> Score:
    """Score one rendered document.

    Args:
        text: the text judge's verdict, with TEXT_CRITERIA.
        image: the image judge's, with IMAGE_CRITERIA; may be None where `wants_image_verdict` is false.
        kind: a name in `rewards.components.KINDS`.
        multimodal: the policy is a vision-language model.
        terms: of the reward, instead of those of `kind`; checked by `rewards.components.check`.
        process: score each call too (`rewards.process`), which opens the pictures; of a document with calls, the
            scores are components `call/0`, `call/1`, ..., and their mean is `process`.

    Raises:
        JudgeFailed: a verdict lacks a criterion, or holds something else than a number from 1 to 5.
        ValueError: unknown kind, or a call that never came to an end.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown reward kind {kind!r}: known are {', '.join(KINDS)}")
    images = count_images(doc)
    judged = _criteria(text, TEXT_CRITERIA, "text") | _image_criteria(image, images)
    r_llm = _r_llm(judged["text"], judged["image_tags"], multimodal)
    r_mllm = _r_mllm(judged, images)
    parts = judged | {
        "rule": rule(images, doc.image_num),
        "rule_strict": rule_strict(images, doc.image_num),
        "r_llm": r_llm,
        "r_mllm": _default_images(doc, r_mllm, r_llm),
        "r_mllm_published": 1.0 if r_mllm is None else r_mllm,
        "r_tool": tool_reward(doc),
        "coverage": coverage(doc),
        "precision": tool_precision(doc),
        "missed": missed(doc),
        "fit": coverage(doc) * right_calls(doc),
        "images": float(images),
        "calls": float(len(doc.calls)),
    }
    if process:
        parts |= _process(doc)
    return Score(
        reward=total(KINDS[kind] if terms is None else terms, parts),
        reward_strict=total(DEFAULT, parts | {"rule": parts["rule_strict"]}),
        accurate=accurate(doc),
        components=parts,
    )


def _process(doc: Rendered) -> dict[str, float]:
    """Of a document without a call, `process` is what the rule says: 1 if none was needed."""
    scores = call_scores(doc)
    mean = statistics.fmean(scores) if scores else 1 - missed(doc)
    return {"process": mean} | {f"{CALL}{i}": one for i, one in enumerate(scores)}


def _r_llm(text: float, image_tags: float, multimodal: bool) -> float:
    weight = 1.5 if multimodal else 1.4
    return ((weight * text + (2 - weight) * image_tags) / 2 - 1) / 4


def _r_mllm(judged: Mapping[str, float], images: int) -> float | None:
    """(mean - 1) / 4, or None where there is no picture to judge."""
    return (sum(judged[name] for name in IMAGE_CRITERIA) / len(IMAGE_CRITERIA) - 1) / 4 if images else None


def _default_images(doc: Rendered, r_mllm: float | None, r_llm: float) -> float:
    if r_mllm is not None:
        return r_mllm
    return r_llm if doc.image_num == NONE_ALLOWED else 0.0


def _image_criteria(verdict: Verdict | None, images: int) -> dict[str, float]:
    if images == 0:
        return {}
    if images > MOST_IMAGES:
        return dict.fromkeys(IMAGE_CRITERIA, 1.0)
    if verdict is None:
        raise JudgeFailed(f"no image verdict for a document of {images} pictures: ask the image judge again")
    return _criteria(verdict, IMAGE_CRITERIA, "image")


def _criteria(verdict: Verdict, names: tuple[str, ...], judge: str) -> dict[str, float]:
    for name in names:
        value = verdict.scores.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value) or not 1 <= value <= 5:
            raise JudgeFailed(f"the {judge} judge gave {value!r} for {name!r}: wanted a number from 1 to 5")
    return {name: float(verdict.scores[name]) for name in names}
