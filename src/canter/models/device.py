"""Where a model computes."""

import contextlib
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from canter.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """'cpu', 'cuda' or 'cuda:1'; 'auto' is the GPU where there is one. Raises ConfigError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no GPU is available here; use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: no such device; use cpu, cuda or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs here, cuda:0 the first")
    if device.type == "cuda":
        _suit_changing_shapes()
    return device


def upload(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers on ``device``. A GPU is not waited for: it reads them from pinned memory when it comes to them."""
    pinned = torch.tensor(numbers, dtype=torch.long, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def on_stream(stream: "torch.cuda.Stream | None") -> contextlib.AbstractContextManager:
    """Within it a GPU's work is given to ``stream``; None: as it comes."""
    return torch.cuda.stream(stream) if stream else contextlib.nullcontext()


def _suit_changing_shapes() -> None:
    """Two settings of PyTorch that assume shapes which repeat, where ours change from batch to batch: cuDNN's attention
    makes a plan for every new shape, milliseconds each, and the allocator's blocks of fixed size fragment (what the
    user's environment says of it goes first)."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        with warnings.catch_warnings():  # its name is about to change
            warnings.simplefilter("ignore", FutureWarning)
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
