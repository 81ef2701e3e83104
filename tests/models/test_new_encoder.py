"""A new encoder joins as one file: a configuration and a module, and a line in ENCODERS."""

from dataclasses import dataclass

import pytest
from torch import nn

import canter
from canter.errors import CheckpointError
from canter.models import model as room
from canter.models.features import length_mask
from canter.models.formats.checkpoint import save_model
from canter.models.layers import Encoder

from .conftest import small_model
from .test_invariance import make_batch


@dataclass(frozen=True)
class PoolingConfig:
    layers: int = 2
    width: int = 24
    mels: int = 32

    def build(self) -> "PoolingEncoder":
        return PoolingEncoder(self)


class PoolingEncoder(Encoder):
    """Every eighth frame through linear layers."""

    def __init__(self, config: PoolingConfig):
        super().__init__()
        self.config = config
        self.input = nn.Linear(config.mels, config.width)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers))

    def frames(self, feature_frames):
        return (feature_frames + 7) // 8

    def forward(self, features, lengths):
        return self.run(self.input(features[:, ::8])), self.frames(lengths)


def test_joins_all_that_models_do(monkeypatch, tmp_path):
    monkeypatch.setitem(room.ENCODERS, "pooling", PoolingConfig)
    model = small_model(encoder=PoolingConfig())
    batch = make_batch([8000, 5000], 500, seed=1)
    loss = model.train().loss(batch)
    (loss.attention + loss.ctc).backward()
    assert model.encoder.input.weight.grad.abs().sum() > 0
    save_model(model, tmp_path / "x")
    loaded = canter.load_model(tmp_path / "x")
    assert loaded.config == model.config
    encoded, lengths = loaded.encode(*loaded.features(batch.audio, batch.audio_lengths))
    assert lengths.tolist() == [loaded.encoder_frames(0.5), loaded.encoder_frames(5000 / 16000)]
    assert length_mask(lengths, encoded.shape[1]).sum() == lengths.sum()
    assert sum(loaded.parts().values()) == sum(p.numel() for p in loaded.parameters())
    assert loaded.cost(10.0, 40).frames == 125
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="encoder of kind 'pooling'; known: fastconformer, whisper"):
        canter.load_model(tmp_path / "x")
