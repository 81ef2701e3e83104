"""What every encoder and every kind of features offers; a new encoder is one file with these two classes."""

from typing import Protocol

from torch import Tensor

from canter.models.stack import Stack


class Encoder(Stack):
    """Features (B, F, M) and lengths (B,) in feature frames -> encoded (B, T, D) and lengths (B,) in
    encoder frames.

    Whatever stands past an utterance's end, in features or batch, must not change its valid positions.
    """

    outputs: tuple[str, ...] = ()
    """Modules of a layer that write to the residual stream: with all of them zero it passes x through."""
    same_lengths: bool = False
    """Whether every utterance fills its batch, as those do that are padded to one length; the model says so."""
    last_norm: str = ""
    """The norm that a layer ends with, if it does."""

    def frames(self, feature_frames):
        """Encoder frames of so many feature frames (an int or a tensor)."""
        raise NotImplementedError

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class EncoderConfig(Protocol):
    """A frozen dataclass of numbers and strings that knows its module."""

    @property
    def layers(self) -> int: ...

    @property
    def width(self) -> int: ...

    def build(self) -> Encoder: ...
