"""Optional dependencies: the extra that installs each package, and the error for a missing one.

``pip install canter`` installs the planner; everything else is an extra of pyproject.toml. All messages about missing
packages are made here, so that each names an extra that exists.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

from canter.errors import ConfigError

PACKAGES = {
    "models": "torch safetensors huggingface_hub jiwer whisper_normalizer regex matplotlib tensorboard",
    "hf": "transformers datasets accelerate",
    "av": "av",
    "vad": "silero_vad onnxruntime",
    "serve": "fastapi starlette uvicorn h11 python_multipart prometheus_client",
    "bleu": "sacrebleu",
    "demo": "espeakng_loader",
    "lhotse": "lhotse",
    "lightning": "pytorch_lightning",
    "log": "wandb trackio",
    "s3": "s3fs",
}
EXTRA_OF = {package: extra for extra, packages in PACKAGES.items() for package in packages.split()}
"""The extra that installs each package, by the package's imported name."""


class MissingExtraError(ConfigError, ImportError):
    """A package of an extra that is not installed. The message has the command that installs it."""


def install(package: str) -> str:
    """Return the command that installs the extra with this package: ``pip install 'canter[hf]'``."""
    return f"pip install 'canter[{EXTRA_OF[package]}]'"


def missing(package: str, user: str) -> MissingExtraError:
    """Return the error for a missing package that ``user`` (a command, an option, a function) needs."""
    return MissingExtraError(f"{user} needs {package}, which is not installed: {install(package)}")


def require(package: str, user: str) -> None:
    """Raise MissingExtraError if the package is not installed. The package is not imported."""
    known = sys.modules[package] if package in sys.modules else importlib.util.find_spec(package)
    if known is None:
        raise missing(package, user)


@contextlib.contextmanager
def needed_by(user: str) -> Iterator[None]:
    """Context manager that turns the failed import of an extra's package into a MissingExtraError.

    Other failed imports are faults of the installation and pass unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        raise missing(package, user) from error
