"""Growing an encoder changes nothing at first; shrinking keeps the layers that were asked for."""

import json

import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

import canter
from canter.cli import reshape as command
from canter.errors import ConfigError
from canter.models.formats.checkpoint import save_model
from canter.models.reshape import StackTime, encoder_layers_that_keep, grown_layers, kept_layers, measure_times, reshape

from .conftest import small_model, small_whisper
from .test_invariance import make_batch, run


@pytest.mark.parametrize("make", [small_model, small_whisper])
@pytest.mark.parametrize("layers", [3, 4, 7])
@torch.no_grad()
def test_growth_by_identities_keeps_the_function(make, layers):
    model, batch = make(), make_batch([12000, 7000], 0, seed=1)
    grown = reshape(model, encoder_layers=layers)
    assert len(grown.encoder.layers) == grown.config.encoder.layers == layers
    for ours, theirs in zip(run(grown, batch), run(model, batch), strict=True):
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    copied = reshape(model, encoder_layers=layers, growth="copy")
    assert (run(copied, batch)[0] - run(model, batch)[0]).abs().max() > 0.01


@pytest.mark.parametrize("make", [small_model, small_whisper])
def test_new_layers_learn(make):
    model, batch = reshape(make(), encoder_layers=3).train(), make_batch([12000, 7000], 0, seed=1)
    loss = model.loss(batch)
    loss.attention.backward()
    for name in model.encoder.outputs:
        grown = [model.encoder.layers[place].get_submodule(name) for place in (1, 2)]
        assert any(module.weight.grad.abs().sum() > 0 for module in grown)


def test_original_is_untouched():
    model = small_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    reshape(model, encoder_layers=5, decoder_layers=1)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_decoder_keeps_its_layers():
    model = small_model()
    for kept, source in (("first", 0), ("last", 1), ("spread", 0)):
        smaller = reshape(model, decoder_layers=1, kept=kept)
        ours = smaller.decoder.layers[0].state_dict()
        theirs = model.decoder.layers[source].state_dict()
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@given(st.integers(1, 48), st.integers(1, 48))
def test_orders(a, b):
    small, large = sorted((a, b))
    for way in ("even", "spread"):
        kept = kept_layers(small, large, way)
        assert len(set(kept)) == small
        assert kept == sorted(kept)
        assert kept[0] == 0
        assert small == 1 or way == "even" or kept[-1] == large - 1
    grown = grown_layers(large, small)
    assert len(grown) == large
    assert [source for source, new in grown if not new] == list(range(small))
    assert [source for source, _ in grown] == sorted(source for source, _ in grown)
    counts = [sum(source == place for source, _ in grown) for place in range(small)]
    assert max(counts) - min(counts) <= 1


def test_layers_kept():
    assert kept_layers(2, 4, "spread") == [0, 3]
    assert kept_layers(2, 4) == [0, 2]
    assert kept_layers(4, 24, "even") == [0, 6, 12, 18]
    assert kept_layers(2, 4, "first") == [0, 1]
    assert kept_layers(2, 4, "last") == [2, 3]
    assert kept_layers(1, 4) == kept_layers(1, 4, "even") == [0]


def test_keeping_parameters_and_operations():
    model = small_whisper()
    total = sum(model.parts().values())
    layers = encoder_layers_that_keep("parameters", model.config, 1, 2.0, 10)
    assert layers > 2
    again = sum(reshape(model, encoder_layers=layers, decoder_layers=1).parts().values())
    layer = sum(p.numel() for p in model.encoder.layers[0].parameters())
    assert abs(again - total) <= layer / 2 + 1
    assert encoder_layers_that_keep("flops", model.config, 2, 2.0, 10) == 2


@torch.no_grad()
def test_real_whisper_grown_by_identities(shared):
    """Four layers to six: one clip padded to 30 s gives the same encoder output and log-probabilities."""
    model = canter.load_model(shared / "models" / "whisper-tiny.en")
    file = min((shared / "data" / "speech" / "an4" / "flac").glob("*.flac"))
    audio = torch.from_numpy(soundfile.read(file, dtype="float32")[0])[None]
    features = model.features(audio, torch.tensor([audio.shape[1]]))
    tokens = torch.tensor([[*model.prompt(), *model.tokenizer.encode(" one two three")]])
    outputs = []
    for one in (model, reshape(model, encoder_layers=6)):
        encoded, lengths = one.encode(*features)
        outputs.append((encoded, one.log_probs(encoded, lengths, tokens)))
    (before, log_probs), (after, log_probs_after) = outputs
    assert (after - before).abs().max() < 1e-5
    assert (log_probs_after - log_probs).abs().max() < 1e-5


def test_refusals():
    with pytest.raises(ConfigError, match="decoders only shrink"):
        reshape(small_model(), decoder_layers=3)


def test_times_are_predicted_from_layers():
    times = measure_times(small_model(), seconds=1.0, tokens=4, batch=1)
    assert times.encoder.of(4) >= times.encoder.of(2) > 0
    assert StackTime(1.0, 0.5).of(4) == 3.0


def test_command(tmp_path, capsys):
    save_model(small_model(), tmp_path / "model")
    options = {"decoder_layers": 1, "seconds": 1.0, "tokens_per_second": 4.0, "batch_size": 1}
    command.run(command.Options(tmp_path / "model", tmp_path / "a", match="parameters", json=True, **options))
    figures = json.loads(capsys.readouterr().out)
    assert figures["after"]["decoder_layers"] == 1
    assert figures["after"]["encoder_layers"] == canter.load_model(tmp_path / "a").config.encoder.layers
    assert figures["after"]["decoder_seconds"] <= figures["before"]["decoder_seconds"]
    command.run(command.Options(tmp_path / "model", tmp_path / "b", **options))
    assert "decoder, predicted ms" in capsys.readouterr().out
    command.run(command.Options(tmp_path / "model", tmp_path / "k", match="flops", **options))
    told = capsys.readouterr().out
    assert "encoder keeps its 2 layers: the decoder lost less than half a layer's flops" in told
    assert "train it further" in told
    grown = {"encoder_layers": 3, "seconds": 1.0, "tokens_per_second": 4.0}
    command.run(command.Options(tmp_path / "model", tmp_path / "e", **grown))
    assert "train it further" not in capsys.readouterr().out  # nothing was lost
    with pytest.raises(ConfigError, match="exclude each other"):
        command.run(command.Options(tmp_path / "model", tmp_path / "c", match="flops", encoder_layers=3))
    with pytest.raises(ConfigError, match="exists"):
        command.run(command.Options(tmp_path / "model", tmp_path / "a"))
