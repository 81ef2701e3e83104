"""Canter's own model: features, encoder, decoder, and an optional CTC head.

B: utterances, S: samples, F: feature frames (10 ms), M: mel bins, T: encoder frames, D: width, U: tokens,
V: vocabulary, C: characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.batch import (
    Batch,
    Loss,
    SoftTargets,
    attention_loss,
    distillation_loss,
    packing_of_tokens,
    targets_of,
)
from canter.models.cost import UtteranceCost, measure_cost
from canter.models.decoder import Decoder, DecoderConfig
from canter.models.ebranchformer import EBranchformerConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import EspnetFeatureConfig, FeatureConfig, KaldiFeatureConfig, WhisperFeatureConfig
from canter.models.layers import EncoderConfig
from canter.models.lora import AdapterBank, LoraAdapter
from canter.models.packing import Packing
from canter.models.protocol import Capability
from canter.models.w2v_bert import W2vBertConfig
from canter.models.whisper import WhisperEncoderConfig
from canter.runtime import upload
from canter.text.prompts import CONTEXTS, format_of

if TYPE_CHECKING:
    from canter.text import Characters

FEATURES: dict[str, type] = {
    "nemo": FeatureConfig,
    "whisper": WhisperFeatureConfig,
    "espnet": EspnetFeatureConfig,
    "kaldi": KaldiFeatureConfig,
}
ENCODERS: dict[str, type] = {
    "fastconformer": FastConformerConfig,
    "whisper": WhisperEncoderConfig,
    "e_branchformer": EBranchformerConfig,
    "w2v_bert": W2vBertConfig,
}
"""Kinds of encoders that a checkpoint can name; a new encoder joins by one line here."""
SUPPORTED = frozenset[Capability](get_args(Capability))


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of all parts of a model."""

    features: FeatureConfig | WhisperFeatureConfig | EspnetFeatureConfig | KaldiFeatureConfig = field(
        default_factory=FeatureConfig
    )
    encoder: EncoderConfig = field(default_factory=FastConformerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    projected: bool = False
    """Project the encoder's output linearly where both widths are equal too (Cohere Transcribe)."""
    ctc_vocabulary: int = 0
    """Outputs of the auxiliary CTC head, blank (id 0) included; 0: no head."""
    ctc_upsampling: int = 2
    """CTC outputs per encoder frame: characters come faster than one every 80 ms."""


class SpeechModel(nn.Module):
    """Canter's model: audio to scores of text. Padding never changes a valid position."""

    tokenizer: Any  # a Tokenizer of any kind, or None
    """The checkpoint's tokenizer; None until one is attached."""
    characters: Characters | None
    """The alphabet of the CTC head."""
    generation: dict[str, Any]
    """Settings for decoding (token ids, suppressed tokens), named as in Hugging Face's ``generation_config.json``."""
    adapter: LoraAdapter | None = None
    """The LoRA adapter that is trained, if any."""
    bank: AdapterBank | None = None
    """Adapters of which each row of a batch has one, or none, in decoding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tokenizer, self.characters, self.generation = None, None, {}
        self.features = config.features.build()
        self.encoder = config.encoder.build()
        self.encoder.same_lengths = self.padded_seconds > 0
        narrow, wide = config.encoder.width, config.decoder.width
        projected = config.projected or narrow != wide
        self.projection = nn.Linear(narrow, wide) if projected else nn.Identity()
        self.decoder = Decoder(config.decoder)
        self.ctc = nn.Linear(narrow, config.ctc_upsampling * config.ctc_vocabulary) if config.ctc_vocabulary else None

    # -- what any model offers; see `canter.models.protocol` --

    @property
    def format(self) -> str:
        """Name of the format that it is saved in (see `canter.loading`)."""
        return "canter"

    @property
    def supports(self) -> Set[Capability]:
        """All features; a CTC head on the decoder's tokens, as OWSM's, has no characters, and the tokenizer decides on
        language detection and previous text."""
        lacking = set[Capability]() if self.encoder.packs else {"packing"}
        if self.characters is None and self.config.ctc_vocabulary == self.config.decoder.vocabulary:
            lacking.add("characters")
        if self.tokenizer is not None:
            if not getattr(self.tokenizer, "detects_language", False) or len(self.tokenizer.languages) < 2:
                lacking.add("language_detection")
            if not {*CONTEXTS} & {*format_of(self.tokenizer)}:
                lacking.add("previous_text")
        return SUPPORTED - lacking

    @property
    def frame_seconds(self) -> float:
        """Seconds of audio per encoder frame."""
        seconds = self.padded_seconds or 100.0
        return round(seconds / self.encoder_frames(seconds), 6)

    @property
    def padded_seconds(self) -> float:
        """Seconds that every utterance is padded to; 0: to the longest of its batch."""
        return getattr(self.config.features, "pad_seconds", 0.0)

    @property
    def longest_seconds(self) -> float:
        """Maximum seconds of an utterance: Whisper's encoder has positions only for 30 s."""
        positions = getattr(self.config.encoder, "positions", math.inf)
        return self.padded_seconds or positions / self.encoder_frames(100.0) * 100.0

    @property
    def sample_rate(self) -> int:
        """Samples per second of its input."""
        return self.config.features.sample_rate

    @property
    def positions(self) -> int:
        """Maximum number of tokens, prompt and end token included."""
        return self.config.decoder.positions

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.config.decoder.vocabulary

    @property
    def width(self) -> int:
        """D of the encoder."""
        return self.config.encoder.width

    @property
    def shape(self) -> str:
        """Text that is equal for two models that take the same memory and time."""
        layers = f"{self.config.encoder.layers}/{self.config.decoder.layers} x {self.width}"
        return f"{type(self.encoder).__name__} {layers}, vocabulary {self.vocabulary}"

    @property
    def recomputes(self) -> bool:
        """True while activation checkpointing is on."""
        return self.encoder.recompute

    def recompute_activations(self, on: bool = True) -> None:
        """Switch activation checkpointing: training takes about a third longer, with far less memory."""
        self.encoder.recompute = self.decoder.recompute = on

    def encoder_frames(self, seconds: float) -> int:
        """Return T of an utterance of ``seconds``."""
        samples = round(seconds * self.config.features.sample_rate)
        return int(self.encoder.frames(max(1, self.features.frames(samples))))

    def layers(self) -> Mapping[str, Mapping[str, object]]:
        """Return the settings of features, encoder, decoder and, if it has one, CTC head."""
        config = self.config
        parts: dict[str, Mapping[str, object]] = {
            "features": {"kind": part_kind(config.features), **asdict(config.features)},
            "encoder": {"kind": part_kind(config.encoder), **asdict(config.encoder)},  # pyright: ignore[reportArgumentType]
            "decoder": asdict(config.decoder),
        }
        if self.ctc is not None:
            parts["ctc"] = {"vocabulary": config.ctc_vocabulary, "upsampling": config.ctc_upsampling}
        return parts

    def parts(self) -> dict[str, int]:
        """Return the number of parameters by part; the head is the embedding's matrix, counted once."""
        encoder, decoder = _count(self.encoder), _count(self.decoder)
        encoder_layers, decoder_layers = _count(self.encoder.layers), _count(self.decoder.layers)
        embedding = self.decoder.embedding.weight.numel()
        counts = {
            "encoder input": encoder - encoder_layers,
            "encoder layers": encoder_layers,
            "projection": _count(self.projection),
            "embedding": embedding,
            "decoder layers": decoder_layers,
            "decoder norms and head": decoder - decoder_layers - embedding,
            "CTC head": _count(self.ctc),
        }
        return {name: count for name, count in counts.items() if count}

    def cost(self, seconds: float, tokens: int) -> UtteranceCost:
        """Return FLOPs and memory of an utterance of ``seconds`` and ``tokens``."""
        return utterance_cost(self.config, seconds, tokens)

    # -- only Canter's models --

    def prompt(self, **slots: str) -> list[int]:
        """Return the token ids of the prompt with these slots (``source_lang="en"``, ``pnc="yes"``, ...).

        Raises ConfigError for an unknown slot or value, ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; set model.tokenizer, or load a model that has one")
        return self.tokenizer.prompt_ids(slots)

    def set_features(self, **changes: float) -> None:
        """Change settings of the features, such as ``pad_seconds=0`` (Whisper at any length)."""
        features = replace(self.config.features, **changes)  # pyright: ignore[reportArgumentType]
        self.config = replace(self.config, features=features)
        kept = self.features.state_dict()  # statistics, which do not change with the settings
        self.features = features.build().to(self.features.filters.device).train(self.training)
        self.features.load_state_dict(kept)
        self.encoder.same_lengths = self.padded_seconds > 0

    def set_bank(self, bank: AdapterBank) -> None:
        """Use a bank whose adapters are attached to the layers (see `canter.models.lora.attach_bank`)."""
        self.bank = self.decoder.bank = bank

    def encode(
        self, features: Tensor, lengths: Tensor, *, adapters: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the encoder output (B, T, D), before its projection, and lengths (B,) of features (B, F, M), (B,).

        adapters: number of each row's adapter in the bank, 0 for none (default: none has one).
        """
        if self.bank:
            self.bank.rows = upload(adapters, features.device) if adapters and any(adapters) else None
        return self.encoder(features.to(next(self.encoder.parameters()).dtype), lengths)

    def encode_packed(self, features: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Packing]:
        """Return the encoder's output (1, N, D) of groups of features (B, F, M), (B,), and where utterances stand."""
        weight = next(self.encoder.parameters())
        return self.encoder.packed([(one.to(weight.dtype), lengths) for one, lengths in features])

    def logits(self, encoded: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """Return logits (B, U, V) of the next tokens, for encoded (B, T, D), lengths (B,) and tokens (B, U)."""
        return self.decoder(tokens, self.projection(encoded), lengths)

    def log_probs(self, encoded: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """Return natural-log probabilities (B, U, V), float32; arguments as of ``logits``."""
        return self.logits(encoded, lengths, tokens).float().log_softmax(-1)

    def ctc_log_probs(self, encoded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return CTC's log probabilities (B, T x upsampling, C) and lengths (B,) for encoded (B, T, D)."""
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
        teacher: SoftTargets | None = None,
    ) -> Loss:
        """Return sums of cross-entropy over text and end tokens (not the prompt) and of CTC over its targets, if any.

        ``attention=False`` skips the decoder (CTC-only warm-up); ``features`` (B, F, M) and lengths (B,) may be given,
        already computed and augmented. With ``teacher``, the divergence from it too.
        """
        encoded = self.encode(*(features or self.features(batch.audio, batch.audio_lengths)))
        return self.loss_of(*encoded, batch, attention=attention, label_smoothing=label_smoothing, teacher=teacher)

    def packed_loss(
        self,
        groups: Sequence[Batch],
        *,
        attention: bool = True,
        label_smoothing: float = 0.0,
        features: Sequence[tuple[Tensor, Tensor]] | None = None,
        teacher: SoftTargets | None = None,
    ) -> Loss:
        """Return what ``loss`` does for the utterances of all groups, computed without padding (see `Packing`).

        groups: as `Batch.by_length` makes them. features: of each group. The teacher's logits are packed.
        """
        features = features or [self.features(one.audio, one.audio_lengths) for one in groups]
        encoded, frames = self.encode_packed(features)
        decoded = None
        if attention:
            own = packing_of_tokens(groups)
            inputs = [one.tokens[:, :-1] for one in groups]
            logits = self.decoder.packed(inputs, own, self.projection(encoded), frames)
            decoded = logits, own.pack([targets_of(one) for one in groups])
        parts = zip(frames.split(encoded), frames.lengths, groups) if self.ctc is not None else ()
        return self._losses(decoded, list(parts), label_smoothing, teacher)

    def token_logits(self, batch: Batch) -> Tensor:
        """Return logits (B, U - 1, V) of the tokens after the first."""
        encoded = self.encode(*self.features(batch.audio, batch.audio_lengths))
        return self.logits(*encoded, batch.tokens[:, :-1])

    def loss_of(
        self,
        encoded: Tensor,
        encoded_lengths: Tensor,
        batch: Batch,
        *,
        attention: bool = True,
        label_smoothing: float = 0.0,
        teacher: SoftTargets | None = None,
    ) -> Loss:
        """Return the losses of audio that is already encoded (B, T, D), lengths (B,); ``batch`` gives the targets."""
        decoded = None
        if attention:
            decoded = self.logits(encoded, encoded_lengths, batch.tokens[:, :-1]), targets_of(batch)
        return self._losses(decoded, [(encoded, encoded_lengths, batch)], label_smoothing, teacher)

    def _losses(
        self,
        decoded: tuple[Tensor, Tensor] | None,
        parts: Sequence[tuple[Tensor, Tensor, Batch]],
        label_smoothing: float,
        teacher: SoftTargets | None,
    ) -> Loss:
        """Return the losses of logits (..., V) and targets (...), and those of CTC.

        parts: encoder outputs (B, T, D), lengths (B,) and the batch that has their characters; may be empty without a
        CTC head.
        """
        zero = torch.zeros((), dtype=torch.float32, device=next(self.parameters()).device)
        attention_sum, attention_count, ctc_sum, ctc_count, distillation = zero, zero, zero, zero, None
        if decoded:
            attention_sum, attention_count = attention_loss(*decoded, label_smoothing)
            distillation = distillation_loss(decoded[0], teacher, decoded[1]) if teacher else None
        if self.ctc is not None and any(batch.characters.shape[1] for _, _, batch in parts):
            for encoded, lengths, batch in parts:
                ctc_sum = ctc_sum + _ctc_loss(*self.ctc_log_probs(encoded, lengths), batch)
            ctc_count = torch.stack([batch.character_lengths.sum() for _, _, batch in parts]).sum()
        return Loss(attention_sum, attention_count, ctc_sum, ctc_count, distillation)


def _ctc_loss(log_probs: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
    """Return the sum of the CTC loss of log probabilities (B, T, C), lengths (B,), over the batch's characters."""
    return F.ctc_loss(
        log_probs.transpose(0, 1),
        batch.characters,
        lengths,
        batch.character_lengths,
        reduction="sum",
        zero_infinity=True,
    )


def part_kind(part: object) -> str:
    """Return the name of a kind of features or encoder, as checkpoints have it."""
    kinds = (*FEATURES.items(), *ENCODERS.items())  # a name may stand for both
    return next(name for name, cls in kinds if cls is type(part))


def utterance_cost(config: ModelConfig, seconds: float = 10.0, tokens: int = 40) -> UtteranceCost:
    """Return FLOPs and memory of an utterance for a model of this shape, which is run without storage."""
    with torch.device("meta"):
        model = SpeechModel(config).train()
        frames = max(1, int(model.features.frames(round(seconds * config.features.sample_rate))))
        inputs = torch.zeros(1, frames, config.features.mels)
        lengths = torch.zeros(1, dtype=torch.long)
        ids = torch.zeros(1, tokens, dtype=torch.long)
    return measure_cost(
        model,
        seconds,
        tokens,
        encode=lambda: model.encode(inputs, lengths),
        decode=lambda encoded: model.logits(encoded[0], lengths, ids),
        cached=2 * config.decoder.layers * config.decoder.width,
    )


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
