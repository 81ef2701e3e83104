"""Triton kernels for what takes several passes over memory in torch; torch's builds for CUDA include Triton.

The modules that call them can compute the same without. Triton launches on the current device, so the caller of a
kernel outside of a backward pass makes that of its tensors the current one.
"""

import importlib.util

import torch
from torch import Tensor

AVAILABLE = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
OLDEST = (8, 0)  # compute capability whose matrix units know bf16


def look_at(device: torch.device) -> None:
    """Disable the kernels from now on if ``device`` is too old for them."""
    global AVAILABLE
    if AVAILABLE and device.type == "cuda" and not torch.compiler.is_compiling():
        AVAILABLE = torch.cuda.get_device_capability(device) >= OLDEST


def can_run(x: Tensor) -> bool:
    """Return whether ``x`` is on a device that these kernels run on, and of a 16-bit type."""
    return AVAILABLE and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
