"""A judge that is a language model: it reads a rubric and a document, and answers with scores and reasons in JSON.

The model is behind a backend: an engine in this process (`rewards.judges.engine`) or an OpenAI-compatible endpoint
(`rewards.judges.endpoint`). An answer that cannot be read is asked for again, and at last is `JudgeFailed`: it is never
a low score. Equal documents are judged once.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from rewards.base import JudgeFailed, Rendered, Verdict
from rewards.judges.answers import Answer, TooLong, Unreadable, read
from rewards.judges.content import Limits, Part, parts_of
from rewards.judges.rubrics import REASON, Rubric, load
from tools.base import imported

LEAST_CHARS = 500  # that a document is cut to, for a model that cannot read more
TRIES = 2  # of a sample that cannot be read
SAMPLED = 0.7  # temperature where samples must differ: several of them, and a second try


@dataclass(frozen=True)
class Message:
    """One message of a chat: words and pictures in order."""

    role: Literal["system", "user"]
    parts: Sequence[Part]


@dataclass(frozen=True)
class Asked:
    """What a backend is asked for: an answer to `messages` that follows `schema`, with the log-probs of its tokens."""

    messages: Sequence[Message]
    schema: Mapping[str, Any]
    max_tokens: int
    temperature: float
    seed: int


class Backend(Protocol):
    """A model that answers; called from several threads at once."""

    def complete(self, asked: Asked) -> Answer:
        """Raises JudgeFailed: there is no answer in time."""
        ...

    def check(self) -> None:
        """Raises if the backend is broken beyond repair."""
        ...

    def close(self) -> None: ...


class ModelJudge:
    """Scores documents with a model.

    Args:
        rubric: name of a built-in rubric (`text`, `image`), or a YAML file like them.
        engine: arguments of `rewards.judges.engine.Engine`, or
        endpoint: those of `rewards.judges.endpoint.Endpoint`.
        samples: answers a document that are averaged; their spread is the verdict's `disagreement`.
        limits: `rewards.judges.content.Limits`.
        cache: verdicts that are kept; 0 judges equal documents anew.

    Raises:
        ValueError: not exactly one backend, or an option is wrong.
    """

    def __init__(
        self,
        rubric: str,
        engine: Mapping[str, Any] | None = None,
        endpoint: Mapping[str, Any] | None = None,
        samples: int = 1,
        limits: Mapping[str, int] | None = None,
        cache: int = 4096,
    ) -> None:
        if (engine is None) == (endpoint is None):
            raise ValueError("a model judge has either `engine` or `endpoint`")
        if samples < 1 or cache < 0:
            raise ValueError(f"samples must be at least 1 and cache at least 0, not {samples} and {cache}")
        self.rubric: Rubric = load(rubric)
        self.name, self.sees_images = f"model ({rubric})", self.rubric.reads == "document"
        self._limits = Limits(**(limits or {}))
        self._samples = samples
        self._verdicts = _Once(cache)
        self._backend = _backend(engine, endpoint, self._limits.images if self.sees_images else 0)

    def judge(self, doc: Rendered) -> Verdict:
        """Score one document; one that is too long for the model is shown in part, and told so.

        Raises:
            JudgeFailed: no usable verdict.
        """
        limits = self._limits
        while True:
            messages = self.build_messages(doc, limits)
            try:
                return self._verdicts.get(_key(messages), partial(self._judged, messages))
            except TooLong:
                if limits.chars < 2 * LEAST_CHARS:
                    raise
                limits = limits.halved()

    def build_messages(self, doc: Rendered, limits: Limits) -> list[Message]:
        """The rubric, which is equal for all documents, and the document."""
        parts = parts_of(doc, self.rubric.reads, limits)
        return [Message("system", [self.rubric.system()]), Message("user", parts)]

    def parse(self, answer: Answer) -> Verdict:
        """Raises JudgeFailed."""
        return read(answer, self.rubric)

    def forget(self) -> None:
        """Judge anew what was judged before."""
        self._verdicts.clear()

    def check(self) -> None:
        self._backend.check()

    def close(self) -> None:
        self._backend.close()

    def _judged(self, messages: Sequence[Message]) -> Verdict:
        return average([self._sample(messages, i) for i in range(self._samples)])

    def _sample(self, messages: Sequence[Message], sample: int) -> Verdict:
        most = len(self.rubric.criteria) * (2 * REASON + 40)
        for attempt in range(TRIES):
            temperature = SAMPLED if attempt or self._samples > 1 else 0.0
            asked = Asked(messages, self.rubric.schema(), most, temperature, seed=sample * TRIES + attempt)
            try:
                return self.parse(self._backend.complete(asked))
            except Unreadable as error:
                failed = error
        raise failed


class PanelJudge:
    """Several judges whose verdicts are averaged, criterion by criterion; it fails if one of them does.

    Args:
        judges: each with `judge` ("module:class") and `options`.
    """

    def __init__(self, judges: Sequence[Mapping[str, Any]]) -> None:
        if not judges:
            raise ValueError("a panel has at least one judge")
        self._judges = [imported(one["judge"])(**one.get("options", {})) for one in judges]
        self.name = "panel of " + ", ".join(judge.name for judge in self._judges)
        self.sees_images = any(judge.sees_images for judge in self._judges)

    def judge(self, doc: Rendered) -> Verdict:
        """Raises JudgeFailed."""
        return average([judge.judge(doc) for judge in self._judges])

    def forget(self) -> None:
        self._each("forget")

    def check(self) -> None:
        self._each("check")

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str) -> None:
        for judge in self._judges:
            getattr(judge, method, lambda: None)()


def average(verdicts: Sequence[Verdict]) -> Verdict:
    """The mean of each score; the population standard deviation is the disagreement. Reasons stand side by side.

    Raises:
        JudgeFailed: they do not score the same criteria.
    """
    if len(verdicts) == 1:
        return verdicts[0]
    names = list(verdicts[0].scores)
    if any(set(v.scores) != set(names) for v in verdicts):
        raise JudgeFailed("the judges of a panel score different criteria")
    by_name = {name: [v.scores[name] for v in verdicts] for name in names}
    return Verdict(
        {name: statistics.fmean(scores) for name, scores in by_name.items()},
        {name: " / ".join(v.reasons.get(name, "") for v in verdicts) for name in names},
        {name: statistics.pstdev(scores) for name, scores in by_name.items()},
    )


class _Once:
    """Verdicts by content: equal ones are made once, also when they are asked for at the same time."""

    def __init__(self, most: int) -> None:
        self._most, self._kept = most, OrderedDict[str, Future[Verdict]]()
        self._lock = threading.Lock()

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def get(self, key: str, make: Callable[[], Verdict]) -> Verdict:
        if not self._most:
            return make()
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                mine = self._kept[key] = Future()
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(key)
        if found is not None:
            return found.result()
        try:
            verdict = make()
        except BaseException as error:
            with self._lock:
                self._kept.pop(key, None)
            mine.set_exception(error)
            raise
        mine.set_result(verdict)
        return verdict


def _key(messages: Sequence[Message]) -> str:
    parts = [[m.role, *(p if isinstance(p, str) else ["picture", p.sha256] for p in m.parts)] for m in messages]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _backend(engine: Mapping[str, Any] | None, endpoint: Mapping[str, Any] | None, images: int) -> Backend:
    if endpoint is not None:
        from rewards.judges.endpoint import Endpoint

        return Endpoint(**endpoint)
    from rewards.judges.engine import Engine

    return Engine(images=images, **(engine or {}))
