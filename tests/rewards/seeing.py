"""A vision-language model so small that its verdicts mean nothing, and the torchvision that vLLM wants beside it.

Neither is in the environment of the project (requirements/vision.txt): both live in folders of a test, and the model
is made and run in processes that find torchvision there.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rewards.base import Rendered, Verdict
from rewards.judges import content
from rewards.judges.model import ModelJudge

ROOT = Path(__file__).parents[2]
HOOK = "llmi_torchvision_hook"

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def install_torchvision(folder: Path) -> None:
    """As requirements/vision.txt and `llmi doctor --fix` do it, into a folder that is then put on PYTHONPATH."""
    wanted = ["--no-deps", "--target", str(folder), "-r", str(ROOT / "requirements/vision.txt")]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted], check=True, timeout=300)
    shutil.copyfile(ROOT / "cluster/torchvision_hook.py", folder / f"{HOOK}.py")
    (folder / "sitecustomize.py").write_text(f"import {HOOK}\n")


def process_with(torchvision: Path) -> ProcessPoolExecutor:
    """One process that is started anew, and finds torchvision."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_find, initargs=(str(torchvision),))


def _find(folder: str) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT)])  # for the processes that vLLM starts
    sys.path.insert(0, folder)
    importlib.import_module(HOOK)


def build(folder: Path) -> str:
    """Make a Qwen2.5-VL of 0.2 M parameters in a folder, whose name is returned; where torchvision is found."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        Qwen2VLVideoProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    specials = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *specials]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], additional_special_tokens=specials
    )
    tokenizer.chat_template = TEMPLATE
    begin, end, vision_start, vision_end, image, video = map(vocabulary.index, specials)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": len(vocabulary), "max_position_embeddings": 16384,
            "bos_token_id": begin, "eos_token_id": end, "tie_word_embeddings": False, "initializer_range": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64,
            "window_size": 112, "fullatt_block_indexes": [1], "initializer_range": 0.1,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=vision_start, vision_end_token_id=vision_end,
        bos_token_id=begin, eos_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def judged(model: str, documents: list[Rendered]) -> list[Verdict]:
    """What a vLLM engine with such a model says of documents, all asked at once.

    The mark in its prompts is always the same: it is a hash of the pictures too, by which words alone would tell them.
    """
    content._mark = lambda parts: "0" * 12
    judge = ModelJudge("image", engine={"model": model, "dtype": "float32"}, cache=0)
    try:
        with ThreadPoolExecutor(len(documents)) as threads:
            return list(threads.map(judge.judge, documents))
    finally:
        judge.close()
