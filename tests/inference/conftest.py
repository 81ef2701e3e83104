"""A small random model whose greedy hypotheses differ with the audio and end at different lengths."""

import numpy as np
import pytest
import torch

from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel

END = 3


def small_model(
    encoder_layers: int = 2, decoder_layers: int = 2, positions: int = 64, vocabulary: int = 40, seed: int = 0
) -> SpeechModel:
    """Random weights; attention is made sharp, so that the audio and the prompt decide what is said."""
    torch.manual_seed(seed)
    config = ModelConfig(
        features=FeatureConfig(mels=16),
        encoder=FastConformerConfig(
            layers=encoder_layers, width=32, heads=2, feedforward=64, subsampling_channels=8, mels=16
        ),
        decoder=DecoderConfig(
            layers=decoder_layers, width=48, heads=4, feedforward=96, vocabulary=vocabulary, positions=positions
        ),
        ctc_vocabulary=12,
    )
    model = SpeechModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        for layer in model.decoder.layers:
            layer.cross_attention.query.weight *= 8
            layer.cross_attention.value.weight *= 4
            layer.self_attention.query.weight *= 8
            layer.self_attention.value.weight *= 4
        model.decoder.head_bias[END] = 1.0
    return model


def noises(count: int, seed: int = 0, shortest: float = 0.2, longest: float = 2.5) -> list[np.ndarray]:
    """Modulated noise of various lengths."""
    random = np.random.default_rng(seed)
    clips = []
    for _ in range(count):
        samples = int(16000 * random.uniform(shortest, longest))
        rise = np.sin(np.arange(samples) / random.uniform(300, 3000)) + 1.1
        clips.append((random.normal(size=samples) * rise * 0.1).astype(np.float32))
    return clips


@pytest.fixture(scope="session")
def model() -> SpeechModel:
    return small_model()
