"""A vLLM engine inside an actor: construction, one request, and the swap of its weights under running requests."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from actors.buckets import Bucket, Reader, tensors
from replay.folders import fetched
from tools.tether import tie

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # pinned cores fight with everything else on the node
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # with `uni`: one process less, half the start-up
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


T = TypeVar("T")

KV_CACHE_BYTES = 256 << 20  # on CPU; without a bound vLLM takes a share of all memory and a second engine fails
CALL_S = 600.0  # a call of the engine's process has an answer by then, also one that loads the largest weights
WATCH_S = 30.0  # between two looks whether the engine's process still answers

#: Backend of the weights -> name of vLLM's weight transfer. The host's is ours (`actors/weight_transfer.py`).
TRANSFERS = {"host": "llmi_host", "nccl": "nccl", "ipc": "ipc"}


class EngineDied(RuntimeError):
    """The engine's process is gone or does not answer; whoever needs it starts another."""


class PromptRefused(ValueError):
    """The engine cannot go on from this prompt: it is too long, say."""


class WeightsRefused(RuntimeError):
    """The engine cannot load weights. It holds parts of two versions now, and stays paused."""


@dataclass(frozen=True, eq=False)
class _Adapter:
    """A LoRA adapter in vLLM. Its folder is there as long as this object is: vLLM may read it again meanwhile."""

    version: int
    request: Any


