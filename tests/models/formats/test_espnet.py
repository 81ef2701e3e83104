"""OWSM in ESPnet's folders: what ESPnet computed with them, the same read back, and folders of a bad hand."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from canter import build_index
from canter.errors import CheckpointError, ConfigError
from canter.inference.loading import load_engine
from canter.loading import load_module, save_module
from canter.models.batch import Batch
from canter.models.formats.espnet import is_espnet_folder, read_espnet, write_espnet
from canter.text.owsm import OwsmTokenizer
from canter.training.feed.data import MicroBatches, collate

SHARED = Path(os.environ.get("CANTER_SHARED", "absent")) / "fixtures" / "owsm"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="CANTER_SHARED names no folder with OWSM fixtures")
KINDS = ("v31", "v4")
CLIPS = range(3)


@pytest.fixture(scope="module", params=KINDS)
def folder(request):
    return SHARED / request.param


@pytest.fixture(scope="module")
def model(folder):
    model = read_espnet(folder).eval()
    model.encoder.same_lengths = True
    return model


@pytest.fixture(scope="module")
def arrays(folder):
    return load_file(folder / "arrays.safetensors")


@pytest.fixture(scope="module")
def meta(folder):
    return json.loads((folder / "meta.json").read_text())


@pytest.mark.parametrize("clip", CLIPS)
def test_features_encoder_and_scores_are_espnets(model, arrays, clip):
    audio = arrays[f"{clip}.audio"][None]
    with torch.no_grad():
        features, frames = model.features(audio, torch.tensor([audio.shape[1]]))
        encoded, lengths = model.encode(features, frames)
        log_probs = model.log_probs(encoded, lengths, arrays[f"{clip}.ids"].long()[None])[0]
        ctc, _ = model.ctc_log_probs(encoded, lengths)
    plain = features[0, :40] * model.features.deviation + model.features.mean
    assert (plain - arrays[f"{clip}.features_head"]).abs().max() < 2e-4
    assert (features[0, :40] - arrays[f"{clip}.normalised_head"]).abs().max() < 2e-4
    assert encoded.shape[1:] == arrays[f"{clip}.encoded"].shape
    assert (encoded[0] - arrays[f"{clip}.encoded"]).abs().max() < 2e-4
    assert (log_probs - arrays[f"{clip}.log_probs"]).abs().max() < 2e-4
    assert (ctc[0, :40] - arrays[f"{clip}.ctc_log_probs_head"]).abs().max() < 2e-4


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("previous", [False, True])
def test_losses_are_espnets(model, arrays, meta, clip, previous):
    """Language and task bear loss, previous text does not. ESPnet's smoothed loss is a divergence, which leaves out the
    entropy of the targets."""
    ids, told = model.tokenizer.ids, meta["clips"][clip]
    before = [ids["<sop>"], *told["previous_ids"]] if previous else []
    target = [ids["<eng>"], ids["<asr>"], ids["<notimestamps>"], *told["text_ids"]]
    tokens = torch.tensor([[*before, ids["<sos>"], *target, ids["<eos>"]]])
    audio = arrays[f"{clip}.audio"][None]
    one = torch.tensor([1])
    batch = Batch(audio, one * audio.shape[1], tokens, one * tokens.shape[1], one * (len(before) + 1),
                  torch.tensor([told["text_ids"]]), one * len(told["text_ids"]), one * 0)  # fmt: skip
    with torch.no_grad():
        loss = model.loss(batch, label_smoothing=0.1 * (model.vocabulary - 1) / model.vocabulary)
    smoothed = torch.full((model.vocabulary,), 0.1 / (model.vocabulary - 1))
    smoothed[0] = 0.9
    entropy = -(smoothed * smoothed.log()).sum() * loss.attention_count
    parts = told["loss_with_previous_parts" if previous else "loss_parts"]
    assert loss.attention_count == len(target) + 1
    assert float(loss.attention - entropy) == pytest.approx(parts["loss_att"], rel=1e-4)
    assert float(loss.ctc) == pytest.approx(parts["loss_ctc"], rel=1e-4)


def test_padding_changes_nothing_without_thirty_seconds(folder, arrays):
    model = read_espnet(folder).eval()
    model.set_features(pad_seconds=0.0)
    assert model.features.mean.abs().max() > 0, "the statistics went with the padding"
    clips = [arrays[f"{clip}.audio"][: 16000 * (clip + 1) + 77 * clip] for clip in CLIPS]
    audio = torch.stack([F.pad(clip, (0, 60000 - len(clip))) for clip in clips])
    audio[0, len(clips[0]) :] = 0.5  # what stands past an end must not matter
    with torch.no_grad():
        together, lengths = model.encode(*model.features(audio, torch.tensor([len(clip) for clip in clips])))
        for row, clip in enumerate(clips):
            alone, (size,) = model.encode(*model.features(clip[None], torch.tensor([len(clip)])))
            assert size == lengths[row]
            assert (together[row, :size] - alone[0, :size]).abs().max() < 1e-4


def test_texts_are_espnets(model, meta):
    for clip in meta["clips"]:
        for decode in clip["decodes"].values():
            for found in decode["nbest"]:
                assert model.tokenizer.decode(found["ids"], special=True) == found["text"]
                assert model.tokenizer.decode(found["ids"]) == found["text_nospecial"]


def test_what_is_written_is_read_back(model, folder, tmp_path):
    write_espnet(model, tmp_path / "copy")
    again = read_espnet(tmp_path / "copy")
    assert again.config == model.config
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    theirs, ours = (
        torch.load(next(root.glob("exp/*/*.pth")), weights_only=True) for root in (folder, tmp_path / "copy")
    )
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].shape == ours[name].shape for name in theirs)
    assert all((theirs[name] - ours[name]).abs().max() < 1e-6 for name in theirs)
    values, known = (
        yaml.safe_load(next(root.glob("exp/*/config.yaml")).read_text()) for root in (tmp_path / "copy", folder)
    )
    for section in ("frontend_conf", "encoder_conf", "decoder_conf"):
        for name, value in values[section].items():
            assert known[section].get(name, value) == value, name


def test_tokenizer_saves_and_prompts(model, tmp_path):
    tokenizer = model.tokenizer
    tokenizer.save(tmp_path)
    assert OwsmTokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).tokens == tokenizer.tokens
    ids = tokenizer.ids
    assert tokenizer.prompt_ids({"source_lang": "en"}) == [
        ids["<sos>"],
        ids["<eng>"],
        ids["<asr>"],
        ids["<notimestamps>"],
    ]
    translated = tokenizer.prompt_ids(
        {"source_lang": "English", "target_lang": "de", "task": "ast", "timestamp": "yes"}
    )
    assert translated == [ids["<sos>"], ids["<eng>"], ids["<st_deu>"]]
    before = tokenizer.prompt_ids({"source_lang": "fra", "prevtext": "of course"})
    assert before[0] == ids["<sop>"]
    assert before[-4:] == tokenizer.prompt_ids({"source_lang": "fr"})
    assert tokenizer.encode("<eng>") != [ids["<eng>"]]  # in a transcript it is text
    with pytest.raises(ConfigError, match="source_lang"):
        tokenizer.prompt_ids({})
    with pytest.raises(ConfigError, match="ja"):
        tokenizer.prompt_ids({"source_lang": "ja"})


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(SHARED / "v4", tmp_path / "owsm")
    for path in (tmp_path / "owsm").rglob("*"):
        path.chmod(0o755)
    (tmp_path / "owsm").chmod(0o755)
    return tmp_path / "owsm"


def test_folders_are_known_by_their_meta_file(copy, tmp_path):
    assert is_espnet_folder(copy)
    assert not is_espnet_folder(tmp_path)
    (copy / "meta.yaml").write_text("files: 3")
    assert not is_espnet_folder(copy)


@pytest.mark.parametrize(
    ("section", "name", "value", "says"),
    [
        ("", "encoder", "conformer", "encoder is 'conformer'"),
        ("", "frontend", {"class": "os.system"}, "frontend is"),
        ("encoder_conf", "input_layer", "linear", "input_layer is 'linear'"),
        ("encoder_conf", "attention_layer_type", "rel_selfattn", "attention_layer_type is 'rel_selfattn'"),
        ("encoder_conf", "num_blocks", "many", "num_blocks is 'many'"),
        ("encoder_conf", "num_blocks", 10**9, "layers is 1000000000"),
        ("encoder_conf", "output_size", 128, "do not fit"),
        ("encoder_conf", "cgmlp_conv_kernel", 32, "kernel_size 32 is even"),
        ("", "bpemodel", "../../secret", "bpemodel is '../../secret'"),
        ("", "token_list", ["a", "b"], "has no <blank>"),
        ("", "token_list", 3, "token_list is no list"),
        ("encoder_conf", "input_layer", ["conv2d"], "input_layer is"),
        ("model_conf", "ctc_weight", "much", "ctc_weight is 'much'"),
        ("model_conf", "ctc_weight", 0.0, "ctc_weight is 0, but"),
    ],
)
def test_settings_that_are_refused(copy, section, name, value, says):
    path = next(copy.glob("exp/*/config.yaml"))
    values = yaml.safe_load(path.read_text())
    (values[section] if section else values)[name] = value
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match=says.replace("(", r"\(")):
        read_espnet(copy)


def swapped(tokens: list[str], one: str, other: str) -> list[str]:
    places = {one: other, other: one}
    return [places.get(token, token) for token in tokens]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tokens: swapped(tokens, "<blank>", tokens[1600]), "<blank> at place 1600; it must be the first"),
        (lambda tokens: swapped(tokens, "<0.02>", "<30.00>"), "<0.02> at place 1511; timestamps must follow <0.00>"),
        (lambda tokens: swapped(tokens, "<0.00>", "<30.00>"), "<0.02> at place 12; timestamps must follow <0.00>"),
        (lambda tokens: swapped(tokens, "<asr>", "<nospeech>"), "no language between <nospeech> and <asr>"),
        (lambda tokens: [f"{t}x" if n > 1560 and t[0] != "<" else t for n, t in enumerate(tokens)], "not that of bpe"),
    ],
)
def test_a_list_of_tokens_in_another_order_is_refused(copy, change, says):
    path = next(copy.glob("exp/*/config.yaml"))
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {"token_list": change(values["token_list"])}))
    with pytest.raises(CheckpointError, match=says) as caught:
        read_espnet(copy)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_padding_is_written_with_a_warning(tmp_path):
    model = read_espnet(SHARED / "v4")
    model.set_features(pad_seconds=0.0)
    with pytest.warns(UserWarning, match="ESPnet pads every utterance to 30 s, but this model pads to 0 s"):
        write_espnet(model, tmp_path / "copy")


def test_nothing_of_the_yaml_is_made_and_no_code_unpickled(copy):
    path = next(copy.glob("exp/*/config.yaml"))
    kept = path.read_text()
    path.write_text("encoder: !!python/object/apply:os.system ['touch /tmp/x']\n")
    with pytest.raises(CheckpointError, match="YAML"):
        read_espnet(copy)
    path.write_text(kept)
    weights = next(copy.glob("exp/*/*.pth"))
    torch.save({"encoder": print}, weights)
    with pytest.raises(CheckpointError, match="could run code"):
        read_espnet(copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read_espnet(copy)


def test_tensors_that_do_not_fit_are_named(copy):
    weights = next(copy.glob("exp/*/*.pth"))
    tensors = torch.load(weights, weights_only=True)
    del tensors["normalize.mean"]
    torch.save(tensors, weights)
    with pytest.raises(CheckpointError, match=r"1 missing: features.mean"):
        read_espnet(copy)


def test_every_format_holds_it(folder, tmp_path):
    model = load_module(folder)
    save_module(model, tmp_path / "canter", form="canter")
    save_module(load_module(tmp_path / "canter"), tmp_path / "espnet", form="espnet")
    again = load_module(tmp_path / "espnet")
    assert again.layers() == model.layers()
    assert all(torch.equal(one, other) for one, other in zip(again.state_dict().values(), model.state_dict().values()))
    assert "characters" not in model.supports
    assert model.cost(10.0, 40).encoder_flops > model.cost(10.0, 40).decoder_flops > 0
    assert load_engine(tmp_path / "canter").rules.timestamps == load_engine(folder).rules.timestamps
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an ESPnet model"):
        save_module(model, tmp_path / "other", form="espnet")


def test_training_scores_language_and_task_and_gives_ctc_the_tokens(model, arrays, tmp_path):
    """Previous text and <sos> bear no loss; without a weight of CTC its head is not computed."""
    soundfile.write(tmp_path / "0.wav", arrays["0.audio"].numpy(), 16000)
    row = {"audio_filepath": "0.wav", "duration": len(arrays["0.audio"]) / 16000, "text": "of course", "lang": "en"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    index = build_index(tmp_path / "manifest.jsonl", tokenizer=model.tokenizer)
    text = model.tokenizer.encode("of course")
    found = MicroBatches(index, model.tokenizer, model.tokenizer, 16000).example(index.utterance(0))
    assert found.tokens == [*model.tokenizer.prompt_ids({"source_lang": "en"}), *text, model.tokenizer.end]
    assert (found.prompt, found.characters) == (1, text)
    batch = collate([found], model.tokenizer.pad)
    with torch.no_grad():
        both, plain = model.loss(batch), model.loss(replace(batch, characters=batch.characters[:, :0]))
    assert both.attention_count == len(text) + 4
    assert both.ctc_count == len(text)
    assert both.ctc > 0
    assert torch.equal(both.attention, plain.attention)
    assert plain.ctc == plain.ctc_count == 0
