"""The `diffusion` tool: a picture from words, by any diffusers text-to-image pipeline.

The noise is seeded by (seed, prompt) and drawn on the CPU, so the same call gives the same picture wherever it runs.
The default model is the small one of the tree, which `learners/scenes_diffusion.py` trains: it knows drawn scenes.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.spec import PUBLISHED
from replay.record import Blob
from tools.base import CallFailed, ToolResult

#: The model that the tree carries, relative to the tree's root.
SCENES = "tools/weights/scenes"
_ROOT = Path(__file__).resolve().parent.parent


class DiffusionTool:
    """Draws with one pipeline, one picture at a time.

    Args:
        model: a folder that `DiffusionPipeline.save_pretrained` wrote (a relative one is looked for in the working
            directory, then in this tree), or a name on the Hugging Face hub.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 turns it off.
        size: width and height in pixels, a multiple of 8; None is the model's own.
        seed: another seed gives other pictures for the same prompts.
        threads: CPU threads of a picture.

    Raises:
        FileNotFoundError: `model` is a path without a pipeline.
        ValueError: an option is out of range, or `model` is no text-to-image pipeline.
    """

    spec = PUBLISHED["diffusion"]

    def __init__(
        self,
        model: str = SCENES,
        steps: int = 8,
        guidance: float = 2.0,
        size: int | None = None,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        if steps < 1 or threads < 1:
            raise ValueError(f"steps and threads of the diffusion tool must be at least 1, not {steps} and {threads}")
        if size is not None and (size < 8 or size % 8):
            raise ValueError(f"size of the diffusion tool must be a positive multiple of 8, not {size}")
        self._model, self._seed, self._threads = model, seed, threads
        self._pipeline = _load(model)
        self._options = _options(self._pipeline, steps, guidance, size)
        self._said = {"model": model, "steps": steps, "guidance": guidance}
        self._lock = threading.Lock()  # a pipeline's scheduler holds the state of the picture it works on

    def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> ToolResult:
        """Draw `params["prompt"]`.

        What a prompt has beyond the tokenizer's limit is not drawn; provenance then says `truncated`.

        Raises:
            CallFailed: the prompt is empty.
        """
        import torch  # heavy, and loaded by now

        prompt = str(params["prompt"]).encode("utf-8", "replace").decode().strip()
        if not prompt:
            raise CallFailed("the prompt of a diffusion call is empty: say what the picture shows")
        seed = picture_seed(self._seed, prompt)
        with self._lock, torch.inference_mode():
            torch.set_num_threads(self._threads)
            noise = torch.Generator("cpu").manual_seed(seed)
            picture = self._pipeline(prompt=prompt, generator=noise, **self._options).images[0]
            truncated = _too_long(self._pipeline, prompt)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        provenance = {**self._said, "seed": seed} | ({"truncated": True} if truncated else {})
        return ToolResult((Blob(buffer.getvalue()),), provenance)


def picture_seed(seed: int, prompt: str) -> int:
    """The seed (32 bits) of one picture."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:4], "big")


def silence() -> None:
    """Turn off the progress bars and the advice of diffusers and transformers, in this process."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _load(model: str) -> Any:
    """The pipeline, silent, on the GPU in bfloat16 if there is one, else on the CPU in float32."""
    source = _find(model)
    import torch  # here and not above: listing the tools must not cost seconds

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # diffusers imports DeepSpeed, which else probes for devices
    import diffusers

    silence()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            source,
            dtype=torch.bfloat16 if gpu else torch.float32,
            safety_checker=None,
            local_files_only=Path(source).is_dir(),
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the diffusion model {model!r} cannot be loaded: {first}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if gpu else "cpu")


def _find(model: str) -> str:
    """The folder of `model`, or `model` itself where it is a hub name."""
    folders = (Path(model).expanduser(), _ROOT / model)
    for folder in folders:
        if (folder / "model_index.json").is_file():
            return str(folder)
    if model.count("/") == 1 and model[0] not in "./~" and not any(f.exists() for f in folders):
        return model
    raise FileNotFoundError(
        f"no diffusion model in {model!r}: train the small one with `python -m learners.scenes_diffusion {SCENES}`, "
        "or set `model` to a folder with a model_index.json or to a hub name (owner/name)"
    )


def _options(pipeline: Any, steps: int, guidance: float, size: int | None) -> dict[str, Any]:
    """The call's keyword arguments; pipelines differ in what they call guidance."""
    known = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in known or "num_inference_steps" not in known:
        raise ValueError(f"{type(pipeline).__name__} draws no picture from a prompt: choose a text-to-image model")
    options: dict[str, Any] = {"num_inference_steps": steps}
    if "true_cfg_scale" in known and known["guidance_scale"].default is None:  # the Qwen-Image family
        options |= {"true_cfg_scale": guidance, "negative_prompt": " "}
    elif "guidance_scale" in known:
        options["guidance_scale"] = guidance
    return options if size is None else options | {"width": size, "height": size}


def _too_long(pipeline: Any, prompt: str) -> bool:
    """Whether the only tokenizer of the pipeline has a limit and cuts the prompt there."""
    tokenizer = getattr(pipeline, "tokenizer", None)
    if tokenizer is None or hasattr(pipeline, "tokenizer_2"):
        return False
    return len(tokenizer(prompt).input_ids) > tokenizer.model_max_length
