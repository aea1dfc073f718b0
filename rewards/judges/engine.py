"""A judge's model in a vLLM engine of this process: any model that vLLM serves, on one accelerator or several.

Answers are constrained to the schema. The rubric comes first in every prompt, so that the engine computes it once;
documents that are judged at the same time are one batch.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from replay.folders import fetched
from rewards.base import JudgeFailed
from rewards.judges.answers import Answer, Token, TooLong, refused
from rewards.judges.content import as_pillow
from rewards.judges.model import Asked, Message
from tools.tether import tie

LIKELY = 20  # tokens in the place of each whose log-probs are told: vLLM's own limit
START_S = 1800.0  # loading the largest weights
KV_CACHE_BYTES = 256 << 20  # on CPU, where vLLM would take a share of all memory


class Engine:
    """vLLM's AsyncLLM, and a thread with its event loop.

    Args:
        model: folder, `s3://...` or hub name of an instruct model with a chat template.
        images: pictures of one prompt at most; 0 for a judge that does not see.
        timeout_s: of an answer, with its wait for a place in the batch.
        options: vLLM's own engine arguments (`tensor_parallel_size` and others), passed through untouched.
    """

    def __init__(self, model: str, images: int = 0, timeout_s: float = 55.0, **options: Any) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import torch

        executor = "mp" if options.get("tensor_parallel_size", 1) > 1 else "uni"
        cpu = {"distributed_executor_backend": executor, "enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_BYTES}
        cpu |= {"enable_chunked_prefill": False}  # a chunk of a seeded request ends in an error there
        ours = {"model": fetched(model), "enable_prefix_caching": True, "enable_log_requests": False}
        ours |= {"worker_extension_cls": tie()}
        ours |= {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
        if images:
            ours["limit_mm_per_prompt"] = {"image": images, "video": 0}
        self._options = ours | ({} if torch.cuda.is_available() else cpu) | options
        self._timeout_s, self._sees = timeout_s, images > 0
        self._names = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge engine", daemon=True)
        self._thread.start()
        self._llm: Any = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_S)
        self._template = self._chat_template(str(self._options["model"]))
        self._control = sorted(self._llm.get_tokenizer().get_added_vocab(), key=len, reverse=True)

    def complete(self, asked: Asked) -> Answer:
        """Raises JudgeFailed."""
        waiting = asyncio.run_coroutine_threadsafe(self._answer(asked), self._loop)
        try:
            return waiting.result(self._timeout_s + 5)
        except TimeoutError:
            waiting.cancel()
            raise JudgeFailed(f"the judge's engine did not answer in {self._timeout_s:g} s") from None

    def check(self) -> None:
        if self._llm is None or self._llm.errored:
            raise RuntimeError("the judge's engine died, or was closed")

    def close(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._llm = None

    async def _end(self) -> None:
        self._llm.shutdown()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**self._options))

    async def _answer(self, asked: Asked) -> Answer:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError

        params = SamplingParams(
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            seed=asked.seed if asked.temperature else None,
            logprobs=LIKELY,
            structured_outputs=StructuredOutputsParams(json=dict(asked.schema)),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_special_tokens=False,  # else one in a reason is a token that is not in the text
        )
        name = f"judge-{next(self._names)}"
        try:
            async with asyncio.timeout(self._timeout_s):
                async for output in self._llm.generate(self._prompt(asked.messages), params, name):
                    final = output
        except TimeoutError:
            raise JudgeFailed(f"the judge's engine did not answer in {self._timeout_s:g} s") from None
        except EngineDeadError:
            raise JudgeFailed("the judge's engine died") from None
        except (ValueError, VLLMValidationError) as error:
            raise refused(f"the judge's engine refused the prompt: {error}") from None
        out = final.outputs[0]
        if out.finish_reason == "length" and len(out.token_ids) < asked.max_tokens:
            raise TooLong("the prompt left no room for the judge's answer in the model's context")
        places = list(zip(out.token_ids, out.logprobs or (), strict=False))
        likely = [{p.decoded_token or "": p.logprob for p in place.values()} for _, place in places]
        try:
            texts = self._texts(out.token_ids)
        except Exception:  # no tokenizer of `tokenizers` (Mistral's is another), or bytes that its stream cannot take
            texts = [place[token].decoded_token or "" for token, place in places]
        return Answer(out.text, list(map(Token, texts, likely)))

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text: vLLM's own words for the tokens of a split character do not make it up."""
        tokenizer, stream = self._llm.get_tokenizer()._tokenizer, DecodeStream(skip_special_tokens=False)
        return [stream.step(tokenizer, token) or "" for token in ids]

    def _prompt(self, messages: Sequence[Message]) -> dict[str, Any]:
        chat = [{"role": m.role, "content": self._content(m)} for m in messages]
        template, made = self._template, {"tokenize": False, "add_generation_prompt": True}
        prompt = template.apply_chat_template(chat, **made)
        pictures = [as_pillow(part) for m in messages for part in m.parts if not isinstance(part, str)]
        if pictures:
            return {"prompt": prompt, "multi_modal_data": {"image": pictures}}
        # As ids, since a template has the tokens that a text begins with.
        return {"prompt_token_ids": self._llm.get_tokenizer().encode(prompt, add_special_tokens=False)}

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        if not self._sees:
            return "".join(self._plain(part) for part in message.parts if isinstance(part, str))
        return [
            {"type": "text", "text": self._plain(part)} if isinstance(part, str) else {"type": "image"}
            for part in message.parts
        ]

    def _plain(self, text: str) -> str:
        """Without what this model's tokenizer reads as a control token."""
        for token in self._control:
            if len(token) > 1 and token.strip():
                text = text.replace(token, token[0] + " " + token[1:])
        return text

    def _chat_template(self, model: str) -> Any:
        """What has `apply_chat_template`: the processor of a model that sees may alone have it."""
        tokenizer = self._llm.get_tokenizer()
        if tokenizer.chat_template:
            return tokenizer
        if self._sees:
            from transformers import AutoProcessor

            return AutoProcessor.from_pretrained(model)
        raise ValueError(f"the judge's model {model} has no chat template: name an instruct model")
