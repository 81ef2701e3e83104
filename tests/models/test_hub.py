"""Models by their hub name, found in a cache laid out on disk as huggingface_hub lays it out; nothing is fetched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import canter
from canter.cli.main import main
from canter.errors import CheckpointError
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.checkpoint import save_model
from canter.models.hub import _wanted, checkpoint_of, is_hub_name
from canter.models.model import ModelConfig, SpeechModel
from canter.text import train_tokenizer
from canter.training.config import TrainConfig, load_config, rooted

constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
NAME, COMMIT, OLD = "someone/tiny-canary", "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache with one complete model, under `main` and the tag `v1`, one without weights, and one of 2 commits."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = train_tokenizer(["one two three four five"] * 20, languages=["en"], vocab_size=40)
    encoder = FastConformerConfig(layers=1, width=16, heads=2, feedforward=32, subsampling_channels=4, mels=16)
    decoder = DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=40, positions=48)
    model = SpeechModel(ModelConfig(FeatureConfig(mels=16), encoder, decoder))
    snapshots = root / "models--someone--tiny-canary" / "snapshots"
    save_model(model, snapshots / COMMIT, tokenizer)
    save_model(model, snapshots / OLD, tokenizer)
    refs = snapshots.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    (refs / "v1").write_text(OLD)
    part = root / "models--someone--part"
    (part / "snapshots" / COMMIT).mkdir(parents=True)
    (part / "snapshots" / COMMIT / "config.json").write_text("{}")
    (part / "refs").mkdir()
    (part / "refs" / "main").write_text(COMMIT)
    return root


@pytest.fixture
def offline(cache, monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache / "models--someone--tiny-canary" / "snapshots"


def test_a_name_stands_for_its_snapshot(offline):
    assert checkpoint_of(NAME) == offline / COMMIT
    assert checkpoint_of(NAME, "v1") == checkpoint_of(f"{NAME}@v1") == checkpoint_of(f"{NAME}@{OLD}") == offline / OLD
    assert canter.load(NAME, device="cpu").languages == ("en",)
    assert canter.load(NAME, device="cpu", revision="v1").name == NAME


def test_a_folder_of_that_name_goes_first(offline, tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    assert checkpoint_of(NAME) == Path(NAME)
    with pytest.raises(CheckpointError, match="is on this disk and has no revision 'v1'"):
        checkpoint_of(NAME, "v1")
    assert not is_hub_name(NAME)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "someone/other",
            "is not in the cache of the Hugging Face hub .*HF_HUB_OFFLINE is set.*hf download someone/other",
        ),
        (f"{NAME}@v2", "tiny-canary@v2 is no file or folder here.*hf download someone/tiny-canary --revision v2"),
        ("someone/part", "holds a part of it alone, without model.safetensors"),
        ("nothing", "nothing does not exist; give a run, .* such as openai/whisper-tiny.en"),
        ("large-v3", "such as openai/whisper-large-v3"),
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("models/canary.nemo", "models/canary.nemo does not exist"),
    ],
)
def test_what_is_not_there_says_in_one_line_how_to_get_it(offline, name, message):
    with pytest.raises(canter.CanterError, match=message) as caught:
        canter.load(name, device="cpu")
    assert "\n" not in str(caught.value)


def test_only_the_files_that_are_read_are_wanted():
    files = [
        ".gitattributes", "README.md", "config.json", "generation_config.json", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "model.safetensors",
        "flax_model.msgpack", "pytorch_model.bin", "tf_model.h5", "model.fp32-00001-of-00002.safetensors",
        "modeling_custom.py", "onnx/config.json",
    ]  # fmt: skip
    wanted = _wanted(NAME, files, dict)
    assert set(wanted) == {
        "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
        "vocab.json", "merges.txt", "model.safetensors",
    }  # fmt: skip
    shards = ["config.json", "model.safetensors.index.json", "a-1.safetensors", "a-2.safetensors", "b.safetensors"]
    index = {"weight_map": {"x": "a-2.safetensors", "y": "a-1.safetensors", "z": "a-1.safetensors"}}
    assert _wanted(NAME, shards, lambda _: index) == [*shards[:4]]
    pickled = ["config.json", "pytorch_model.bin.index.json", "a-1.bin", "a-2.bin", "b.bin"]
    index = {"weight_map": {"x": "a-2.bin", "y": "a-1.bin"}}
    assert _wanted(NAME, pickled, lambda _: index) == [*pickled[:4]]
    faster = ["README.md", "config.json", "model.bin", "tokenizer.json", "vocabulary.txt"]
    assert _wanted(NAME, faster, dict) == ["config.json", "tokenizer.json", "vocabulary.txt", "model.bin"]
    owsm = [
        "meta.yaml", "exp/s2t_train/config.yaml", "exp/s2t_train/valid.total_count.ave_5best.till45epoch.pth",
        "data/token_list/bpe_unigram50000/bpe.model", "data/token_list/bpe_unigram50000/tokens.txt",
    ]  # fmt: skip
    others = ["README.md", "exp/s2t_train/images/loss.png", "exp/s2t_stats/train/feats_stats.npz", "exp/RESULTS.md"]
    assert _wanted("espnet/owsm_v4", [*others, *owsm], dict) == owsm
    assert _wanted("nvidia/canary", ["README.md", "canary.nemo"], dict) == ["canary.nemo"]
    with pytest.raises(CheckpointError, match=r"holds 2 \.nemo files"):
        _wanted(NAME, ["a.nemo", "b.nemo"], dict)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors, .* with a config\.json, nor a \.nemo file"):
        _wanted(NAME, ["config.json", "tf_model.h5"], dict)


def test_commands_take_a_hub_name(offline, tmp_path, capsys):
    assert main(["info", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]
    assert main(["convert", f"{NAME}@v1", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "model.safetensors").exists()
    assert main(["transcribe", "someone/other", "x.wav"]) == 1
    assert "hf download someone/other" in capsys.readouterr().err


def test_the_environment_names_the_cache(cache, tmp_path):
    """HF_HOME and HF_HUB_OFFLINE are honoured, in a separate process, as a user sets them."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "hub").symlink_to(cache)
    code = f"from canter.models.hub import checkpoint_of; print(checkpoint_of({NAME!r}).name)"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == COMMIT, done.stderr


