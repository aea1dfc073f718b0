"""A vLLM engine inside an actor: construction, one request, and the swap of its weights under running requests."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replay.folders import fetched

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # pinned cores fight with everything else on the node
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # with `uni`: one process less, half the start-up
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


KV_CACHE_BYTES = 256 << 20  # on CPU; without a bound vLLM takes a share of all memory and a second engine fails


@dataclass(frozen=True)
class Completion:
    """One sampled answer: token ids as sampled, and a log-prob and a policy version for each."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    text: str
    finish: str


class Engine:
    """vLLM's AsyncLLM with versioned weights.

    Args:
        model: folder, `s3://...` or hub name of a Hugging Face model.
        version: policy version of those weights.
        options: vLLM's own engine arguments, passed through untouched.
    """

    def __init__(self, model: str, version: int, options: Mapping[str, Any]) -> None:
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
            "weight_transfer_config": {"backend": "llmi_file"},
            "worker_extension_cls": "actors.weight_transfer.WorkerExtension",
            "enable_log_requests": False,
        }
        self.version = version
        self._adapter: Any = None
        self._adapters = 0
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**(ours | ({} if torch.cuda.is_available() else cpu) | dict(options)))
        )
        self.tokenizer = self._llm.get_tokenizer()

    async def start(self) -> None:
        """Name the weights, ready the transfer, and pay for the slow first request."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await self._llm.update_weight_version(str(self.version))
        await self.complete("warm-up", [self.tokenizer.bos_token_id or 0], {"max_tokens": 8})

    def prompt_ids(self, question: str, system: str = "") -> list[int]:
        """Tokens of a prompt up to where the answer begins: the question, after the system prompt if there is one."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    async def complete(self, request: str, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Completion:
        """Sample one answer.

        Args:
            request: unique name.
            prompt_ids: tokens of the prompt.
            sampling: vLLM's SamplingParams.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        adapter, version = self._adapter, self.version
        prompt = {"prompt_token_ids": prompt_ids}
        async for output in self._llm.generate(prompt, params, request, lora_request=adapter):
            final = output
        out = final.outputs[0]
        ids = list(out.token_ids)
        versions = self._versions(out) if adapter is None else [version] * len(ids)
        return Completion(ids, list(out.logprobs.logprobs)[: len(ids)], versions, out.text, out.finish_reason)

    async def update(self, path: Path, version: int) -> float:
        """Swap the weights under running requests; they go on, their caches recomputed. Returns seconds of pause."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        started = time.monotonic()
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"path": str(path)}))
            await self._llm.finish_weight_update(str(version))
            self.version = version
        finally:
            await self._llm.resume_generation()
        return time.monotonic() - started

    async def adopt(self, folder: Path, version: int) -> None:
        """Sample with this LoRA adapter from now on; requests under way end with the one that they began with.

        Needs the engine argument `enable_lora`. vLLM lets go of adapters that nobody uses; while one is used, its
        folder must stay.

        Args:
            folder: in PEFT's format, another one for every version: vLLM's caches go by name and path.
            version: of the policy that this makes.

        Raises:
            RuntimeError: vLLM did not take it.
        """
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        adapter = LoRARequest(f"policy-{version}", self._adapters, str(folder))
        if not await self._llm.add_lora(adapter):
            raise RuntimeError(f"vLLM did not take the adapter in '{folder}'")
        self._adapter, self.version = adapter, version

    async def abort(self, request: str) -> None:
        await self._llm.abort(request)

    def close(self) -> None:
        self._llm.shutdown()

    def _versions(self, out: Any) -> list[int]:
        spans = out.weight_versions or []
        versions = [self.version] * len(out.token_ids)
        for span in spans:
            versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
        return versions
