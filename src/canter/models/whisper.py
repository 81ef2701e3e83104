"""Whisper's encoder (Radford et al., 2022, arXiv 2212.04356).

B: utterances, F: feature frames (10 ms), M: mel bins, T: encoder frames (20 ms), D: width. The original always sees 30
s; this one takes any length up to that, and padding never changes a valid position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from canter.models.features import length_mask
from canter.models.layers import Attention, Encoder, TransformerLayer, gelu, sinusoids, whisper_rates
from canter.models.packing import PackedMask, Packing


@dataclass(frozen=True)
class WhisperEncoderConfig:
    """Shape of the encoder; the defaults are Whisper tiny's."""

    layers: int = 4
    width: int = 384
    heads: int = 6
    feedforward: int = 1536
    mels: int = 80
    positions: int = 1500
    """Maximum number of encoder frames: 30 s."""
    dropout: float = 0.0
    dropout_attention: float = 0.0
    dropout_activation: float = 0.0
    """Dropout inside the feed-forward."""
    layer_drop: float = 0.0
    """Probability of dropping a layer in training."""

    def build(self) -> "WhisperEncoder":
        return WhisperEncoder(self)


class WhisperLayer(TransformerLayer):
    """Pre-norm self-attention and feed-forward, each residual."""

    def __init__(self, config: WhisperEncoderConfig):
        super().__init__()
        d = config.width
        self.norm_attention = nn.LayerNorm(d)
        self.attention = Attention(d, config.heads, config.dropout_attention, key_bias=False)
        self.build_feed_forward(d, config.feedforward, "gelu", config.dropout, config.dropout_activation)

    def forward(self, x: Tensor, mask: Tensor | PackedMask | None) -> Tensor:
        """Return the layer's output (B, T, D) for ``x`` (B, T, D); mask (B, 1, 1, T), None where all is attended."""
        return self.feed_forward(self.attend(x, self.norm_attention, self.attention, mask=mask))


class WhisperEncoder(Encoder):
    """Two convolutions, the second of stride 2, positions, layers, a norm."""

    positions: Tensor
    outputs = ("attention.out", "down")
    packs = True

    def __init__(self, config: WhisperEncoderConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.mels, config.width, 3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        rates = whisper_rates(config.width)
        self.register_buffer("positions", sinusoids(torch.arange(config.positions), rates, alternate=False))
        self.layers = nn.ModuleList(WhisperLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def frames(self, feature_frames):
        return (feature_frames - 1) // 2 + 1

    def embed(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        most = self.config.positions
        if self.frames(features.shape[1]) > most:
            raise ValueError(
                f"{features.shape[1]} feature frames are more than the {2 * most} for which this "
                "encoder has positions; cut it first"
            )
        if kept := self._without_silence(features):
            short = self._convolved(features[:, :kept], lengths)
            silence = short[:, -2:-1].expand(-1, self.frames(features.shape[1]) - short.shape[1], -1)
            x = torch.cat([short[:, :-1], silence, short[:, -1:]], dim=1)
        else:
            x = self._convolved(features, lengths)
        lengths = self.frames(lengths)
        return self.dropout((x + self.positions[: x.shape[1]]).to(self.conv1.weight.dtype)), lengths

    def contextualise(self, x: Tensor, lengths: Tensor | Packing) -> Tensor:
        mask = self.attention_mask(lengths, x.shape[1])
        return self.norm(self.run(x, mask, layer_drop=self.config.layer_drop))

    def _convolved(self, features: Tensor, lengths: Tensor) -> Tensor:
        x = features.transpose(1, 2) * length_mask(lengths, features.shape[1])[:, None]
        x = gelu(self.conv1(x)) * length_mask(lengths, x.shape[2])[:, None]
        # in memory as it is read, or every layer copies what it reads, and adds to what stands across
        return gelu(self.conv2(x)).transpose(1, 2).contiguous()

    def _without_silence(self, features: Tensor) -> int:
        """Return the number of frames of ``features`` (B, F, M) before the silence at the end, with a margin; 0: all.

        The convolutions give the same for silence anywhere but at the end. It is 0 on a GPU too, where one would have
        to wait to know.
        """
        if not self.same_lengths or features.device.type != "cpu" or torch.compiler.is_compiling():
            return 0
        sounding = (features != features[:, -1:]).any(2).any(0).nonzero()
        kept = (int(sounding[-1]) + 1 if len(sounding) else 0) + 6
        kept += (features.shape[1] - kept) % 2  # so that the second convolution ends on the same foot
        return kept if kept < features.shape[1] else 0
