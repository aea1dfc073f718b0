"""How the policy changes: packing, losses and advantages as pure functions, and the DeepSpeed engine that applies them.

Transformers imports DeepSpeed, which looks for an accelerator there and then; it is told here that there is none.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
