"""LoRA (arXiv 2106.09685): small matrices beside the frozen ones, trained in their place.

The policy leaves the learner in two forms: whole, with the adapter merged, under the names that it had without one; or
as the adapter alone, in PEFT's format, which vLLM loads beside the weights that it already holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import LoraConfig

#: Of the one adapter, inside the model.
_NAME = "policy"

#: What both merging and vLLM can do. Dropout is not among them: what is trained must be the policy that sampled.
OPTIONS = ("r", "lora_alpha", "target_modules", "use_rslora")


def add_adapter(model: PreTrainedModel, options: Mapping[str, Any]) -> LoraConfig:
    """Puts an adapter that changes nothing yet into the model and freezes the rest; the same one on every rank.

    Args:
        options: of PEFT's LoraConfig, those in `OPTIONS`; all linear layers but the head are targets by default.

    Raises:
        ValueError: an option that is not among them, or a target that is not there or no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # seconds that only those should pay who use it
    from peft.tuners.lora import Linear, LoraLayer

    if unknown := set(options) - set(OPTIONS):
        raise ValueError(f"lora has no option '{min(unknown)}'; it has: {', '.join(OPTIONS)}")
    config = LoraConfig(**({"target_modules": "all-linear"} | dict(options)), task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, model, _NAME)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (
            not isinstance(module, Linear) or module is model.get_output_embeddings()
        ):
            raise ValueError(f"lora.target_modules names '{name}', which is no linear layer inside the model")
    for parameter in _trained(model).values():
        parameter.data = parameter.data.to(model.dtype)
    config.inference_mode = True
    return config


@dataclass(frozen=True)
class Part:
    """A weight as it was before there was an adapter.

    Attributes:
        name: of the parameter or buffer.
        made_of: the tensors that are needed for it: itself, and both halves of its adapter if it has one.
        scaling: of the adapter.
    """

    name: str
    made_of: list[Tensor]
    scaling: float = 0.0

    def merged(self) -> Tensor:
        """The weight with its adapter added, in its own number format; `made_of` must be whole."""
        weight, *adapter = (t.detach() for t in self.made_of)
        if not adapter:
            return weight
        a, b = adapter
        return (weight.float() + self.scaling * (b.float() @ a.float())).to(weight.dtype)


def parts(model: PreTrainedModel) -> Iterator[Part]:
    """All weights and saved buffers of a model, with or without an adapter."""
    layers = {f"{name}.base_layer.weight": m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    kept = model.state_dict().keys()  # without the buffers that are not saved
    buffers = ((n, b) for n, b in model.named_buffers() if n in kept)
    adapter = _trained(model) if layers else {}
    for name, tensor in [*model.named_parameters(), *buffers]:
        plain = name.replace(".base_layer.", ".")
        if name in layers:
            layer = layers[name]
            halves = [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]
            yield Part(plain, [tensor, *halves], layer.scaling[_NAME])
        elif name not in adapter:
            yield Part(plain, [tensor])


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, the model is what it was before it had an adapter."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_parts(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The adapter's own weights under the names that PEFT gives them in files."""
    for name, parameter in _trained(model).items():
        yield f"base_model.model.{name.replace(f'.{_NAME}.', '.')}", parameter


def written_config(config: LoraConfig) -> str:
    """What PEFT writes to adapter_config.json."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_text()


def write_adapter(folder: Path, config: str, weights: Mapping[str, Tensor]) -> None:
    """Writes an adapter in PEFT's format to a folder.

    Args:
        config: content of adapter_config.json.
        weights: under the names of `adapter_parts`.
    """
    (folder / "adapter_config.json").write_text(config)
    save_file(dict(weights), folder / "adapter_model.safetensors", {"format": "pt"})


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if f".{_NAME}." in n and ".lora_" in n}
