"""A vLLM weight-transfer backend that works on every platform: the new weights are a file in shared memory.

vLLM's own backends (nccl, ipc, ...) need CUDA. This one is registered in the engine's process when vLLM imports
`WorkerExtension` from here, before it loads the model. It must be used within vLLM's start/finish lifecycle: on CPU
the packed weights are rebuilt only there (a plain `load_weights` leaves them empty).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "llmi_file"


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """`path` of a safetensors file with checkpoint names."""

    path: str = ""


class FileEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads a safetensors file into the running model."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        self.model.load_weights(_tensors(update_info.path, str(self.device)))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def _tensors(path: str, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the file; tied embeddings come twice, since vLLM's reload does not follow the tie to the head."""
    from safetensors import safe_open

    with safe_open(path, "pt", device=device) as f:
        names = list(f.keys())
        for name in names:
            yield name, f.get_tensor(name)
        if "lm_head.weight" not in names and "model.embed_tokens.weight" in names:
            yield "lm_head.weight", f.get_tensor("model.embed_tokens.weight")


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileEngine)


class WorkerExtension:
    """Handed to vLLM as `worker_extension_cls`: importing it registers the backend in the worker's process."""
