"""convert and info on real and written models, through the modules that the command line runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

import canter
from canter.cli import convert, info
from canter.cli.main import main
from canter.errors import CheckpointError, ConfigError
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.checkpoint import save_model
from canter.models.model import ModelConfig, SpeechModel, utterance_cost

CONFIG = ModelConfig(
    features=FeatureConfig(mels=32),
    encoder=FastConformerConfig(
        layers=2, width=32, heads=2, feedforward=64, subsampling_channels=8, mels=32, dropout=0.0
    ),
    decoder=DecoderConfig(layers=2, width=32, heads=4, feedforward=64, vocabulary=50, positions=64),
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    return save_model(SpeechModel(CONFIG), tmp_path / "model")


def test_there_and_back(folder, tmp_path, capsys):
    convert.run(convert.Options(folder, tmp_path / "hf", format="huggingface"))
    convert.run(convert.Options(tmp_path / "hf", tmp_path / "back"))
    assert "parameters, without a tokenizer" in capsys.readouterr().out
    ours, again = canter.load_model(folder), canter.load_model(tmp_path / "back")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())


def test_a_runs_folder_stands_for_its_checkpoint(folder, tmp_path, capsys):
    save_model(canter.load_model(folder), tmp_path / "run" / "checkpoints" / "step-000001")
    convert.run(convert.Options(tmp_path / "run", tmp_path / "copy"))
    info.run(info.Options(tmp_path / "run"))
    assert str(tmp_path / "run") in capsys.readouterr().out
    assert (tmp_path / "copy" / "model.safetensors").exists()


def test_a_file_that_is_not_an_archive_is_one_line(tmp_path, capsys):
    (tmp_path / "a.wav").write_bytes(b"not an archive")
    assert main(["info", str(tmp_path / "a.wav")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_dtype(folder, tmp_path):
    convert.run(convert.Options(folder, tmp_path / "half", precision="bf16"))
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_refusals(folder, tmp_path):
    with pytest.raises(ConfigError, match="exists; choose another name, or --overwrite"):
        convert.run(convert.Options(folder, folder))
    with pytest.raises(ConfigError, match="the model itself"):
        convert.run(convert.Options(folder, folder, overwrite=True))
    inside = save_model(canter.load_model(folder), tmp_path / "run" / "checkpoints" / "step-000001")
    with pytest.raises(ConfigError, match="the model itself"):
        convert.run(convert.Options(tmp_path / "run", inside, overwrite=True))
    for target in (inside.parent, tmp_path):
        with pytest.raises(ConfigError, match="holds the model"):
            convert.run(convert.Options(inside, target, overwrite=True))
    assert (inside / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        convert.run(convert.Options(folder, tmp_path / "x.nemo"))
    with pytest.raises(CheckpointError, match="does not exist"):
        convert.run(convert.Options(Path("nowhere"), tmp_path / "x"))
    with pytest.raises(ConfigError, match="must be above 0"):
        info.run(info.Options(folder, seconds=0))


def test_info(folder, capsys):
    info.run(info.Options(folder))
    shown = capsys.readouterr().out
    assert "fastconformer, 2 layers, width 32, heads 2" in shown
    info.run(info.Options(folder, json=True))
    figures = json.loads(capsys.readouterr().out)
    model = canter.load_model(folder)
    assert figures["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert figures["utterance"]["frames"] == 125
    assert figures["utterance"]["tokens"] == 40


def test_parts_add_up():
    model = SpeechModel(CONFIG)
    assert sum(model.parts().values()) == sum(p.numel() for p in model.parameters())


def test_operations_by_hand():
    """The decoder's matrix products: 2 x rows x columns for each position of tokens or frames."""
    cost = utterance_cost(CONFIG, seconds=8.0, tokens=20)
    d, f, v, t, u = 32, 64, 50, 100, 20
    assert cost.frames == t
    linear = u * (4 + 2) * d * d + t * 2 * d * d + u * 2 * d * f
    attention = 2 * u * u * d + 2 * u * t * d
    assert cost.decoder_flops == 2 * (2 * (linear + attention) + u * d * v)
    assert cost.cache_values == 2 * 2 * 32 * (t + u)


def test_memory_of_training_is_what_autograd_keeps():
    """Against a real pass: distinct storages that are saved for backward, parameters left out."""
    cost = utterance_cost(CONFIG, seconds=8.0, tokens=20)
    model = SpeechModel(CONFIG).train()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        encoded, lengths = model.encode(torch.randn(1, 800, 32), torch.tensor([800]))
        model.log_probs(encoded, lengths, torch.zeros(1, 20, dtype=torch.long)).sum()
    assert cost.training_bytes == pytest.approx(sum(kept.values()), rel=0.15)


def test_help_names_every_option():
    import tyro

    for module in (convert, info):
        assert sys.modules[module.__name__].__doc__
        with pytest.raises(SystemExit):
            tyro.cli(module.Options, args=["--help"])
