"""Code that comes with a model, in every place from which transformers, NeMo or torch could run it, is never run."""

import io
import json
import pickle
import shutil
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import canter
from canter.errors import CheckpointError

from .small_transformers import make, word_tokenizer

from canter.integrations.transformers import TransformersModel  # isort: skip  # only where transformers is installed

AUTO = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForSpeechSeq2Seq",
    "AutoTokenizer",
    "AutoFeatureExtractor",
    "AutoProcessor",
)
CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
class Evil:
    def __init__(self, *args, **kwargs): pass
    @classmethod
    def from_pretrained(cls, *args, **kwargs): return cls()
def generate(*args, **kwargs): return None
"""


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of a family that runs through transformers, and one of a family that Canter reads."""
    root = tmp_path_factory.mktemp("models")
    for family in ("moonshine", "whisper"):
        torch.manual_seed(0)
        model, extractor = make(family)
        for part in (model, extractor, word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")):
            part.save_pretrained(root / family)
        if family == "whisper":  # no tokenizer of Whisper's; Canter wants none
            (root / family / "tokenizer.json").unlink()
    return root


@pytest.fixture
def planted(sound, tmp_path, monkeypatch):
    """``planted(family)``: the folder with code wherever it may lie, and the file that the code would make."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    def plant(family):
        folder, marker = tmp_path / family, tmp_path / "code-was-run"
        shutil.copytree(sound / family, folder)
        code = CODE.format(marker=str(marker))
        for name in ("evil", "__init__", "conftest", "sitecustomize", "setup", "modeling_moonshine", "tokenizer",
                     "config", "transformers", "custom_generate/generate"):  # fmt: skip
            (folder / f"{name}.py").parent.mkdir(exist_ok=True)
            (folder / f"{name}.py").write_text(code)
        pickled = pickle.dumps({"model": Payload(marker)}, protocol=2)
        for name in ("pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin", "tokenizer.pkl", "vocab.pkl",
                     "flax_model.msgpack", "tf_model.h5", "adapter_model.bin"):  # fmt: skip
            (folder / name).write_bytes(pickled)
        (folder / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('touch ' + marker) }}")
        (folder / "custom_generate" / "requirements.txt").write_text("evil")
        autos = dict.fromkeys(AUTO, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        for name in ("config", "tokenizer_config", "preprocessor_config", "processor_config", "generation_config"):
            file = folder / f"{name}.json"
            values = json.loads(file.read_text()) if file.exists() else {}
            values |= {"auto_map": autos, "custom_pipelines": {"x": {"impl": "evil.Evil"}}, "custom_generate": "evil"}
            file.write_text(json.dumps(values))
        return folder, marker

    return plant


def edit(file, **changes):
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))


def test_a_family_of_transformers(planted):
    folder, marker = planted("moonshine")
    model = canter.load(folder)
    assert model.transcribe(np.zeros(16000, dtype=np.float32)).text is not None
    model = TransformersModel.from_pretrained(folder, dtype=torch.float32)
    model.transcribe([np.zeros(16000, dtype=np.float32)])
    assert not marker.exists()


def test_a_family_of_ours(planted):
    folder, marker = planted("whisper")
    canter.load_model(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "evil"}, "'evil', which is not an architecture of transformers itself"),
        ("config.json", {"model_type": None}, "not an architecture|not a Canter model|model_type"),
        ("config.json", {"attn_implementation": "kernels-community/flash-attn"}, "must be 'eager' or 'sdpa'"),
        ("config.json", {"_attn_implementation": "evil/kernel@main:f"}, "must be 'eager' or 'sdpa'"),
        ("config.json", {"attn_implementation": {"": "evil/kernel"}}, "must be 'eager' or 'sdpa'"),
        ("config.json", {"experts_implementation": "evil/kernel"}, "must be 'eager' or 'sdpa'"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
        ("config.json", {"transformers_weights": "../x.safetensors"}, "transformers_weights is not supported"),
        ("tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}, "transformers cannot load it"),
        ("preprocessor_config.json", {"feature_extractor_type": "Evil"}, "transformers cannot load it"),
        ("adapter_config.json", {"base_model_name_or_path": "evil/base"}, "an adapter, not a whole model"),
    ],
)  # fmt: skip
def test_what_would_need_foreign_code_takes_one_line(planted, file, changes, message):
    folder, marker = planted("moonshine")
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message) as refused:
        canter.load(folder)
    assert len(str(refused.value).splitlines()) == 1
    assert "trust_remote_code=True" not in str(refused.value)
    assert not marker.exists()


@pytest.mark.parametrize("family", ["moonshine", "whisper"])
def test_pickled_code_in_weights_is_not_run(planted, family):
    folder, marker = planted(family)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not a zip file" if family == "whisper" else "is missing"):
        canter.load(folder)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / index).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(CheckpointError, match="is no name of a safetensors file"):
        canter.load(folder)
    assert not marker.exists()


def test_an_archive_of_nemo(tmp_path, shared):
    """``_target_`` names a class that NeMo would build; here it is a text."""
    marker = tmp_path / "code-was-run"
    with tarfile.open(shared / "fixtures/nemo/a/model.nemo") as tar:
        members = {one.name: tar.extractfile(one).read() for one in tar if one.isreg()}  # pyright: ignore

    def archive(name, config):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, data in (members | {"./model_config.yaml": config, "./evil.py": b"import os"}).items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / name

    config = members["./model_config.yaml"]
    target = f"_target_: pathlib.Path.touch\n_args_: [{marker}]\n".encode()
    canter.load_model(archive("target.nemo", config.replace(b"_target_: nemo", b"_target_: os.system #") + target))
    call = f"\nextra: !!python/object/apply:pathlib.Path.touch [{marker}]\n".encode()
    with pytest.raises(CheckpointError, match="could not determine a constructor"):
        canter.load_model(archive("tag.nemo", config + call))
    assert not marker.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty_alpha": 0.6, "top_k": 4},  # contrastive search, which lives on the hub
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"dola_layers": "high"},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"output_hidden_states": {"a": [1]}, "return_dict_in_generate": True, "stop_strings": ["a"]},
        {"custom_generate": "evil/generate", "trust_remote_code": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_settings_that_change_how_generate_works_are_left_out(planted, file, settings):
    folder, marker = planted("moonshine")
    audio = [np.zeros(8000, dtype=np.float32)]
    expected = TransformersModel.from_pretrained(folder).transcribe(audio)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    edit(folder / file, **settings)
    try:
        model = TransformersModel.from_pretrained(folder)
    except CheckpointError:
        assert file == "config.json"
    else:
        assert model.transcribe(audio) == expected
    assert not marker.exists()