def test_a_run_keeps_the_name_it_starts_from(offline, tmp_path):
    assert rooted(TrainConfig(init=NAME)).init == Path(NAME)
    assert rooted(TrainConfig(init="runs")).init == tmp_path / "runs"
    (tmp_path / "config.yaml").write_text(f"init: {NAME}\nmanifest: train.jsonl\n")
    config = load_config(tmp_path / "config.yaml")
    assert (config.init, config.manifest) == (Path(NAME), (tmp_path / "train.jsonl",))


@pytest.mark.parametrize(
    "content",
    [
        '{"checkpoint": "../../elsewhere"}',
        '{"checkpoint": "/etc"}',
        '{"checkpoint": 5}',
        "[]",
        "[" * 10_000,
        "\x00",
        "",
    ],
)
def test_the_best_checkpoint_is_one_of_the_run(tmp_path, content):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"best\.json is damaged .*; name a folder of"):
        checkpoint_of(tmp_path / "run")


@pytest.mark.parametrize("shard", ["*.safetensors", "../x.safetensors", "evil.py", "a/b.safetensors", 5])
def test_an_index_of_the_hub_fetches_only_safetensors(shard):
    files = ["config.json", "model.safetensors.index.json", "evil.py", "pytorch_model.bin"]
    with pytest.raises(CheckpointError, match="refused"):
        _wanted("a/b", files, lambda _: {"weight_map": {"x": shard}})
