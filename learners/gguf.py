"""A GGUF file as a policy: `python -m learners.gguf FILE.gguf FOLDER` writes it in Hugging Face format, dequantised.

vLLM loads no GGUF file, and quantised weights cannot be trained. Reading one needs the package `gguf`
(requirements/dev.txt), which nothing else here does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def convert(file: str | Path, folder: str | Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder that Transformers and vLLM load, in bfloat16.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package `gguf` is missing.
        ValueError: it is no GGUF file, or one of a kind of model that Transformers cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    source = Path(file)
    if not source.is_file():
        raise FileNotFoundError(f"there is no GGUF file '{source}'")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"'{source}' cannot be read as a GGUF file: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m learners.gguf FILE.gguf FOLDER")
    try:
        convert(*sys.argv[1:])
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"llmi: {error}")
