"""Scores of single tool calls, 0..1: what can be said of one call without a judge.

- `search`: how far title and caption of the found picture belong to the words of the query.
- `code`: whether its charts are legible: it is halved by each warning in the provenance (`warnings`: overlapping, ...),
  by a picture that is blank, and by one whose rim is not of one colour, so that something is clipped.
- `edit`: obeyed or not: the picture differs from those that it was made from.
- others: 1 if they made a picture that opens.

A failed or malformed call, and one whose picture does not open, is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.base import CallOutcome, JudgeFailed, Rendered
from rewards.judges.looks import Look, look
from rewards.judges.words import param_text, relevance, subject, title_text

#: Component names of single calls: this and the call's number, in the order of `Rendered.calls`.
CALL = "call/"


def call_scores(doc: Rendered) -> list[float]:
    """[calls] the score of each.

    Raises:
        JudgeFailed: a made picture is not among the document's blobs.
    """
    if missing := {sha for call in doc.calls for sha in call.images} - doc.blobs.keys():
        raise JudgeFailed(f"picture {min(missing)[:12]} is not among the document's blobs: fill Rendered.blobs")
    return [_score(doc, call) for call in doc.calls]


def _score(doc: Rendered, call: CallOutcome) -> float:
    if call.status != "ok" or not call.images:
        return 0.0
    seen = [found for sha in call.images if isinstance(found := look(doc.blobs[sha]), Look)]
    if len(seen) < len(call.images):
        return 0.0
    if call.source == "search":
        return relevance(subject(param_text(call)), subject(title_text(call.provenance)))
    if call.source == "edit":
        return float(not any(one.same(before) for one in seen for before in _sources(doc, call)))
    if call.source == "code":
        warnings = call.provenance.get("warnings", ())
        faults = len(warnings) if isinstance(warnings, Sequence) and not isinstance(warnings, str) else bool(warnings)
        blank, clipped = (not all(one.visible == 1 for one in seen)), not all(one.framed for one in seen)
        return float(0.5 ** (faults + blank + clipped))
    return 1.0


def _sources(doc: Rendered, call: CallOutcome) -> list[Look]:
    """The pictures that a call was pointed at; where its provenance does not say, the user's."""
    pool = {blob.sha256: blob for blob in doc.given} | dict(doc.blobs)
    names = call.provenance.get("of") or [blob.sha256 for blob in doc.given]
    return [found for name in names if name in pool and isinstance(found := look(pool[name]), Look)]
