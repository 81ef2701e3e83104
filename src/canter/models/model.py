"""An attention encoder-decoder speech model: features, encoder, decoder, and an optional CTC head.

B: utterances, S: samples, F: feature frames (10 ms), M: mel bins, T: encoder frames, D: width, U: tokens,
V: vocabulary, C: characters.
"""

import math
from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.batch import Batch, Loss, attention_loss
from canter.models.decoder import Decoder, DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig, WhisperFeatureConfig
from canter.models.layers import EncoderConfig
from canter.models.protocol import Capability
from canter.models.whisper import WhisperEncoderConfig
from canter.text import Characters

# The kinds that a checkpoint can name; a new encoder joins by one line here.
FEATURES: dict[str, type] = {"nemo": FeatureConfig, "whisper": WhisperFeatureConfig}
ENCODERS: dict[str, type] = {"fastconformer": FastConformerConfig, "whisper": WhisperEncoderConfig}


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of all parts of a model."""

    features: FeatureConfig | WhisperFeatureConfig = field(default_factory=FeatureConfig)
    encoder: EncoderConfig = field(default_factory=FastConformerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    ctc_vocabulary: int = 0
    """Outputs of the auxiliary CTC head, blank (id 0) included; 0: no head."""
    ctc_upsampling: int = 2
    """CTC outputs for each encoder frame: characters come faster than one every 80 ms."""


SUPPORTED = frozenset(get_args(Capability))


class SpeechModel(nn.Module):
    """Audio to scores of text. Every method takes lengths, and padding never changes a valid position.

    ``tokenizer`` is the checkpoint's (None until one is attached), ``characters`` the alphabet of its CTC head;
    ``generation`` is how it wants to be decoded, in the words of Hugging Face's ``generation_config.json`` (token ids,
    suppressed tokens)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tokenizer: Any = None
        self.characters: Characters | None = None
        self.generation: dict[str, Any] = {}
        self.features = config.features.build()
        self.encoder = config.encoder.build()
        self.encoder.same_lengths = self.padded_seconds > 0
        narrow, wide = config.encoder.width, config.decoder.width
        self.projection = nn.Identity() if narrow == wide else nn.Linear(narrow, wide)
        self.decoder = Decoder(config.decoder)
        self.ctc = nn.Linear(narrow, config.ctc_upsampling * config.ctc_vocabulary) if config.ctc_vocabulary else None

    # What any model offers; see `canter.models.protocol`.

    @property
    def format(self) -> str:
        """Name of the format that it is saved in (see `canter.loading`)."""
        return "canter"

    @property
    def supports(self) -> Set[Capability]:
        """What Canter's own models can do: everything."""
        return SUPPORTED

    @property
    def frame_seconds(self) -> float:
        """Seconds of audio for each encoder frame."""
        seconds = self.padded_seconds or 100.0
        return round(seconds / self.encoder_frames(seconds), 6)

    @property
    def padded_seconds(self) -> float:
        """To how many seconds every utterance is padded; 0: to the longest of its batch."""
        return getattr(self.config.features, "pad_seconds", 0.0)

    @property
    def longest_seconds(self) -> float:
        """Of the utterances that the model can take at once: Whisper's encoder has positions for 30 s alone."""
        positions = getattr(self.config.encoder, "positions", math.inf)
        return self.padded_seconds or positions / self.encoder_frames(100.0) * 100.0

    @property
    def sample_rate(self) -> int:
        return self.config.features.sample_rate

    @property
    def positions(self) -> int:
        """The most tokens, prompt and end token included."""
        return self.config.decoder.positions

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.config.decoder.vocabulary

    @property
    def width(self) -> int:
        """D."""
        return self.config.encoder.width

    @property
    def shape(self) -> str:
        """What two models have in common that take the same memory and time."""
        layers = f"{self.config.encoder.layers}/{self.config.decoder.layers} x {self.width}"
        return f"{type(self.encoder).__name__} {layers}, vocabulary {self.vocabulary}"

    @property
    def recomputes(self) -> bool:
        """Whether ``recompute_activations`` is on."""
        return self.encoder.recompute

    def prompt(self, **slots: str) -> list[int]:
        """Token ids of the prompt with these slots (``source_lang="en"``, ``pnc="yes"``, ...; see the
        tokenizer's prompt format). ConfigError for an unknown slot or value, ValueError without a
        tokenizer."""
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; set model.tokenizer, or load a model that has one")
        return self.tokenizer.prompt_ids(slots)

    def recompute_activations(self, on: bool = True) -> None:
        """Training computes each layer again in the backward pass: about a third slower, with far less
        memory."""
        self.encoder.recompute = self.decoder.recompute = on

    def set_features(self, **changes: Any) -> None:
        """Changes fields of the features' configuration, such as ``pad_seconds=0`` (Whisper at any
        length)."""
        features = replace(self.config.features, **changes)
        self.config = replace(self.config, features=features)
        self.features = features.build().to(self.features.filters.device).train(self.training)
        self.encoder.same_lengths = self.padded_seconds > 0

    def encoder_frames(self, seconds: float) -> int:
        """T of an utterance of so many seconds."""
        samples = round(seconds * self.config.features.sample_rate)
        return int(self.encoder.frames(max(1, self.features.frames(samples))))

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, F, M), lengths (B,) in frames -> encoded (B, T, D), lengths (B,), before the
        projection to the decoder's width."""
        return self.encoder(features.to(next(self.encoder.parameters()).dtype), lengths)

    def logits(self, encoded: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """encoded (B, T, D), lengths (B,), tokens (B, U) from the prompt on -> logits (B, U, V) of the next
        ones."""
        return self.decoder(tokens, self.projection(encoded), lengths)

    def log_probs(self, encoded: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """As ``logits``, normalised: natural-log probabilities (B, U, V), float32."""
        return self.logits(encoded, lengths, tokens).float().log_softmax(-1)

    def ctc_log_probs(self, encoded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """encoded (B, T, D) -> log probabilities (B, T x upsampling, CTC vocabulary), lengths (B,)."""
        assert self.ctc is not None
        scores = self.ctc(encoded).unflatten(-1, (self.config.ctc_upsampling, -1)).flatten(1, 2)
        return scores.float().log_softmax(-1), lengths * self.config.ctc_upsampling

    def loss(
        self,
        batch: Batch,
        *,
        attention: bool = True,
        label_smoothing: float = 0.0,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> Loss:
        """Sums of cross-entropy over text and end tokens (the prompt bears none) and of CTC over characters.

        ``attention=False`` leaves the decoder out (a phase of CTC alone); ``features`` (B, F, M) and lengths
        may be given already computed and augmented.
        """
        encoded = self.encode(*(features or self.features(batch.audio, batch.audio_lengths)))
        return self.loss_of(*encoded, batch, attention=attention, label_smoothing=label_smoothing)

    def loss_of(
        self,
        encoded: Tensor,
        encoded_lengths: Tensor,
        batch: Batch,
        *,
        attention: bool = True,
        label_smoothing: float = 0.0,
    ) -> Loss:
        """As ``loss``, of audio that is already encoded (B, T, D), lengths (B,); of ``batch`` only the targets
        count."""
        zero = encoded.new_zeros((), dtype=torch.float32)
        attention_sum, attention_count, ctc_sum, ctc_count = zero, zero, zero, zero
        if attention:
            logits = self.logits(encoded, encoded_lengths, batch.tokens[:, :-1])
            attention_sum, attention_count = attention_loss(logits, batch, label_smoothing)
        if self.ctc is not None:
            log_probs, ctc_lengths = self.ctc_log_probs(encoded, encoded_lengths)
            ctc_sum = F.ctc_loss(
                log_probs.transpose(0, 1),
                batch.characters,
                ctc_lengths,
                batch.character_lengths,
                reduction="sum",
                zero_infinity=True,
            )
            ctc_count = batch.character_lengths.sum()
        return Loss(attention_sum, attention_count, ctc_sum, ctc_count)
