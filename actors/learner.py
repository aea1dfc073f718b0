"""Learner ranks: claim the oldest complete groups, take an optimiser step, publish the weights, end the groups.

Rank 0 claims and decides; every rank reads its own shard from the store; all ranks run the same number of
micro-batches. The order within a step is: update, publish, acknowledge, checkpoint. A crash between two of them is
mended by `Store.rewind` to the step that the checkpoint manifest names.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
from torch import Tensor

from actors import metrics
from actors.weights import ANSWER_S, SLEEP_S, Publisher, Sender
from learners.advantages import overlong, without_spread
from learners.credit import Credit, by_token, of_group
from learners.groups import Answer, answer, chosen
from learners.packing import Sample
from learners.step import Recipe, StepPlan, take_step
from learners.world import led, together
from replay.checkpoints import Checkpoints
from replay.folders import copy, fetched
from replay.record import staleness, version
from replay.store import Claim
from rewards.process import CALL

T = TypeVar("T")

CHOICE_COLUMNS = ["reward", "finish", "logprobs", "mask"]
CREDIT_COLUMNS = ["calls"]  # where calls are credited
TOKEN_COLUMNS = ["prompt_ids", "token_ids", "logprobs", "mask"]
#: What rank 0 tells the others of a step: its plan, the claims that it holds, and its statistics.
Agreed = tuple[StepPlan, list[int], dict[str, float]]
LEASE_S = 1800.0
COLLECT_S = 600.0  # a collection may write many segments anew


@ray.remote
class LearnerRank:
    """One DeepSpeed rank.

    Args:
        rank, ranks: of the group.
        store, hub: handles.
        model: folder, `s3://...` or hub name to start from.
        options: of `learners.engine.Learner`.
        recipe: of the config's `learner` section (`cluster.config.Learner`), and `max_tokens`, `shuffled`, `seed`,
            `retention`, `weights` (how they reach the engines), `adapter` (it alone does), `turns` (the engines sleep
            while it learns).
        checkpoints: their folder: a path or `s3://...`.
        policy: where the policy of the newest checkpoint goes: a path or `s3://...`.
        incarnation: which life of the run this is.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        store: Any,
        hub: Any,
        *,
        model: str,
        options: Mapping[str, Any],
        recipe: Mapping[str, Any],
        checkpoints: str,
        policy: str,
        incarnation: int,
    ) -> None:
        self._rank, self._ranks, self._store, self._hub = rank, ranks, store, hub
        self._model, self._options, self._recipe = model, dict(options), recipe
        self._checkpoints, self._policy, self._incarnation = Checkpoints(checkpoints), policy, incarnation
        self._step = 0
        self._history: list[dict[str, float]] = []
        self._rewards: list[float] = []  # of the steps since the last checkpoint
        self._best: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._before = Recipe(
            advantage=recipe["advantage"],
            corrected=bool(recipe["correction"]),
            kl_coef=recipe["kl"]["coef"],
            kl_estimator=recipe["kl"]["estimator"],
            kl_in_reward=recipe["kl"]["into"] == "reward",
        )
        self._decode: Callable[[Sequence[int]], str] | None = None  # where calls are credited
        self._dropped = Counter[str]()
        self._totals = {"busy_s": 0.0, "rows_in": 0, "tokens": 0}
        self._since = time.monotonic()

    def address(self) -> tuple[str, int]:
        """Where rank 0 listens for the others."""
        from learners.world import free_port

        host = ray.util.get_node_ip_address() if self._ranks > 1 else "127.0.0.1"
        return host, free_port(host)

    def setup(self, address: tuple[str, int], tag: str | None) -> int:
        """Load model, optimiser and, with `tag`, a checkpoint; returns the optimiser steps done."""
        from learners.engine import Learner

        model = fetched(self._model)
        self._learner = Learner(
            model,
            reference=model if self._before.kl_coef > 0 else None,
            rank=self._rank,
            world_size=self._ranks,
            master_addr=address[0],
            master_port=address[1],
            **self._options,
        )
        if self._recipe["credit_calls"] > 0:
            from transformers import AutoTokenizer

            # As vLLM does, whose text the calls' places are of.
            self._decode = partial(
                AutoTokenizer.from_pretrained(model).decode,
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        adapter = self._recipe["adapter"]
        self._weights = self._learner.adapter if adapter else self._learner.weights
        self._sender: Sender = Publisher(self._hub, self._rank, self._learner.adapter_config if adapter else "")
        if tag is not None:
            self._step = int(self._learner.load(*self._checkpoints.fetched(tag))["step"])
            self._best = (self._checkpoints.committed() or {}).get("best")
            self._led(lambda: self._serve(tag))
            self._publish()  # no engine is there yet: they pull
        if (weights := self._recipe["weights"]) != "host":
            from actors.weight_senders import DirectSender  # imports vLLM

            self._first = self._sender  # keeps its memory: engines on other nodes pull from it whenever they start
            self._sender = DirectSender(weights, self._hub, self._rank, self._ranks)
        self._make_room()
        return self._step

    def start(self) -> None:
        """Learn in a thread of its own until all steps are done."""
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ping(self) -> dict[str, float]:
        """How it is; raises what ended it."""
        if self._error is not None:
            raise RuntimeError(
                f"learner rank {self._rank} failed after step {self._step}: {type(self._error).__name__}: {self._error}"
            ) from self._error
        return self._totals | {"step": self._step, "alive_s": time.monotonic() - self._since}

    def apply(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(self, *args, **kwargs)

    def history(self, since: int) -> list[dict[str, float]]:
        """Metrics of the optimiser steps from index `since` on."""
        return self._history[since:]

    def _run(self) -> None:
        try:
            with together(self._rank, self._ranks):
                while self._step < self._recipe["steps"]:
                    self._one_step()
        except BaseException as error:
            self._error = error
            raise

    def _one_step(self) -> None:
        started = time.monotonic()
        plan, tokens, stats = self._led(self._plan)
        if self._recipe["turns"]:
            self._led(self._rest)
        waited = time.monotonic() - started
        mine = self._read(plan)
        learnt, advantages = take_step(self._learner, plan, mine, self._before, self._credit(plan, mine))
        self._step += 1
        published = time.monotonic()
        self._publish()
        publish_s = time.monotonic() - published
        self._led(lambda: self._acknowledge(tokens, advantages))
        self._rewards.append(stats["reward"])
        if self._step % self._recipe["checkpoint_every"] == 0 or self._step == self._recipe["steps"]:
            self._checkpoint()
        self._report(stats | learnt, len(advantages), time.monotonic() - started, waited, publish_s)

    def _plan(self) -> Agreed:
        """Claim groups until a step is full, and deal them into minibatches."""
        now = self._version()
        claims: list[Claim] = []
        groups: dict[str, list[dict[str, Any]]] = {}
        extended = time.monotonic()
        while len(groups) < self._recipe["prompts_per_step"]:
            claim = self._store.now(
                self._store.claim(
                    "scored",
                    limit=self._recipe["prompts_per_step"] - len(groups),
                    by_group=True,
                    purpose="train",
                    lease_s=LEASE_S,
                    columns=[*CHOICE_COLUMNS, "versions", "components", *(CREDIT_COLUMNS if self._decode else [])],
                    version=now,
                    max_staleness=self._recipe["max_staleness"],
                    wait_s=5.0,
                )
            )
            if time.monotonic() - extended > LEASE_S / 10:
                extended = time.monotonic()
                for held in claims:
                    self._store.now(self._store.extend(held.token, LEASE_S))
            if claim is not None:
                claims.append(claim)
                groups |= self._valid(claim)
        plan, stats = self._deal(groups, now)
        return plan, [c.token for c in claims], stats

    def _valid(self, claim: Claim) -> dict[str, list[dict[str, Any]]]:
        """Rows by group, of those that the step may learn from; the others end here, with their reasons."""
        answers = _answers(claim.rows)
        rows = {r["trajectory"]: r for r in claim.rows.drop_columns(["logprobs", "mask"]).to_pylist()}
        groups: dict[str, list[Answer]] = {}
        for name, row in rows.items():
            groups.setdefault(row["group"], []).append(answers[name])
        recipe = self._recipe
        kept, ends = chosen(groups, need_spread=recipe["dynamic_sampling"], need_end=recipe["overlong"]["masked"])
        if ends:
            self._store.now(self._store.ack(claim.token, ends))
        self._dropped["samples"] += sum(status == "dropped_data" for status, _ in ends.values())
        self._dropped["groups"] += len(groups) - len(kept)
        return {group: [rows[a.trajectory] | {"answer": a} for a in of] for group, of in kept.items()}

    def _deal(self, groups: Mapping[str, list[dict[str, Any]]], now: int) -> tuple[StepPlan, dict[str, float]]:
        """The plan of a step over these groups, and what the step says of itself."""
        recipe, long = self._recipe, self._recipe["overlong"]
        rng = random.Random(f"{recipe['seed']}/{self._step}")
        rows = [r for of in groups.values() for r in of]
        if recipe["shuffled"]:
            rewards = [r["reward"] for r in rows]
            rng.shuffle(rewards)
            for row, reward in zip(rows, rewards, strict=True):
                row["reward"] = reward
        for row in rows:
            row["fine"] = long["penalty"] * overlong(row["answer"].tokens, recipe["max_tokens"], long["buffer"])
        dealt = [[r["trajectory"] for r in of] for of in groups.values()]
        plan = StepPlan(
            [[(r["trajectory"], r["reward"] + r["fine"], r["answer"].charged) for r in of] for of in groups.values()],
            [part for _ in range(recipe["passes"]) for part in self._minibatches(dealt, rng)],
            {r["trajectory"] for r in rows if long["masked"] and r["answer"].cut_off},
            self._credits(groups.values()),
        )
        stats = _stats(rows, now) | {f"{what}_dropped": self._dropped[what] for what in ("groups", "samples")}
        stats["equal_rewards"] = statistics.fmean(without_spread([r["reward"] for r in of]) for of in groups.values())
        self._dropped.clear()
        return plan, stats

    def _minibatches(self, dealt: list[list[str]], rng: random.Random) -> list[list[str]]:
        """Groups dealt into `updates_per_step` minibatches, in an order of their own each pass."""
        n, order = self._recipe["updates_per_step"], rng.sample(dealt, len(dealt))
        return [[name for group in order[i::n] for name in group] for i in range(n)]

    def _read(self, plan: StepPlan) -> dict[str, Sample]:
        """This rank's samples."""
        mine = plan.share(*self._learner.shard)
        rows = self._store.now(self._store.get(mine, TOKEN_COLUMNS)).to_pylist() if mine else []
        return {r["trajectory"]: Sample(**{c: r[c] for c in TOKEN_COLUMNS}) for r in rows}

    def _credits(self, groups: Iterable[list[dict[str, Any]]]) -> dict[str, list[Credit]]:
        """What the calls of the step's samples are credited with."""
        if self._decode is None:
            return {}
        coef = self._recipe["credit_calls"]
        of = [of_group({r["trajectory"]: _scored_calls(r) for r in rows}, coef) for rows in groups]
        return {name: credits for group in of for name, credits in group.items()}

    def _credit(self, plan: StepPlan, mine: Mapping[str, Sample]) -> dict[str, np.ndarray]:
        """What the calls of this rank's samples add to their tokens."""
        credited = [name for name in mine if name in plan.credits]
        if not credited or self._decode is None:
            return {}
        texts = self._store.now(self._store.get(credited, ["text"]))["text"].to_pylist()
        return {
            name: by_token(plan.credits[name], text, mine[name].token_ids.tolist(), self._decode)
            for name, text in zip(credited, texts, strict=True)
        }

    def _publish(self) -> None:
        """Engines that sleep wake up over it."""
        self._make_room()
        self._sender.publish(self._version(), self._stream)

    def _stream(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights()
        self._make_room()

    def _rest(self) -> None:
        """Let the engines sleep; no document is under way then, as `max_staleness` is 0."""
        try:
            ray.get(self._hub.rest.remote(), timeout=SLEEP_S + ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(str(error.cause)) from error

    def _make_room(self) -> None:
        """All ranks leave their spare memory to the engines, whose turn it is."""
        if self._recipe["turns"]:
            self._learner.release()
            self._meet()

    def _acknowledge(self, tokens: Iterable[int], advantages: Mapping[str, float]) -> None:
        ends = {name: ("trained", "") for name in advantages}
        for token in tokens:
            self._store.now(self._store.ack(token, ends, step=self._step, advantages=advantages))

    def _checkpoint(self) -> None:
        """Save on all ranks; then commit the manifest as the one point that a resume trusts."""
        tag = f"step{self._step:06d}.{self._incarnation}"
        with self._checkpoints.writing(tag) as (folder, name):
            self._learner.save(folder, name, {"step": self._step})
        self._learner.export(f"{self._checkpoints.url}/{tag}/policy", fetched(self._model))
        self._meet()  # every rank's part is in place
        self._led(lambda: self._commit(tag))
        self._make_room()
        self._rewards.clear()

    def _commit(self, tag: str) -> None:
        """Make a checkpoint, every part of which is in place, the one that counts; remove what is not needed then."""
        reward = statistics.fmean(self._rewards)
        if self._best is None or reward > self._best["reward"]:
            self._best = {"tag": tag, "reward": reward}
        manifest = {
            "tag": tag,
            "step": self._step,
            "incarnation": self._incarnation,
            "cursor": self._store.now(self._store.state("train"))["groups"]["accepted"],
            "store": self._store.now(self._store.version()),
            "best": self._best,
        }
        self._checkpoints.commit(manifest, self._incarnation)
        self._serve(tag)
        self._checkpoints.keep(self._recipe["keep"], self._best["tag"])
        self._store.now(self._store.collect(self._recipe["retention"], self._step), COLLECT_S)

    def _serve(self, tag: str) -> None:
        """Make the policy of a checkpoint the run's."""
        copy(f"{self._checkpoints.url}/{tag}/policy", self._policy)

    def _report(self, step: Mapping[str, float], trained: int, step_s: float, wait_s: float, publish_s: float) -> None:
        tokens = step["tokens"]
        row = {
            "step": self._step,
            **step,
            "step_s": step_s,
            "wait_s": wait_s,
            "publish_s": publish_s,
            "time": time.time(),
        }
        self._totals["busy_s"] += step_s - wait_s
        self._totals["tokens"] += int(tokens)
        self._totals["rows_in"] += trained
        self._history.append(row)
        if self._rank == 0:
            metrics.gauge("reward", row["reward"])
            metrics.gauge("staleness", row["staleness"])
            metrics.gauge("tokens_per_second", tokens / max(step_s - wait_s, 1e-9), stage="learn")
            metrics.gauge("policy_version", self._step, stage="learn")
            metrics.count("tokens", tokens, stage="learn")
            metrics.observe("seconds", step_s, stage="learn")
            metrics.count("rows_in", trained, stage="learn")
            metrics.count("busy_seconds", step_s - wait_s, stage="learn")

    def _version(self) -> int:
        return version(self._incarnation, self._step)

    def _meet(self) -> None:
        """Wait for the other ranks."""
        if self._ranks > 1:
            import torch.distributed as dist

            dist.barrier()

    def _led(self, work: Callable[[], T]) -> T:
        """What rank 0 does alone, and the others wait for."""
        return led(work, self._rank, self._ranks)


def _answers(rows: pa.Table) -> dict[str, Answer]:
    columns = (rows.column(name) for name in ("trajectory", *CHOICE_COLUMNS))
    return {
        name.as_py(): answer(
            name.as_py(), reward.as_py(), finish.as_py(), np.asarray(logprobs.values), np.asarray(mask.values)
        )
        for name, reward, finish, logprobs, mask in zip(*columns, strict=True)
    }


def _scored_calls(row: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """Where the tags of a document are in its text, and what their calls are worth, if that is known."""
    scores = dict(row["components"])
    return [(c["start"], c["end"], scores[f"{CALL}{i}"]) for i, c in enumerate(row["calls"]) if f"{CALL}{i}" in scores]


def _stats(rows: list[dict[str, Any]], now: int) -> dict[str, float]:
    """Means over the samples of a step."""
    ages = [staleness(now, min(r["versions"], default=now)) for r in rows]
    components = [dict(r["components"]) for r in rows]
    names = sorted({name for c in components for name in c if not name.startswith(CALL)})
    return {
        "reward": statistics.fmean(r["reward"] for r in rows),
        "staleness": statistics.fmean(ages),
        "staleness_max": max(ages),
        "response_tokens": statistics.fmean(r["answer"].tokens for r in rows),
        "cut_off": statistics.fmean(r["answer"].cut_off for r in rows),
        "overlong": statistics.fmean(r["fine"] for r in rows),
        # Over the samples that have it: a document without a picture has no mark for pictures.
        **{f"reward/{k}": statistics.fmean(c[k] for c in components if k in c) for k in names},
    }
