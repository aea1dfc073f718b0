"""Documents that people asked for, as trajectories of a replay store that `llmi train train.store=...` goes on from.

Each question becomes a group. Where the document is as the policy sampled it, it is the group's first sample, with its
tokens; a thumb is its reward, 1 or 0, and without one the judges score it. The other samples are pending: the run's own
rollout workers write them. Only what users allowed is there, what they deleted is not, and what is older than
`serve.keep_days` was swept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actors.feeder import group_rows
from agent.render import CallOutcome
from agent.service.files import Files
from cluster.config import ConfigError
from replay.record import SCHEMAS, Blob, Prompt
from replay.storage import storage
from replay.store import Store
from replay.view import is_store, make_shards
from rewards.rules import FREE

_THUMBS = {"up": 1.0, "down": 0.0}


@dataclass(frozen=True)
class Gathered:
    """How much there was: questions, those with the policy's own answer, and those with a thumb."""

    questions: int
    answers: int
    rated: int


def gather(folder: str, to: str, samples: int) -> Gathered:
    """Make a store at `to` of what a service keeps in `folder`.

    Args:
        samples: of a group, as `learner.samples_per_prompt` of the run that it is for.

    Raises:
        ConfigError: nothing may be trained on, or there is a store already.
    """
    if is_store(to):
        raise ConfigError(f"there is a replay store in {to} already; name another place")
    if not storage(folder, read_only=True).files("documents"):
        raise ConfigError(f"no service keeps documents in {folder}: it is serve.folder, or service/ of a run folder")
    files = Files(folder, 0.0)
    allowed = [(row, hidden["learn"]) for row, hidden in files.documents() if hidden.get("learn")]
    if not allowed:
        raise ConfigError(
            f"nobody allowed {folder} to be trained on: `serve.learn: true` keeps what requests with `learn` allow"
        )
    (shard,) = make_shards(to, 1)
    answers = rated = 0
    with closing(Store(shard)) as store:
        for order, (row, learn) in enumerate(allowed):
            given = [blob for name in learn["given"] if (blob := files.picture(name)) is not None]
            prompt = Prompt(row["id"], row["prompt"], tuple(blob.data for blob in given), FREE)
            store.put("pending", *group_rows(prompt, "train", order, samples, 0))
            if learn["sampled"] is not None and len(given) == len(learn["given"]):
                for stage, rows, blobs in _answer(f"train-{order:06d}", row, learn["sampled"], files):
                    store.put(stage, pa.Table.from_pylist([rows], SCHEMAS[stage]), blobs)
                answers += 1
                rated += row["feedback"] is not None
    return Gathered(len(allowed), answers, rated)


def _answer(
    group: str, row: Mapping[str, Any], sampled: Mapping[str, Any], files: Files
) -> Iterator[tuple[str, dict[str, Any], list[Blob]]]:
    """The stages of a served document, as the group's first sample."""
    key = {"trajectory": f"{group}/0", "group": group, "attempt": 0, "turn": 0, "seconds": 0.0}
    tokens = len(sampled["token_ids"])
    told = {"text": row["text"], "finish": "stop" if row["finished"] else "length", "worker": "service"}
    yield "generated", key | dict(sampled) | told | {"mask": [1] * tokens, "versions": [0] * tokens}, []
    calls = [CallOutcome(**call | {"images": tuple(call["images"])}) for call in row["calls"]]
    pictures = [files.picture(url.rpartition("/")[2]) for url in row["images"].values()]
    blobs = [blob for blob in pictures if blob is not None]
    if len(blobs) < len(pictures):  # swept on the day of its document: the renderers make them again
        return
    yield "rendered", key | {"calls": [call.row() for call in calls], "finished": True}, blobs
    if (feedback := row["feedback"]) is not None:
        reward = _THUMBS[feedback["thumb"]]
        worth = {"reward": reward, "reward_strict": reward, "accurate": all(c.status == "ok" for c in calls)}
        yield "scored", key | worth | {"components": [("thumb", reward)]}, []
