"""Model folders: the same model comes back; a bad folder says what is wrong; a half-written one is never
seen."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import canter
from canter.errors import CheckpointError
from canter.loading import load_model
from canter.models.formats.checkpoint import save_model
from canter.models.hub import checkpoint_of

from ..conftest import small_model


@dataclass
class OddTokenizer:
    vocab_size: int = 50

    def save(self, folder: Path) -> None:
        (folder / "odd.txt").write_text("odd")


def outputs(model):
    audio = torch.sin(torch.arange(2 * 8000).view(2, 8000) / 7.0)
    with torch.no_grad():
        encoded, lengths = model.encode(*model.features(audio, torch.tensor([8000, 5000])))
        return model.log_probs(encoded, lengths, torch.tensor([[1, 2, 3], [4, 5, 6]]))


@pytest.fixture
def folder(tmp_path):
    save_model(small_model(), tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(folder):
    loaded = canter.load_model(folder)
    assert torch.equal(outputs(loaded), outputs(small_model()))
    assert loaded.config == small_model().config
    assert not loaded.training


def test_bfloat16_keeps_features_exact(folder):
    model = canter.load_model(folder, dtype=torch.bfloat16)
    assert model.decoder.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(model.features.filters, small_model().features.filters)
    assert (outputs(model) - outputs(small_model())).abs().max() < 0.5


def test_replaces_a_model_and_nothing_else(folder, tmp_path):
    save_model(small_model(seed=1), folder)
    assert torch.equal(outputs(canter.load_model(folder)), outputs(small_model(seed=1)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a model folder"):
        save_model(small_model(), tmp_path / "thesis")
    (tmp_path / "thesis" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a model folder"):
        save_model(small_model(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    save_model(small_model(), folder / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"holds more than a model \(checkpoint-1\)"):
        save_model(small_model(), folder)
    assert (folder / "checkpoint-1" / "model.safetensors").exists()


def test_failure_while_writing_leaves_what_was_there(folder, tmp_path):
    class Failing(OddTokenizer):
        def save(self, folder: Path) -> None:
            raise OSError("disk full")

    before = outputs(canter.load_model(folder))
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            save_model(small_model(seed=2), target, Failing())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(outputs(canter.load_model(folder)), before)


def rewrite_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rewrite_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


FAULTS = {
    "missing: decoder.norm.weight": lambda f: rewrite_tensors(f, lambda t: t.pop("decoder.norm.weight")),
    "unexpected: extra": lambda f: rewrite_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
    r"decoder.head_bias \(3,\) instead of \(50,\)": lambda f: rewrite_tensors(
        f, lambda t: t.update({"decoder.head_bias": torch.zeros(3)})
    ),
    "truncated": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
    "model.safetensors is missing": lambda f: (f / "model.safetensors").unlink(),
    "config.json is missing": lambda f: (f / "config.json").unlink(),
    "not JSON": lambda f: (f / "config.json").write_text("{"),
    "not a JSON object": lambda f: (f / "config.json").write_text("[]"),
    "not a Canter model": lambda f: (f / "config.json").write_text("{}"),
    "unknown setting 'colour'": lambda f: rewrite_config(f, lambda c: c["decoder"].update(colour="red")),
    "width: expected int, found 'wide'": lambda f: rewrite_config(f, lambda c: c["decoder"].update(width="wide")),
    r"encoder.width is -1; it must be from 1 to 16,384": lambda f: rewrite_config(
        f, lambda c: c["encoder"].update(width=-1)
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_named(folder, message):
    FAULTS[message](folder)
    with pytest.raises(CheckpointError, match=message):
        canter.load_model(folder)


def test_not_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        canter.load_model(tmp_path / "nothing")


def test_tokenizer_must_fit(tmp_path):
    with pytest.raises(CheckpointError, match="51 ids"):
        save_model(small_model(), tmp_path / "model", OddTokenizer(vocab_size=51))
    assert not (tmp_path / "model").exists()


def test_an_adapter_is_distinguished_from_a_model(tmp_path):
    """A PEFT adapter holds a few matrices that change a model in another folder."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "openai/whisper-tiny"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for read in (load_model, checkpoint_of):
        with pytest.raises(
            CheckpointError, match="is a PEFT adapter of openai/whisper-tiny, not a model: name that model"
        ):
            read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="is a PEFT adapter of a model that it does not name"):
        checkpoint_of(tmp_path)
