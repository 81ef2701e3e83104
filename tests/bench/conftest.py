"""The model that other tests of decoding use."""

from ..inference.conftest import model

__all__ = ["model"]
