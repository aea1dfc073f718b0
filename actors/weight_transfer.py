"""A vLLM weight-transfer backend that works on every platform: the new weights lie in buckets of shared memory.

vLLM's own backends (nccl, ipc, ...) need CUDA. This one is registered in the engine's process when vLLM imports
`WorkerExtension` from here, before it loads the model. It must be used within vLLM's start/finish lifecycle: on CPU
the packed weights are rebuilt only there (a plain `load_weights` leaves them empty).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.buckets import Piece, Plain, Reader, tensors
from tools import tether

BACKEND = "llmi_host"
_READER = Reader()  # of this process


@dataclass
class HostInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class HostUpdate(WeightTransferUpdateInfo):
    """`buckets`, all of a version."""

    buckets: list[Plain] = field(default_factory=list)


class HostEngine(WeightTransferEngine[HostInit, HostUpdate]):
    """Loads buckets into the running model, all of a version in one call."""

    init_info_cls = HostInit
    update_info_cls = HostUpdate

    def init_transfer_engine(self, init_info: HostInit) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdate) -> None:
        """Raises ValueError if they are not the model's; it holds parts of two versions until it gets right ones."""
        try:
            self._load(update_info.buckets)
        except BaseException:
            self._abandon()
            raise

    def _load(self, buckets: list[Plain]) -> None:
        weights = _Watched(with_head(_named(buckets)))
        try:
            self.model.load_weights(weights)
        except Exception as error:  # vLLM's loaders assert, index and raise, without the tensor's name
            raise ValueError(f"{weights.last} does not fit the model: {error!r}") from error
        if self.model_config.quantization is None and (missing := _unfilled(self.model)):
            raise ValueError(f"weights are missing of {len(missing)} layers, such as {missing[0]}")

    def _abandon(self) -> None:
        """Let vLLM put back what is not replaced yet, as if nothing had come for it; or the next would add to that."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.load_numel, info.loaded_weights = 0, []
        self.finish_weight_update()

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def with_head(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tied embeddings come a second time, as the head: vLLM's reload does not follow the tie."""
    embedding, tied = None, True
    for name, tensor in weights:
        if name.endswith("embed_tokens.weight"):
            embedding = tensor
        tied = tied and name != "lm_head.weight"
        yield name, tensor
    if tied and embedding is not None:
        yield "lm_head.weight", embedding


class _Watched:
    """An iterator of named tensors that remembers the last one."""

    def __init__(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._weights, self.last = weights, "nothing"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.last = f"{name!r} of shape {tuple(tensor.shape)}"
            yield name, tensor


def _named(buckets: Iterable[Plain]) -> Iterator[tuple[str, torch.Tensor]]:
    paths, pieces = zip(*buckets, strict=True)
    for content, table in zip(_READER.map(paths), pieces, strict=True):
        yield from tensors(content, (Piece(name, dtype, tuple(shape), at) for name, dtype, shape, at in table))


def _unfilled(model: torch.nn.Module) -> list[str]:
    """Layers that are not as new: vLLM would quietly leave them as they were.

    Embeddings may stay partly filled, because vLLM pads vocabularies.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    infos = ((name, layer, get_layerwise_info(layer)) for name, layer in model.named_modules())
    return [
        name
        for name, layer, info in infos
        if info.can_load()  # and so not done
        and any(p is not None for p in layer._parameters.values())
        and (info.load_numel <= 0 or isinstance(layer, LinearBase))
    ]


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, HostEngine)


class WorkerExtension(tether.WorkerExtension):
    """Handed to vLLM as `worker_extension_cls`: importing it registers the backend in the worker's process."""

    def map_weights(self, buckets: list[Plain]) -> float:
        """Map buckets before the engine is paused; returns when (`time.monotonic`)."""
        for _ in _named(buckets):
            pass
        return time.monotonic()
