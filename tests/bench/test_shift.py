"""Every cache gives the same tokens, and the comparison reports each model under each cache."""

import pytest
import torch

from canter.bench.naive import CACHES, generate
from canter.bench.shift import (
    WAYS,
    canary_config,
    matched_encoder_layers,
    measure_shift,
    measure_ways,
)
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.models.model import SpeechModel

from ..inference.conftest import noises, small_model


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


def test_both_ways_decode_the_same_queue():
    """Every row is as long as requested; the released method waits for the longest row of a batch, ours does not."""
    models = {"1/3": small_model(1, 3), "3/1": small_model(3, 1)}
    clips, tokens = noises(9), [2, 30, 3, 4, 2, 25, 3, 2, 4]
    rows = measure_ways(models, clips, tokens, repeats=1, rows=4, batch=9)
    assert [(row.shape, row.way) for row in rows] == [(shape, way) for shape in models for way in WAYS]
    for row in rows:
        assert row.useful_rows == (pytest.approx(sum(tokens) / (9 * 30)) if row.way == "released" else 1.0)
        assert row.encoder_seconds + row.decoder_seconds <= row.seconds
        assert row.rtfx == pytest.approx(sum(map(len, clips)) / 16000 / row.seconds)


def test_matched_shapes_have_the_parameters_of_the_first():
    def size(encoder: int, decoder: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in SpeechModel(canary_config(encoder, decoder, 128)).parameters())

    layer = size(2, 1) - size(1, 1)
    for decoder in (4, 24):
        matched = matched_encoder_layers(24, 24, decoder, 128)
        assert abs(size(matched, decoder) - size(24, 24)) <= layer / 2
    with torch.device("meta"):
        flash = SpeechModel(canary_config(32, 4))
    assert sum(p.numel() for p in flash.parameters()) == pytest.approx(883e6, rel=0.02)  # canary-1b-flash
