"""Where a model computes."""

import torch

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
        raise ConfigError(
            f"--device {name}: there are only {torch.cuda.device_count()} GPUs here, cuda:0 the first"
        )
    return device
