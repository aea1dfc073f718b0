"""Finding and loading a diffusers pipeline: as it is, or as the editor that its parts make."""

from __future__ import annotations

import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

#: The model that the tree carries, relative to the tree's root.
SCENES = "tools/weights/scenes"
_ROOT = Path(__file__).resolve().parent.parent
_QWEN_PROCESSORS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")


def silence() -> None:
    """Turn off the progress bars and the advice of diffusers and transformers, in this process."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load(model: str, edits: bool, offload: bool) -> tuple[Any, bool]:
    """A pipeline that makes pictures of words, or `edits` pictures; silent.

    On the GPU in bfloat16 if there is one, else on the CPU in float32.

    Returns:
        The pipeline, and whether it may run in PyTorch's inference mode (one that moves its parts about may not).

    Raises:
        FileNotFoundError: `model` is a path without a pipeline.
        ValueError: it cannot be loaded, or does not do this.
    """
    source = _find(model)
    import torch  # here and not above: listing the tools must not cost seconds

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # diffusers imports DeepSpeed, which else probes for devices
    import diffusers

    silence()
    dtype = torch.bfloat16 if gpu else torch.float32
    local = Path(source).is_dir()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            source, dtype=dtype, safety_checker=None, local_files_only=local, **_processor(source, local)
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the diffusion model {model!r} cannot be loaded: {first}") from error
    pipeline = _editor(pipeline, dtype) if edits else _drawer(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if gpu and offload:
        pipeline.enable_model_cpu_offload()
        return pipeline, False
    return pipeline.to("cuda" if gpu else "cpu"), True


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


def _drawer(pipeline: Any) -> Any:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    known, name = _parameters(pipeline), type(pipeline).__name__
    if not {"prompt", "num_inference_steps"} <= known:
        raise ValueError(f"{name} draws no picture from a prompt: choose a text-to-image model")
    if "image" in known and type(pipeline) not in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        raise ValueError(f"{name} edits pictures and draws none from words alone: use it as `edit-diffusion`")
    return pipeline


def _editor(pipeline: Any, dtype: Any) -> Any:
    """The pipeline itself if it takes a picture, else the image-to-image one of the same parts."""
    from diffusers import AutoPipelineForImage2Image

    if "image" not in _parameters(pipeline):
        try:
            pipeline = AutoPipelineForImage2Image.from_pipe(pipeline, dtype=dtype)
        except ValueError as error:
            name = type(pipeline).__name__
            raise ValueError(f"{name} edits no picture: choose an editing or an image-to-image model") from error
    if not {"prompt", "image", "num_inference_steps"} <= _parameters(pipeline) or "mask_image" in _parameters(pipeline):
        raise ValueError(f"{type(pipeline).__name__} edits no whole picture by words: choose an editing model")
    return pipeline


def _parameters(pipeline: Any) -> set[str]:
    return set(inspect.signature(pipeline.__call__).parameters)


def _processor(source: str, local: bool) -> dict[str, Any]:
    """The processor of the Qwen-Image-Edit family without its half for video, which nothing but torchvision loads."""
    if importlib.util.find_spec("torchvision"):
        return {}
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(source, local_files_only=local)
    if index.get("processor", ("", ""))[1] not in _QWEN_PROCESSORS:
        return {}
    from transformers import Qwen2VLProcessor

    class PictureProcessor(Qwen2VLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    return {"processor": PictureProcessor.from_pretrained(source, subfolder="processor", local_files_only=local)}
