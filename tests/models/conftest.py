"""Small models that the tests of this room share."""

import torch

from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig, KaldiFeatureConfig, WhisperFeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.models.w2v_bert import W2vBertConfig
from canter.models.whisper import WhisperEncoderConfig


def small_config(**changes) -> ModelConfig:
    """Encoder and decoder of different widths, with a projection and a CTC head between and beside them."""
    settings = {
        "features": FeatureConfig(mels=32),
        "encoder": FastConformerConfig(layers=2, width=24, heads=2, feedforward=48, subsampling_channels=8, mels=32),
        "decoder": DecoderConfig(layers=2, width=32, heads=4, feedforward=64, vocabulary=50, positions=64),
        "ctc_vocabulary": 11,
    }
    return ModelConfig(**{**settings, **changes})


def small_model(seed: int = 0, **changes) -> SpeechModel:
    """Random weights; norms and biases moved off their neutral start so that a mix-up shows."""
    torch.manual_seed(seed)
    model = SpeechModel(small_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def small_whisper(vocabulary: int = 50):
    """Whisper's shape, without padding to 30 s."""
    return small_model(
        features=WhisperFeatureConfig(mels=32, pad_seconds=0.0),
        encoder=WhisperEncoderConfig(layers=2, width=32, heads=2, feedforward=48, mels=32, positions=200),
        decoder=DecoderConfig(
            layers=2,
            width=32,
            heads=4,
            feedforward=64,
            vocabulary=vocabulary,
            positions=64,
            learned_positions=True,
            embedding_norm=False,
            activation="gelu",
            key_bias=False,
            head_bias=False,
        ),
        ctc_vocabulary=0,
    )


def small_w2v_bert(**changes):
    """The encoder of Seamless, with chunks of attention and clamped distances that short clips reach."""
    encoder = W2vBertConfig(layers=2, width=24, heads=2, feedforward=48, kernel_size=5, mels=32, most_before=6,
                            most_after=2, chunk_frames=16, chunks_before=1, adapter_stride=4)  # fmt: skip
    return small_model(features=KaldiFeatureConfig(mels=32), encoder=encoder, **changes)
