"""Weights out of the learner: names as in a Hugging Face checkpoint, and folders that Transformers and vLLM load.

A folder is checked as a reader would before it takes the place of what was there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from learners.checkpoint import listed
from replay.folders import written

#: Files beside the weights that belong to the tokenizer or the image processor.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*processor_config.json",
)


def checkpoint_form(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Undoes what Transformers did to a parameter when it loaded it, such as fusing the experts of a layer.

    Returns:
        Checkpoint names and contiguous copies.
    """
    parts = revert_weight_conversion(model, {name: tensor})
    return {n: part.clone(memory_format=torch.contiguous_format) for n, part in parts.items()}


def write_model(
    url: str | Path, model: PreTrainedModel, weights: Mapping[str, Tensor], tokenizer_dir: str | Path
) -> None:
    """Writes config, weights (safetensors, in shards if large) and tokenizer files; replaces what was at `url`.

    Args:
        url: a path or `s3://...`.
        model: gives the config; its own weights are not read.
        weights: in checkpoint form. A tied output head is not among them: the config says that it is tied.
        tokenizer_dir: folder in Hugging Face format to copy the tokenizer's files from.

    Raises:
        FileNotFoundError: `tokenizer_dir` holds no tokenizer.
        ValueError: the weights are not those of the config, by name or shape. What was at `url` stays.
    """
    files = sorted({f for pattern in _TOKENIZER_FILES for f in Path(tokenizer_dir).glob(pattern) if f.is_file()})
    if not any(f.name.startswith("tokenizer") for f in files):
        raise FileNotFoundError(f"there is no tokenizer in '{tokenizer_dir}'")
    with written(str(url)) as fresh:
        Path(fresh).mkdir()
        for file in files:
            shutil.copy2(file, fresh)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(fresh)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(fresh)
        save_torch_state_dict(dict(weights), fresh, metadata={"format": "pt"})
        if wrong := misfits(fresh, strict=True):
            raise ValueError(f"the policy was not written to '{url}': its weights do not fit its config: {wrong}")


def misfits(folder: str | Path, strict: bool) -> str:
    """How the weights in a folder fail to be those of its config, in words; "" if they are. Reads no weights.

    Args:
        strict: weights that the model has no use for are wrong by themselves. Published models may come with some.
    """
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        _, info = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    except SafetensorError as e:
        return f"they cannot be read ({e})"
    wrong = [f"{n} is missing" for n in sorted(info["missing_keys"])]
    wrong += [f"{n} has shape {list(a)} instead of {list(b)}" for n, a, b in sorted(info["mismatched_keys"])]
    if wrong or strict:
        wrong += [f"{n} is unknown" for n in sorted(info["unexpected_keys"])]
    return listed(wrong)
