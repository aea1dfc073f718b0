"""`llmi sft`: builds and cold-starts a tiny policy, once; a folder that holds a whole policy is left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from huggingface_hub import snapshot_download

from actors.cold_start import ColdStart
from cluster.config import Config, ConfigError
from cluster.console import Progress, say
from cluster.pools import PING_S
from cluster.servers import RunFailed, learner_options
from replay.folders import is_model
from replay.storage import in_bucket


def starting_policy(config: Config, folder: str) -> str:
    """Folder or URL of the policy that a run starts from: given, fetched from the hub, or cold-started in `folder`.

    Raises:
        RunFailed: there is no such model, or the cold start failed.
    """
    name = config.policy.path
    if name is None:
        return cold_start(config, folder)
    if in_bucket(name):
        if not is_model(name):
            raise RunFailed(f"there is no model in {name}, which policy.path names")
        return name
    if Path(name).is_dir():
        return str(Path(name).absolute())
    try:
        return snapshot_download(name)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise RunFailed(f"policy.path {name!r} is neither a folder nor a model that the hub gives: {why}") from None


def cold_start(config: Config, folder: str) -> str:
    """Make the policy of a config in `folder` if it is not there yet; returns the folder.

    Raises:
        ConfigError: the config has nothing to cold-start.
        RunFailed: it failed.
    """
    if config.policy.tiny is None or config.sft is None:
        raise ConfigError("a cold start needs policy.tiny and an sft section")
    if is_model(folder):
        return folder
    say(f"cold start: {config.sft.documents} synthetic documents, right {config.sft.right:.0%} of the time")
    options = learner_options(config.learner, config.sft.threads, alone=True)
    cls: Any = ColdStart
    actor = cls.options(**options, max_concurrency=2).remote()
    run = actor.run.remote(
        folder,
        config.policy.tiny.model_dump(),
        config.sft.model_dump(),
        config.seed,
        config.rollout.max_tokens,
    )
    progress = Progress("cold start step", 1)
    try:
        while not ray.wait([run], timeout=1.0)[0]:
            progress.show_of(*ray.get(actor.progress.remote(), timeout=PING_S))
        ray.get(run)
        progress.show_of(*ray.get(actor.progress.remote(), timeout=PING_S))
    except ray.exceptions.RayTaskError as error:
        raise RunFailed(f"the cold start failed: {error.cause!r}") from error
    except ray.exceptions.GetTimeoutError:
        c = config.learner
        asked = ", ".join(f"{n:g} {what}" for what, n in {"CPU": c.cpus, "GPU": c.gpus, **c.resources}.items() if n)
        raise RunFailed(
            f"waited {PING_S:g} s for the cold start to answer: most often no node has a place for it, which is a "
            f"learner's ({asked}); lower what `learner` asks for, or add a node"
        ) from None
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise RunFailed(
            "the process of the cold start died, most often because memory ran out: lower sft.tokens_per_microbatch"
        ) from error
    finally:
        ray.kill(actor)
    return folder


def small_policy(
    config: Config,
    documents: Callable[[int, int], Iterable[tuple[str, str]]],
    *,
    texts: Iterable[str] = (),
    pieces: Sequence[str] = (),
    ended: bool = True,
) -> str:
    """A tiny policy of a benchmark's own, cold-started in this process; returns its folder, `policy` of the run's.

    Args:
        documents: (how many, seed) -> questions and answers that it learns.
        texts: what its tokenizer learns its merges from besides.
        pieces: strings that are one token each.
        ended: answers end with the end token; a policy that never saw one writes on until it is cut off.

    Raises:
        ConfigError: the config has nothing to cold-start.
    """
    from transformers import AutoTokenizer

    from learners.sft import build_policy, run_sft

    sft, tiny = config.sft, config.policy.tiny
    if sft is None or tiny is None:
        raise ConfigError("this benchmark makes its own policy: it needs policy.tiny and an sft section")
    say("a cold start of the benchmark's own")
    folder, pairs = f"{config.folder}/policy", list(documents(sft.documents, config.seed))
    build_policy(folder, chain(texts, map("\n".join, pairs)), pieces=pieces, **tiny.model_dump(), seed=config.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = [tokenizer.eos_token_id] if ended else []
    docs = [
        (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            ),
            [*tokenizer.encode(text, add_special_tokens=False), *end],
        )
        for question, text in pairs
    ]
    run_sft(
        folder,
        folder,
        docs,
        lr=sft.lr,
        max_steps=sft.documents // sft.documents_per_step,
        docs_per_step=sft.documents_per_step,
        tokens_per_microbatch=sft.tokens_per_microbatch,
        threads=sft.threads,
        seed=config.seed,
    )
    return folder
