"""Every cache gives the same tokens, and the comparison reports each model under each cache."""

import pytest
import torch

from canter.demo.naive import CACHES, generate
from canter.demo.shift import measure_shift
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.models.model import SpeechModel

from ..inference.conftest import noises, small_model


@pytest.fixture(scope="module")
def model() -> SpeechModel:
    return small_model()


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    clips = noises(count)
    lengths = torch.tensor([len(clip) for clip in clips])
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True), lengths


@torch.inference_mode()
def test_caches_give_the_tokens_of_the_engine(model):
    audio, lengths = batch()
    encoded, frames = model.encode(*model.features(audio, lengths))
    encoded = model.projection(encoded)
    prompt = torch.tensor([[5, 6, 7]] * 5)
    none, hidden, full = (
        generate(model.decoder, encoded, frames, prompt, 20, cache) for cache in ("none", "hidden", "full")
    )
    assert none.tolist() == hidden.tolist() == full.tolist()
    engine = Engine(model, end=-1, config=EngineConfig(tokens_per_frame=0, extra_tokens=20, max_repeats=0))
    found = engine.decode([Request(clip, [5, 6, 7]) for clip in noises(5)])
    assert [hypothesis.tokens for hypothesis in found] == full.tolist()


def test_unknown_cache(model):
    with pytest.raises(ValueError, match="no cache 'some'"):
        generate(model.decoder, torch.zeros(1, 2, 48), torch.tensor([2]), torch.tensor([[1]]), 1, "some")


def test_shift_table():
    models = {"1/3": small_model(1, 3), "3/1": small_model(3, 1)}
    rows = measure_shift(models, *batch(), tokens_per_row=6, repeats=2)
    assert [(row.shape, row.cache) for row in rows] == [(shape, cache) for shape in models for cache in CACHES]
    assert rows[0].speedup == 1
    for row in rows:
        assert row.parameters == sum(weight.numel() for weight in models[row.shape].parameters())
        assert row.speedup == pytest.approx(row.rtfx / rows[0].rtfx)
        seconds = sum(len(clip) for clip in noises(5)) / 16000
        assert row.rtfx == pytest.approx(seconds / (row.encoder_seconds + row.decoder_seconds))
