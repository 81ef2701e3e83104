"""The interface of any speech encoder-decoder: Canter's own `SpeechModel`, or another library's by an adapter.

B: utterances, S: samples, F: feature frames, M: mel bins, T: encoder frames, D: width, U: tokens, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, nn

from canter.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from canter.models.batch import Batch, Loss, SoftTargets
    from canter.models.cost import UtteranceCost
    from canter.models.lora import LoraAdapter
    from canter.text.tokenizer import Tokenizer

Capability = Literal[
    "cached_decoding",  # Canter's engine decodes it, with caches, beams and CUDA graphs
    "word_timestamps",
    "joint_decoding",  # CTC and attention, if it has a CTC head
    "repetition_guard",
    "int8",
    "compile",
    "shard",  # FSDP2
    "spec_augment",  # masks drawn by Canter from (seed, epoch, row)
    "any_length",  # the length that utterances are padded to can be changed, or padding left out
    "vocabulary",  # its tokenizer can be replaced, with rows of embedding and head
    "bf16_weights",  # its layers compute in the type of their weights
    "split_decoder",  # `SpeechModel.loss_of`: decoder and heads on parts of an encoded batch
    "cost_model",  # FLOPs and memory follow from its configuration
    "packing",  # `SpeechModel.packed_loss`: utterances without a batch axis
    "characters",  # its CTC head is trained on characters, which are saved beside it
    "language_detection",
    "previous_text",  # its prompt has a place for the text before a recording
]
"""Features that some models lack; features that all models have need no name."""


class AnyModel(Protocol):
    """A speech encoder-decoder, which is a `torch.nn.Module` too.

    Ask ``supports`` for what it can do, never for its class.
    """

    @property
    def supports(self) -> Set[Capability]:
        """Features beyond training, tuning and decoding."""
        ...

    @property
    def format(self) -> str:
        """Name of the format that it is saved in (see `canter.loading`)."""
        ...

    tokenizer: Tokenizer | None
    """The checkpoint's tokenizer, if it has one."""

    adapter: LoraAdapter | None
    """The LoRA adapter that is trained, if any; it is saved in place of the model."""

    @property
    def generation(self) -> Mapping[str, object]:
        """Settings for decoding, named as in Hugging Face's ``generation_config.json``."""
        ...

    @property
    def ctc(self) -> nn.Module | None:
        """The auxiliary CTC head."""
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
        """Return T of an utterance of ``seconds``."""
        ...

    def layers(self) -> Mapping[str, Mapping[str, object]]:
        """Return kind, number of layers and width of "encoder" and "decoder", and what else is known of the parts."""
        ...

    def parts(self) -> Mapping[str, int]:
        """Return the number of parameters by part, each counted once."""
        ...

    def cost(self, seconds: float, tokens: int) -> UtteranceCost:
        """Return FLOPs and memory of an utterance of ``seconds`` and ``tokens``."""
        ...

    # -- training --

    @property
    def recomputes(self) -> bool:
        """True while activation checkpointing is on."""
        ...

    def recompute_activations(self, on: bool = True) -> None:
        """Switch activation checkpointing."""
        ...

    def features(self, audio: Tensor, lengths: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the encoder's input of audio (B, S), (B,) in samples: spectrogram (B, F, M), and lengths or a mask."""
        ...

    def loss(
        self,
        batch: Batch,
        *,
        attention: bool = True,
        label_smoothing: float = 0.0,
        features: tuple[Tensor, Tensor] | None = None,
        teacher: SoftTargets | None = None,
    ) -> Loss:
        """Return sums of the losses and the numbers of targets that bear them."""
        ...

    def token_logits(self, batch: Batch) -> Tensor:
        """Return logits (B, U - 1, V) of the tokens after the first."""
        ...

    # -- torch.nn.Module --

    training: bool

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def requires_grad_(self, requires_grad: bool = True) -> AnyModel: ...
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...
    def buffers(self, recurse: bool = True) -> Iterator[Tensor]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def train(self, mode: bool = True) -> AnyModel: ...
    def eval(self) -> AnyModel: ...
    def to(self, device: torch.device | str) -> AnyModel: ...


def module_of(model: AnyModel) -> nn.Module:
    """Return the model as a torch module, for torch's own functions."""
    assert isinstance(model, nn.Module)
    return model


def check_support(model: AnyModel, asked: Mapping[str, Capability], source: object) -> None:
    """Check that ``model`` can do what was asked; ``asked`` maps options to the capability that they need.

    Raises ConfigError that names the options and ``source``, where the model is from.
    """
    refused = [option for option, needed in asked.items() if needed not in model.supports]
    if refused:
        kind = "a model" if "cached_decoding" in model.supports else "a model of another library"
        raise ConfigError(
            f"{', '.join(refused)}: {source} is {kind} ({model.shape}), which cannot do that; leave it out"
        )
