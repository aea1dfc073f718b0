"""Lets torchvision's CUDA wheel be imported beside a CPU torch.

The wheel's library of kernels does not load without CUDA, which torchvision survives; but it then registers shapes for
two operators, `nms` and `qnms`, that only that library defines, and its import fails. This hook defines their schemas
just before torchvision is imported, and leaves a torch built for CUDA alone. `torchvision.ops.nms` itself stays absent.

`llmi doctor --fix` copies this file into site-packages beside a `.pth` file that imports it, so that it is there in
every process (vLLM and Ray start many). It costs nothing until torchvision is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OPERATORS = ("nms", "qnms")


class Hook(MetaPathFinder):
    """Finds nothing itself: sees that torchvision is about to be found, and prepares torch for it, once."""

    library: object = None  # the schemas live as long as this does

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                for name in OPERATORS:
                    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                Hook.library = library
        return None


sys.meta_path.insert(0, Hook())
