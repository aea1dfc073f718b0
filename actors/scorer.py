"""Scorers: claim rendered documents, ask the judges, put the reward with all its components."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pyarrow as pa
import ray

from actors.serving import JudgeClient, Outage
from actors.worker import StageWorker
from agent.render import CallOutcome
from replay.record import SCHEMAS
from rewards.base import JudgeFailed, Rendered, Verdict
from rewards.components import Terms
from rewards.hybrid import score, wants_image_verdict

COLUMNS = ["question", "text", "calls", "image_num", "tools", "given", "finish"]
JUDGE_TRIES = 3
PAUSE_S = 1.0  # before a judge that failed is asked again; doubles
IN_FLIGHT = 2  # batches at once, so that one whose judge is slow does not hold up the others


@ray.remote
class Scorer(StageWorker):
    """Scores documents in batches.

    Args:
        store: handle.
        pool: name prefix of the Serve applications; its judges are named `text` and `image`.
        timeout_s: of a judge's answer to one batch.
        kind: reward that trains the policy: `default` or `published`.
        multimodal: the policy sees images (the published weights of the text judge differ).
        terms: of the reward, instead of those of its kind.
        process: score each call too.
        batch: most documents a request.
    """

    stage = "score"

    def __init__(
        self,
        store: Any,
        pool: str,
        *,
        timeout_s: float,
        kind: str,
        multimodal: bool,
        terms: Terms | None = None,
        process: bool = False,
        batch: int = 16,
    ) -> None:
        super().__init__(store)
        self._terms, self._process = terms, process
        self._kind, self._multimodal, self._batch = kind, multimodal, batch
        self._text = JudgeClient(pool, "text", timeout_s)
        self._image = JudgeClient(pool, "image", timeout_s)
        self._slots = asyncio.Semaphore(IN_FLIGHT)

    async def loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                await self._slots.acquire()
                claim = await self.claim("rendered", limit=self._batch, columns=COLUMNS, wait_s=5.0)
                if claim is None:
                    self._slots.release()
                    continue
                rows = claim.rows.to_pylist()
                self.begin(len(rows))
                group.create_task(self._score(claim.token, rows)).add_done_callback(lambda _: self._slots.release())

    async def _score(self, token: int, rows: list[dict[str, Any]]) -> None:
        started = time.monotonic()
        docs = await self._documents(rows)
        pictured = [wants_image_verdict(d) for d in docs]
        text, image = await asyncio.gather(
            self._verdicts(self._text, docs, [True] * len(docs)), self._verdicts(self._image, docs, pictured)
        )
        scored, aside = [], {}
        seconds = (time.monotonic() - started) / len(rows)
        for row, doc, t, i in zip(rows, docs, text, image, strict=True):
            if not isinstance(t, Verdict) or isinstance(i, str):
                why = str(i if isinstance(t, Verdict) else t)
                aside[row["trajectory"]] = ("set_aside_judge", why.encode(errors="replace").decode())
                continue
            try:
                result = score(doc, t, i, self._kind, self._multimodal, terms=self._terms, process=self._process)
            except JudgeFailed as failed:  # a verdict of the right type with scores that are none
                aside[row["trajectory"]] = ("set_aside_judge", str(failed))
                continue
            key = {k: row[k] for k in ("trajectory", "group", "attempt")} | {"turn": 0, "seconds": seconds}
            scored.append(
                key
                | {"reward": result.reward, "reward_strict": result.reward_strict, "accurate": result.accurate}
                | {"components": [*result.components.items(), *_disagreement(t, i)], "reasons": _reasons(t, i)}
            )
        if scored:
            await self._store.put("scored", pa.Table.from_pylist(scored, SCHEMAS["scored"]))
        if aside:
            self.failed("judge", len(aside))
            await self._store.ack(token, aside)
        self.end(len(rows), seconds)

    async def _documents(self, rows: list[dict[str, Any]]) -> list[Rendered]:
        calls = [[CallOutcome.of_row(c) for c in row["calls"]] for row in rows]
        names = {
            s for row, cs in zip(rows, calls, strict=True) for s in [*row["given"], *(i for c in cs for i in c.images)]
        }
        blobs = await self._store.blobs(sorted(names)) if names else {}
        return [
            Rendered(
                row["question"],
                row["text"],
                cs,
                row["image_num"],
                tuple(row["tools"]),
                tuple(blobs[s] for s in row["given"]),
                {i: blobs[i] for c in cs for i in c.images},
                row["finish"] == "stop",
            )
            for row, cs in zip(rows, calls, strict=True)
        ]

    async def _verdicts(
        self, judge: JudgeClient, docs: list[Rendered], wanted: list[bool]
    ) -> list[Verdict | str | None]:
        """A verdict a wanted document; those that fail are asked again, and at last stay a reason."""
        found: list[Verdict | str | None] = [("not judged" if w else None) for w in wanted]
        for attempt in range(JUDGE_TRIES):
            open_ = [i for i, v in enumerate(found) if isinstance(v, str)]
            if not open_:
                break
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                answers = await judge.judge([docs[i] for i in open_])
                if len(answers) != len(open_):
                    answers = [f"the judge answered {len(answers)} verdicts to {len(open_)} documents"] * len(open_)
            except Outage as outage:
                answers = [str(outage)] * len(open_)
            for i, answer in zip(open_, answers, strict=True):
                found[i] = answer
        return found


def _reasons(*verdicts: Verdict | None) -> str:
    """Why each score, as JSON."""
    return json.dumps({name: why for v in verdicts if v is not None for name, why in v.reasons.items()})


def _disagreement(*verdicts: Verdict | None) -> list[tuple[str, float]]:
    """How far the answers or judges behind each score differ, as components beside it."""
    return [
        (f"disagreement/{name}", value) for v in verdicts if v is not None for name, value in v.disagreement.items()
    ]
