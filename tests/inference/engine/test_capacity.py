"""Default batch sizes of an engine."""

from types import SimpleNamespace

import pytest
import torch

from canter.inference.engine.engine import CPU_CACHE, Engine, default_frames, default_rows, default_window
from canter.inference.engine.requests import EngineConfig
from canter.models.cache import DecoderCache
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel

from ..conftest import END

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def canary(decoder_layers: int, dtype: torch.dtype = torch.float32) -> SpeechModel:
    """Canary's width, without memory."""
    size = {"width": 1024, "heads": 8, "feedforward": 4096}
    encoder = FastConformerConfig(layers=1, **size, subsampling_channels=256, mels=128)
    decoder = DecoderConfig(layers=decoder_layers, **size, vocabulary=5248, positions=1024)
    with torch.device("meta"):
        return SpeechModel(ModelConfig(features=FeatureConfig(mels=128), encoder=encoder, decoder=decoder)).to(dtype)


def cached(model: SpeechModel) -> int:
    """Bytes of the cross-attention's keys and values of a row, as the cache holds them."""
    decoder = model.config.decoder
    cross = DecoderCache(decoder, like=torch.empty(0, dtype=model.decoder.embedding.weight.dtype)).cross
    frames = model.encoder_frames(default_window(model))
    return 2 * decoder.layers * frames * cross.shape[3] * cross.shape[5] * cross.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_complete_windows_fit_the_memory(dtype):
    model = canary(3, dtype)
    rows = default_rows(model, CPU)
    assert 8 < rows < 64
    assert rows * cached(model) <= CPU_CACHE < (rows + 1) * cached(model)


def test_small_models_have_many_rows_and_no_model_less_than_eight(model):
    assert Engine(model, END).rows == 64
    assert default_rows(canary(24), CPU) == 8


def test_a_model_of_short_windows_has_more_rows():
    model = canary(6)
    model.generation = {"window_seconds": 10.0}
    assert default_rows(model, CPU) > 2 * default_rows(canary(6), CPU)


def test_a_gpu_takes_more(monkeypatch):
    model, found = canary(4), []
    for memory in (80e9, 2e9, 0):
        properties = SimpleNamespace(total_memory=int(memory))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, of=properties: of)
        found.append(default_rows(model, GPU))
    assert found == [128, int(2e9 / 4 / cached(model)), 8]
    assert default_frames(model, GPU) > default_frames(model, CPU)


def test_frames_in_the_layers_count():
    model, frames = canary(4), default_frames(canary(4), CPU)
    model.encoder.inner_frames = 8  # as with the adapter of Seamless
    assert Engine(model, 1).frames == default_frames(model, CPU) == frames // 8


def test_what_is_said_counts(model):
    engine = Engine(model, END, EngineConfig(rows=3, frames=7))
    assert (engine.rows, engine.frames, engine.counters.slots) == (3, 7, 3)
