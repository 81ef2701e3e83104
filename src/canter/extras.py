"""Optional dependencies: which extra brings a package, and the message that says how to install it.

``pip install canter`` is the planner. Everything else is an extra of pyproject.toml, and whoever needs a package that
is not there says so through this module, so that every message names an extra that exists.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

from canter.errors import ConfigError

# name that is imported -> the extra that brings it
EXTRA_OF = {
    "torch": "models",
    "safetensors": "models",
    "huggingface_hub": "models",
    "jiwer": "models",
    "whisper_normalizer": "models",
    "matplotlib": "models",
    "tensorboard": "models",
    "transformers": "hf",
    "datasets": "hf",
    "accelerate": "hf",
    "av": "av",
    "silero_vad": "vad",
    "onnxruntime": "vad",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "h11": "serve",
    "python_multipart": "serve",
    "prometheus_client": "serve",
    "sacrebleu": "bleu",
    "espeakng_loader": "demo",
    "lhotse": "lhotse",
    "pytorch_lightning": "lightning",
    "wandb": "log",
    "trackio": "log",
}


class MissingExtraError(ConfigError, ImportError):
    """A package of an extra that is not installed. The message says what to type."""


def install(package: str) -> str:
    """Return the line that installs the extra with this package: ``pip install 'canter[hf]'``."""
    return f"pip install 'canter[{EXTRA_OF[package]}]'"


def missing(package: str, user: str) -> MissingExtraError:
    """Return the error for a package that ``user`` (a command, an option, a function) cannot do without."""
    return MissingExtraError(f"{user} needs {package}, which is not installed: {install(package)}")


def require(package: str, user: str) -> None:
    """Raise MissingExtraError if the package is not installed. The package is not imported."""
    known = sys.modules[package] if package in sys.modules else importlib.util.find_spec(package)
    if known is None:
        raise missing(package, user)


@contextlib.contextmanager
def needed_by(user: str) -> Iterator[None]:
    """Turn the failed import of a package that an extra brings into a MissingExtraError.

    Other failed imports pass unchanged: those are faults of the installation, not choices.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        raise missing(package, user) from error
