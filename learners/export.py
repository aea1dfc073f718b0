"""Weights out of the learner: names as in a Hugging Face checkpoint, and folders that Transformers and vLLM load.

A folder appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

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
    out_dir: str | Path, model: PreTrainedModel, weights: Mapping[str, Tensor], tokenizer_dir: str | Path
) -> None:
    """Writes config, weights (safetensors, in shards if large) and tokenizer files; replaces what was at `out_dir`.

    Args:
        model: gives the config; its own weights are not read.
        weights: in checkpoint form. A tied output head is not among them: the config says that it is tied.
        tokenizer_dir: folder in Hugging Face format to copy the tokenizer's files from.

    Raises:
        FileNotFoundError: `tokenizer_dir` holds no tokenizer.
    """
    files = sorted({f for pattern in _TOKENIZER_FILES for f in Path(tokenizer_dir).glob(pattern) if f.is_file()})
    if not any(f.name.startswith("tokenizer") for f in files):
        raise FileNotFoundError(f"there is no tokenizer in '{tokenizer_dir}'")
    out = Path(out_dir)
    fresh = out.with_name(out.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file in files:
        shutil.copy2(file, fresh)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(fresh)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(fresh)
    save_torch_state_dict(dict(weights), fresh, metadata={"format": "pt"})
    if out.exists():
        shutil.rmtree(out)
    fresh.rename(out)