@dataclass(frozen=True)
class Completion:
    """One sampled answer: token ids as sampled, and a log-prob and a policy version for each."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    text: str
    finish: str


class Piece(NamedTuple):
    """More of an answer: text, tokens, a log-prob for each if asked for; and why it ended if this is its last."""

    text: str
    token_ids: Sequence[int]
    finish: str
    logprobs: Sequence[float] = ()


class Engine:
    """vLLM's AsyncLLM with versioned weights.

    Args:
        model: folder, `s3://...` or hub name of a Hugging Face model.
        version: policy version of those weights.
        options: vLLM's own engine arguments, passed through untouched.
        weights: backend that new weights come by, a key of `TRANSFERS`.
    """

    def __init__(self, model: str, version: int, options: Mapping[str, Any], weights: str = "host") -> None:
        import torch
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        cpu = {
            "distributed_executor_backend": "uni",
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "enable_chunked_prefill": False,  # a chunk of a seeded request ends in "CPU Generator does not use offset"
        }
        ours = {
            "model": fetched(model),
            "logprobs_mode": "processed_logprobs",  # those that were sampled from
            "weight_transfer_config": {"backend": TRANSFERS[weights]},
            "worker_extension_cls": "actors.weight_transfer.WorkerExtension",  # which is a tether's, too
            "enable_log_requests": False,
        }
        here = dict(options)
        if not torch.cuda.is_available():  # where vLLM refuses it: `sleep` then pauses, and frees no memory
            here = cpu | here | {"enable_sleep_mode": False}
        if weights == "ipc":  # its handles reach the engine's process as pickles
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        self.version, self._weights = version, weights
        self.mapped_at = 0.0  # when the engine's process had mapped the newest weights (`time.monotonic`)
        self._adapter: _Adapter | None = None
        self._adapters = 0  # that there have been
        self._asleep = False
        tie()
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**(ours | here)))
        self.tokenizer = self._llm.get_tokenizer()

    @property
    def ranks(self) -> int:
        """Processes that hold a part of the weights each."""
        return self._llm.vllm_config.parallel_config.world_size

    async def start(self) -> None:
        """Name the weights, ready the transfer, and pay for the slow first request."""
        if self._weights == "host":
            await self.transfer("init_weight_transfer_engine", {})
        await self._answer(self._llm.update_weight_version(str(self.version)))
        await self.complete("warm-up", [self.tokenizer.bos_token_id or 0], {"max_tokens": 8})

    def prompt_ids(self, question: str, system: str = "") -> list[int]:
        """Tokens of a prompt up to where the answer begins: the question, after the system prompt if there is one."""
        messages = [{"role": "system", "content": system}] if system else []
        return self.chat_ids([*messages, {"role": "user", "content": question}])

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation, `role` and `content` each, up to where the next answer begins."""
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    async def complete(self, request: str, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Completion:
        """Sample one answer.

        Args:
            request: unique name.
            prompt_ids: tokens of the prompt.
            sampling: vLLM's SamplingParams.

        Raises:
            PromptRefused: such a prompt has no answer.
            EngineDied: before there was one.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        adapter = self._adapter  # which the whole answer is made with
        out = (await self._generate(request, prompt_ids, params, adapter)).outputs[0]
        ids = list(out.token_ids)
        versions = [adapter.version] * len(ids) if adapter else self._versions(out)
        return Completion(ids, list(out.logprobs.logprobs)[: len(ids)], versions, out.text, out.finish_reason)

    async def stream(
        self, request: str, prompt_ids: list[int], sampling: Mapping[str, Any], logprobs: bool = False
    ) -> AsyncGenerator[Piece, None]:
        """One answer piece by piece as it is sampled. Arguments are those of `complete`; log-probs take time."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        more = {"logprobs": 0, "flat_logprobs": True} if logprobs else {}
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, **more, **sampling)
        async with aclosing(self._outputs(request, prompt_ids, params, self._adapter)) as outputs:
            async for output in outputs:
                piece = output.outputs[0]
                ids = list(piece.token_ids)
                odds = list(piece.logprobs.logprobs)[: len(ids)] if logprobs else ()
                yield Piece(piece.text, ids, piece.finish_reason or "", odds)

    async def score(self, request: str, token_ids: list[int]) -> list[float]:
        """Log-probs of all tokens but the first under the engine's weights, at temperature 1, without sampling.

        Not with an adapter: vLLM's kernels for CPUs end the engine over it.
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        rows = (await self._generate(request, token_ids, params, None)).prompt_logprobs[1:]
        return [row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True)]

    async def update(self, buckets: Sequence[Bucket], version: int, adapter: str = "") -> float:
        """Swap the weights under running requests; they go on, their caches recomputed. Returns seconds of pause.

        An adapter is for new requests: those under way end with the one that they began with, and nothing is paused.

        Args:
            buckets: of this node, which stay as they are meanwhile.
            version: of the policy.
            adapter: PEFT's adapter_config.json, if the buckets hold an adapter; it needs vLLM's `enable_lora`.

        Raises:
            WeightsRefused: the weights are not the model's.
            EngineDied: in the middle of it.
        """
        await self._wake()
        if adapter:
            await self._adopt(buckets, version, adapter)
            return 0.0
        content = [bucket.plain() for bucket in buckets]
        self.mapped_at = max(await self._answer(self._llm.collective_rpc("map_weights", args=(content,))))
        started = time.monotonic()
        try:
            await self.transfer("start_weight_update")
            await self.transfer("update_weights", {"buckets": content})
            await self.transfer("finish_weight_update", version=version)
        except EngineDied:
            raise
        except Exception as error:
            why = str(error).removeprefix("Call to collective_rpc method failed: ")
            raise WeightsRefused(f"the engine cannot load version {version}: {why}") from error
        return time.monotonic() - started

    async def _adopt(self, buckets: Sequence[Bucket], version: int, config: str) -> None:
        """vLLM reads adapters from folders, and tells them apart by number, name and path."""
        from vllm.lora.request import LoRARequest

        folder = Path(tempfile.mkdtemp(prefix="llmi-adapter-"))
        self._adapters += 1
        adapter = _Adapter(version, LoRARequest(f"policy-{version}", self._adapters, str(folder)))
        weakref.finalize(adapter, shutil.rmtree, folder, ignore_errors=True)
        await asyncio.to_thread(_write_adapter, folder, config, buckets)
        try:
            await self._answer(self._llm.add_lora(adapter.request))
        except EngineDied:
            raise
        except Exception as error:
            raise WeightsRefused(f"the engine cannot load the adapter of version {version}: {error}") from error
        self._adapter, self.version = adapter, version

    async def transfer(self, step: str, info: Mapping[str, Any] | None = None, version: int | None = None) -> None:
        """One step of vLLM's weight transfer. Requests are paused from `start_weight_update` to `finish_weight_update`.

        Args:
            step: name of the method.
            info: what it takes.
            version: of the weights that are finished.

        Raises:
            EngineDied: before it answered.
        """
        from vllm.distributed.weight_transfer import base

        if step == "init_weight_transfer_engine":
            await self._answer(self._llm.init_weight_transfer_engine(base.WeightTransferInitRequest(dict(info or {}))))
        elif step == "start_weight_update":
            await self._wake()
            await self._answer(self._llm.pause_generation(mode="keep", clear_cache=True))
            await self._answer(self._llm.start_weight_update())
        elif step == "update_weights":
            await self._answer(self._llm.update_weights(base.WeightTransferUpdateRequest(dict(info or {}))))
        elif step == "finish_weight_update" and version is not None:
            await self._answer(self._llm.finish_weight_update(str(version)))
            self.version = version
            await self._answer(self._llm.resume_generation())
        else:
            raise ValueError(f"no step {step!r} of a weight transfer with version {version}")

    async def sleep(self) -> None:
        """Give the accelerator's memory away until the next update. Requests under way are kept and go on after it.

        It needs vLLM's `enable_sleep_mode`. Weights go to the host's memory: dropped ones (level 2) would have to come
        whole, and those below an adapter never come again.

        Raises:
            EngineDied: before it slept.
        """
        self._asleep = True
        await self._answer(self._llm.sleep(level=1, mode="keep"))

    async def watch(self) -> None:
        """Look for ever whether the engine's process answers between its steps. Raises EngineDied once it does not."""
        while True:
            await asyncio.sleep(WATCH_S)
            await self._answer(self._llm.is_paused())

    def check(self) -> None:
        """Raises EngineDied where nothing would be answered any more."""
        if self._llm.errored:
            raise EngineDied("the engine's process died")

    async def abort(self, request: str) -> None:
        await self._llm.abort(request)

    def close(self) -> None:
        self._llm.shutdown()

    async def _wake(self) -> None:
        if not self._asleep:
            return
        try:
            await self._answer(self._llm.wake_up())
        except EngineDied:
            raise
        except Exception as error:
            raise RuntimeError(f"the engine cannot wake up beside the learner (see `--dry-run`): {error}") from error
        self._asleep = False

    async def _generate(self, request: str, prompt_ids: list[int], params: Any, adapter: _Adapter | None) -> Any:
        async for output in self._outputs(request, prompt_ids, params, adapter):
            final = output
        return final

    async def _outputs(
        self, request: str, prompt_ids: list[int], params: Any, adapter: _Adapter | None
    ) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt, lora = {"prompt_token_ids": prompt_ids}, adapter.request if adapter else None
        try:
            async for output in self._llm.generate(prompt, params, request, lora_request=lora):
                yield output
        except EngineDeadError as error:
            raise EngineDied("the engine's process died") from error
        except VLLMClientError as error:
            raise PromptRefused(str(error)) from error

    async def _answer(self, call: Awaitable[T]) -> T:
        """vLLM lets callers of a dead engine wait for ever: look every second whether it lives."""
        from vllm.v1.engine.exceptions import EngineDeadError

        task, deadline = asyncio.ensure_future(call), time.monotonic() + CALL_S
        try:
            while not (await asyncio.wait({task}, timeout=1.0))[0]:
                if self._llm.errored:
                    raise EngineDied("the engine's process died")
                if time.monotonic() > deadline:
                    raise EngineDied(f"the engine's process did not answer in {CALL_S:g} s")
            return task.result()
        except EngineDeadError as error:
            raise EngineDied("the engine's process died") from error
        finally:
            task.cancel()

    def _versions(self, out: Any) -> list[int]:
        spans = out.weight_versions or []
        versions = [self.version] * len(out.token_ids)
        for span in spans:
            versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
        return versions


def _write_adapter(folder: Path, config: str, buckets: Sequence[Bucket]) -> None:
    from learners.lora import write_adapter

    contents = Reader().map(b.path for b in buckets)
    write_adapter(
        folder, config, dict(pair for b, c in zip(buckets, contents, strict=True) for pair in tensors(c, b.pieces))
    )
