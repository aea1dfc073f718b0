"""The service without HTTP: it begins documents, keeps them and their pictures, and tells of them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.answer import Document
from agent.document import render_html
from agent.export import outcome_json, to_markdown
from agent.protocol import OPEN
from agent.render import CallOutcome
from agent.service.files import Files
from agent.service.jobs import CANCELLED, WRITING, Agents, Job, Question
from agent.service.keys import Keys
from agent.service.problem import Problem
from agent.service.shapes import AnsweredCall, Feedback, Made
from replay.record import Blob

NAMED = 1024  # finished jobs that are followed from memory; older ones come from the files


@dataclass(frozen=True)
class Options:
    """Of a service.

    Attributes:
        deadline_s: seconds that a document may take.
        body_bytes: most of a request.
        picture: reads a picture's bytes, or raises ValueError.
        fetch: gets a picture from the web, or raises ValueError.
        learn: whether documents are kept to be trained on, of those who allow it.
    """

    deadline_s: float
    body_bytes: int
    picture: Callable[[bytes], Blob]
    fetch: Callable[[str], Blob]
    learn: bool = False


class Service:
    """What the routes work with.

    Args:
        agents: the policies.
        keys: who may ask.
        files: what is kept.
    """

    def __init__(self, agents: Agents, keys: Keys, files: Files, options: Options) -> None:
        self.agents, self.keys, self.files, self.options = agents, keys, files, options
        self.started = int(time.time())
        self._jobs: dict[str, Job] = {}

    def policy(self, asked: str) -> str:
        """The policy of that name, or one by weight. Raises Problem."""
        weights = self.agents.weights()
        if asked in weights:
            return asked
        if asked not in ("", "llmi"):
            raise Problem(404, f"there is no model {asked!r}: here are llmi, {', '.join(weights)}")
        return random.choices(list(weights), list(weights.values()))[0]

    def begin(self, owner: str, model: str, question: Question) -> Job:
        """Start a document. Raises Problem."""
        if question.learn and not self.options.learn:
            raise Problem(422, "learn: this service keeps nothing to be trained on")
        self.keys.take(owner)
        try:
            job = Job(self.policy(model), question, owner)
        except BaseException:
            self.keys.give(owner)
            raise
        self._jobs[job.id] = job
        while len(self._jobs) > NAMED and (old := next(iter(self._jobs.values()))).status != WRITING:
            del self._jobs[old.id]
        job.task = asyncio.create_task(self._run(job))
        return job

    async def _run(self, job: Job) -> None:
        try:
            await job.run(self.agents, self.options.deadline_s)
            if job.status != CANCELLED:
                await asyncio.to_thread(self._keep, job)
        finally:
            self.keys.give(job.owner)

    def _keep(self, job: Job) -> None:
        """Store a document that has ended, with what is needed to train on it if that is allowed."""
        hidden: dict[str, Any] = {"owner": job.owner}
        if job.question.learn and len(job.question.messages) == 1:  # a trajectory is one question and its answer
            given = [self.files.put_picture(blob) for blob in job.question.given]
            hidden["learn"] = {"given": given, "sampled": vars(job.usage.sampled) if job.usage.sampled else None}
        self.files.put_document(job.id, self.row(job), hidden)

    def row(self, job: Job) -> dict[str, Any]:
        """A job as the API tells of it."""
        document = job.document()
        images = {sha: self.link(blob) for sha, blob in document.blobs.items()}
        usage = job.usage
        return Made(
            id=job.id,
            created=job.created,
            model=job.policy,
            status=job.status,
            reason=job.reason,
            prompt=job.question.text,
            text=document.text,
            markdown=to_markdown(replace(document, given=()), self.link),  # whoever asks has those
            html=self.html(job),
            feedback=job.feedback,
            calls=[AnsweredCall(**outcome_json(call)) for call in document.calls],
            scaling=list(document.scaling),
            images=images,
            finished=usage.finish != "length",
            usage={"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.tokens},
        ).model_dump()

    async def document(self, identity: str, owner: str) -> Document:
        """A document of this owner's with its pictures. Raises Problem."""
        if (job := self.job(identity, owner)) is not None:
            return job.document()
        row = await self.stored(identity, owner)
        calls = tuple(CallOutcome(**call | {"images": tuple(call["images"])}) for call in row["calls"])
        names = {sha: url.rpartition("/")[2] for sha, url in row["images"].items()}
        found = {sha: await asyncio.to_thread(self.files.picture, name) for sha, name in names.items()}
        blobs = {sha: blob for sha, blob in found.items() if blob is not None}
        return Document(row["prompt"], row["text"], calls, blobs)

    def html(self, job: Job) -> str:
        """The document as it is, with addresses of its pictures, and places for those that are being made."""
        document = job.document()
        opened = document.text.rfind(OPEN)  # of a tag that is being written
        whole = job.status != WRITING or opened < max((call.end for call in document.calls), default=0)
        text = document.text if whole else document.text[:opened]
        return render_html(text, document.calls, document.blobs, link=self.link)

    async def rate(self, identity: str, owner: str, feedback: Feedback) -> None:
        """Keep what a reader thinks of a document. Raises Problem."""
        row = await self.stored(identity, owner)
        if row["status"] == WRITING:
            raise Problem(409, "the document is still being written")
        row["feedback"] = {**feedback.model_dump(), "at": int(time.time())}
        if (job := self.job(identity, owner)) is not None:
            job.feedback = row["feedback"]
        await asyncio.to_thread(self.files.rate, identity, row["feedback"])

    def link(self, blob: Blob) -> str:
        """The address of a picture at this service, which keeps it from then on."""
        return f"/v1/images/{self.files.put_picture(blob)}"

    def job(self, identity: str, owner: str) -> Job | None:
        """A document of this owner's that is still in memory."""
        job = self._jobs.get(identity)
        return job if job is not None and job.owner == owner else None

    async def stored(self, identity: str, owner: str) -> dict[str, Any]:
        """A document of this owner's. Raises Problem."""
        if (job := self.job(identity, owner)) is not None:
            return self.row(job)
        found = await asyncio.to_thread(self.files.document, identity)
        if found is None or found[1]["owner"] != owner:  # another's is not there either
            raise Problem(404, f"there is no document {identity!r}")
        return found[0]

    def forget(self, identity: str) -> None:
        """Drop a document that has ended."""
        self._jobs.pop(identity, None)
        self.files.forget(identity)

    async def pictures(self, addresses: Sequence[str]) -> tuple[Blob, ...]:
        """The user's pictures. Raises Problem."""
        return tuple([await asyncio.to_thread(self._picture, i, url) for i, url in enumerate(addresses)])

    def _picture(self, index: int, address: str) -> Blob:
        try:
            if re.match(r"https?://", address):
                return self.options.fetch(address)
            data = base64.b64decode(
                address.partition(",")[2] if address.startswith("data:") else address, validate=True
            )
            return self.options.picture(data)
        except binascii.Error as error:
            raise Problem(422, f"images.{index}: neither http(s), a data URL nor Base64") from error
        except ValueError as error:
            raise Problem(422, f"images.{index}: {error}") from error
