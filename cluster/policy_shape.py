"""The shape of the policy that a config names, without its weights.

Where its config.json comes from, in this order: the folder that `policy.path` is, `examples/models.json` (the fields
that matter, of the models that the examples name), the hub or its cache. Transformers knows the rest: the model is
built on torch's meta device, where tensors have shapes and no memory, and counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config import Policy
from cluster.estimate import Shape

KNOWN = Path(__file__).resolve().parents[1] / "examples" / "models.json"
HUB_S = 10.0


class NoShape(LookupError):
    """The shape is not known; the message says why."""


def shape_of(policy: Policy) -> Shape:
    """The shape of a config's policy.

    Raises:
        NoShape: there is no config.json, or the model is none whose memory `cluster.estimate` can tell.
    """
    from torch.nn import Linear

    import learners  # noqa: F401  # tells DeepSpeed, which Transformers imports, what accelerator there is

    config = _tiny(policy) if policy.path is None else _config(policy.path)
    text = config.get_text_config()
    model = _empty(config)
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    try:
        return Shape(
            params=sum(p.numel() for p in model.parameters()),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            vocab=text.vocab_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            intermediate=getattr(text, "moe_intermediate_size", None) or text.intermediate_size,
            experts=getattr(text, "num_experts_per_tok", None) or 0,
            qk_norm=any(name.endswith(".q_norm") for name in modules),
            linear=sum(m.in_features + m.out_features for m in modules.values() if type(m) is Linear and m is not head),
        )
    except AttributeError as error:
        raise NoShape(f"how much memory a {text.model_type} takes is not known here: {error}") from None


def _tiny(policy: Policy) -> Any:
    from learners.sft import tiny_config

    assert policy.tiny is not None, "a config has a path or a tiny policy"
    return tiny_config(**policy.tiny.model_dump())


def _config(path: str) -> Any:
    from huggingface_hub import hf_hub_download
    from transformers import AutoConfig

    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise NoShape(f"policy.path {path!r} holds no config.json: it is no model in Hugging Face format")
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    known = json.loads(KNOWN.read_text())
    if path in known:
        return AutoConfig.for_model(**known[path])
    try:
        file = hf_hub_download(path, "config.json", etag_timeout=HUB_S)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise NoShape(f"policy.path {path!r} is no folder, and the hub gives no config.json of it: {why}") from None
    return AutoConfig.from_pretrained(Path(file).parent, local_files_only=True)


def _empty(config: Any) -> Any:
    """The model of a config, without memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except ValueError as error:
        raise NoShape(f"a {config.model_type} is no language model that Transformers can build: {error}") from None
