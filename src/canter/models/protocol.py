"""What Canter asks of any speech encoder-decoder model: its own (`SpeechModel`) or another library's, by an adapter.

B: utterances, S: samples, F: feature frames, M: mel bins, T: encoder frames, D: width, U: tokens, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from canter.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from canter.models.batch import Batch, Loss
    from canter.text.tokenizer import Tokenizer

Capability = Literal[
    "cached_decoding",  # Canter's engine decodes it: `Engine`, its caches, beams and CUDA graphs
    "word_timestamps",
    "joint_decoding",  # CTC and attention, where it has a CTC head
    "repetition_guard",
    "int8",
    "compile",
    "shard",  # FSDP2
    "spec_augment",  # masks drawn by Canter from (seed, epoch, row)
    "any_length",  # padding of utterances to a fixed length can be changed or left out
    "bf16_weights",  # its layers compute in the type of their weights
    "split_decoder",  # `loss_of`: decoder and heads on parts of an encoded batch
    "cost_model",  # FLOPs and memory follow from its configuration
    "characters",  # its CTC head is trained on characters, which are saved beside it
]
"""What a model may or may not be able to do; what all models can do needs no name."""


class AnyModel(Protocol):
    """A speech encoder-decoder, which is a `torch.nn.Module` too.

    Nothing may ask which class a model is of: it asks ``supports``.
    """

    @property
    def supports(self) -> Set[Capability]:
        """What the model can do beyond training, tuning and decoding."""
        ...

    @property
    def format(self) -> str:
        """Name of the format that it is saved in (see `canter.loading`)."""
        ...

    tokenizer: Tokenizer | None

    @property
    def generation(self) -> dict[str, Any]:
        """How it wants to be decoded, in the words of Hugging Face's ``generation_config.json``."""
        ...

    # -- sizes --

    @property
    def sample_rate(self) -> int:
        """Samples per second of its input."""
        ...

    @property
    def frame_seconds(self) -> float:
        """Seconds of audio per encoder frame."""
        ...

    @property
    def padded_seconds(self) -> float:
        """Seconds that every utterance is padded to; 0: to the longest of its batch."""
        ...

    @property
    def longest_seconds(self) -> float:
        """Maximum seconds of an utterance."""
        ...

    @property
    def positions(self) -> int:
        """Maximum number of tokens, prompt and end token included."""
        ...

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    @property
    def width(self) -> int:
        """D of the encoder."""
        ...

    @property
    def shape(self) -> str:
        """Text that is equal for two models that take the same memory and time."""
        ...

    def encoder_frames(self, seconds: float) -> int:
        """Return T of an utterance of so many seconds."""
        ...

    # -- training --

    @property
    def recomputes(self) -> bool:
        """Whether activation checkpointing is on."""
        ...

    def recompute_activations(self, on: bool = True) -> None:
        """Switch activation checkpointing."""
        ...

    def features(self, audio: Tensor, lengths: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the encoder's input of audio (B, S) with lengths (B,) in samples, and its lengths or mask."""
        ...

    def loss(
        self,
        batch: Batch,
        *,
        attention: bool = True,
        label_smoothing: float = 0.0,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> Loss:
        """Return sums of the losses and the numbers of targets that bear them."""
        ...

    # -- torch.nn.Module --

    training: bool

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...
    def buffers(self, recurse: bool = True) -> Iterator[Tensor]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def to(self, device: torch.device | str) -> Any: ...


def module_of(model: AnyModel) -> nn.Module:
    """Return the model as the torch module that it is, for torch's own functions."""
    assert isinstance(model, nn.Module)
    return model


def check_support(model: AnyModel, asked: Mapping[str, Capability], source: object) -> None:
    """Check that ``model`` can do what was asked; ``asked`` maps options to what they need.

    Raises ConfigError that names the options and ``source``, where the model is from.
    """
    refused = [option for option, needed in asked.items() if needed not in model.supports]
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: {source} is a model of another library ({model.shape}), which cannot do that; "
            "leave it out"
        )
