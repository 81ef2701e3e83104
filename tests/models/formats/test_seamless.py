"""SeamlessM4T v2 in Hugging Face's folders: equal to transformers for a batch of one, and in any batch."""

import json

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from canter.errors import CheckpointError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.loading import load_module, model_format, save_module
from canter.models.batch import Batch
from canter.models.features import KaldiFeatureConfig
from canter.models.formats.files import read_tensors
from canter.models.formats.seamless import UNUSED, read_seamless, write_seamless
from canter.models.w2v_bert import W2vBertConfig
from canter.text import load_tokenizer

from ..conftest import small_model
from .small_seamless import SHAPES, changed_config, save_theirs, small_theirs, small_tokenizer, transformers

SAMPLES = (24000, 8800, 8960, 30080, 400, 720, 47777)
"""Lengths with even and odd numbers of feature frames, whose stacked frames end within, at and past a window of the
adapter."""


@pytest.fixture(scope="module")
def speech(shared):
    """Return clips of real speech of these lengths."""
    files = sorted((shared / "data" / "speech" / "an4" / "flac").glob("*.flac"))[:12]
    audio = np.concatenate([soundfile.read(file, dtype="float32")[0] for file in files])
    starts = np.cumsum((0, *SAMPLES))
    return [audio[start : start + size] for start, size in zip(starts, SAMPLES, strict=False)]


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """Return transformers' model, ours, and the folder that it was read from."""
    theirs, tokenizer = small_theirs(**SHAPES[request.param]), small_tokenizer()
    mels = theirs.config.feature_projection_input_dim // 2
    folder = save_theirs(theirs, tmp_path_factory.mktemp("seamless") / "model", tokenizer, mels)
    return theirs, load_module(folder), folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_theirs(small_theirs(), tmp_path_factory.mktemp("seamless") / "model", small_tokenizer())


def clips_of_frames(speech):
    """Return the clips without the one of a single frame, of which transformers computes no deviation."""
    return [clip for clip in speech if len(clip) > 400]


def extracted(folder, clip):
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    return extractor(clip, sampling_rate=16000, return_tensors="pt")


@torch.no_grad()
def test_features_encoder_and_scores_are_theirs(pair, speech):
    theirs, model, folder = pair
    tokens = torch.tensor([[3, model.tokenizer.language_ids["deu"], 50, 60, 70, 80, 90]])
    for clip in clips_of_frames(speech):
        inputs = extracted(folder, clip)
        expected = theirs(**inputs, decoder_input_ids=tokens)
        features, frames = model.features(torch.from_numpy(clip)[None], torch.tensor([len(clip)]))
        encoded, lengths = model.encode(features, frames)
        stacked = inputs["input_features"].unflatten(2, (2, -1)).flatten(1, 2)
        assert frames[0] == features.shape[1]
        assert (features - stacked[:, : frames[0]]).abs().max() < 2e-5
        states = expected.encoder_last_hidden_state
        assert encoded.shape == states.shape
        assert (encoded - states)[0, : lengths[0]].abs().max() < 1e-4
        log_probs = model.log_probs(encoded, lengths, tokens)
        assert log_probs.std() > 0.3
        assert (log_probs - expected.logits.log_softmax(-1)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("suppressed", [False, True])
def test_tokens_are_theirs_in_any_batch(pair, speech, beams, suppressed):
    theirs, model, folder = pair
    rules = {"suppress_tokens": [50, 51, 52], "begin_suppress_tokens": [3, 60]} if suppressed else {}
    clips = clips_of_frames(speech)
    expected = []
    for number, clip in enumerate(clips):
        language = ("eng", "cmn_Hant")[number % 2]
        settings = {"num_beams": beams, "do_sample": False, "max_new_tokens": 14, **rules}
        (ids,) = theirs.generate(**extracted(folder, clip), tgt_lang=language, **settings).tolist()
        assert ids[:2] == model.tokenizer.prompt_ids({"source_lang": language})
        expected.append(ids[2:])
    kept = model.generation
    model.generation = {**kept, **rules, "max_new_tokens": 14}
    try:
        prompts = [model.tokenizer.prompt_ids({"source_lang": one}) for one in ("en", "zh-Hant")]
        requests = [Request(clip, prompts[number % 2]) for number, clip in enumerate(clips)]
        for rows in (1, 8, 64):
            config = EngineConfig(rows=rows, beams=beams, max_repeats=0, tokens_per_frame=20.0)
            found = Engine(model, model.tokenizer.end, config).decode(requests)
            for one, ids in zip(found, expected, strict=True):
                assert [*one.tokens, 3][: len(ids)] == ids
                assert one.finished == (ids[-1] == 3)
    finally:
        model.generation = kept
    assert len({tuple(ids) for ids in expected}) > 2


@torch.no_grad()
def test_the_loss_is_theirs(pair, speech):
    """Theirs counts the language token too, unless its label is -100."""
    theirs, model, folder = pair
    clip, language = speech[0], model.tokenizer.language_ids["fra"]
    text = model.tokenizer.encode("où êtes-vous?")
    ids = torch.tensor([[3, language, *text, 3]])
    one = torch.tensor([1])
    batch = Batch(torch.from_numpy(clip)[None], one * len(clip), ids, one * ids.shape[1], one * 2, ids[:, :0], 0 * one,
                  0 * one)  # fmt: skip
    loss = model.loss(batch)
    labels = ids[:, 1:].clone()
    labels[0, 0] = -100
    expected = theirs(**extracted(folder, clip), decoder_input_ids=ids[:, :-1], labels=labels).loss
    assert loss.attention_count == len(text) + 1
    assert float(loss.attention / loss.attention_count) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_batch_and_padding_change_nothing(pair, speech):
    _, model, _ = pair
    audio = torch.stack([F.pad(torch.from_numpy(clip), (0, 60000 - len(clip)), value=0.5) for clip in speech])
    together, lengths = model.encode(*model.features(audio, torch.tensor(SAMPLES)))
    for row, clip in enumerate(speech):
        alone, (size,) = model.encode(*model.features(torch.from_numpy(clip)[None], torch.tensor([len(clip)])))
        assert size == lengths[row] == model.encoder_frames(len(clip) / 16000)
        assert (together[row, :size] - alone[0, :size]).abs().max() < 1e-4


def test_what_is_written_transformers_loads(pair, speech, tmp_path):
    theirs, model, _ = pair
    save_module(load_module(save_module(model, tmp_path / "ours")), tmp_path / "theirs", form="huggingface")
    again, report = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(again) is transformers.SeamlessM4Tv2ForSpeechToText
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in theirs.state_dict().items())
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert type(processor) is transformers.SeamlessM4TProcessor
    inputs = processor(audio=speech[0], sampling_rate=16000, return_tensors="pt")
    settings = {"tgt_lang": "cmn_Hant", "max_new_tokens": 9}
    ids = again.eval().generate(**inputs, **settings)
    assert torch.equal(ids, theirs.generate(**inputs, **settings))
    text = processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert model.tokenizer.decode(ids[0].tolist()) == text.strip()
    back = read_seamless(tmp_path / "theirs")
    assert back.config == model.config
    assert back.generation == model.generation
    assert back.tokenizer.fingerprint == model.tokenizer.fingerprint


@pytest.mark.parametrize("shards", [False, True])
def test_a_complete_model_is_read_without_its_other_parts(shards, tmp_path, monkeypatch):
    theirs = small_theirs(complete=True)
    saving = {"max_shard_size": "200KB"} if shards else {}
    save_theirs(theirs, tmp_path / "model", small_tokenizer(), **saving)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == shards
    stored = read_tensors(tmp_path / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in stored} > {part.split(".")[0] for part in UNUSED[:3]}
    loaded = []

    def reading(*arguments, **options):
        tensors = read_tensors(*arguments, **options)
        loaded.extend(tensors)
        return tensors

    monkeypatch.setattr("canter.models.formats.seamless.read_tensors", reading)
    model = load_module(tmp_path / "model")
    assert {name.split(".")[0] for name in loaded} <= {"shared", "speech_encoder", "text_decoder", "lm_head"}
    assert "id_to_text" not in model.generation
    write_seamless(model, tmp_path / "speech")
    speech = transformers.SeamlessM4Tv2ForSpeechToText.from_pretrained(tmp_path / "speech")
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in speech.state_dict().items())


def test_folders_are_known(folder, tmp_path):
    assert model_format(folder).name == "huggingface"
    model = load_module(folder, precision="bf16")
    assert model.shape == "W2vBert 2/2 x 32, vocabulary 207"
    assert model.encoder_frames(10.0) == 63
    assert load_tokenizer(folder).languages == model.tokenizer.languages


@pytest.fixture
def copy(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("speech_encoder_hidden_act", "gelu", "config.json: speech_encoder_hidden_act is 'gelu'; supported: 'swish'"),
        ("position_embeddings_type", None, "position_embeddings_type is None"),
        ("num_adapter_layers", 2, "num_adapter_layers is 2; supported: 1"),
        ("adaptor_kernel_size", 4, "adaptor_stride 8 differs"),
        ("feature_projection_input_dim", 80, "feature_projection_input_dim is 80"),
        ("speech_encoder_layers", "many", "speech_encoder_layers is 'many'"),
        ("speech_encoder_layers", 10**6, "encoder.layers is 1000000"),
        ("speech_encoder_chunk_size", 0, "encoder.chunk_frames is 0"),
        ("conv_depthwise_kernel_size", 4, "kernel_size 4 is even"),
        ("left_max_position_embeddings", 63, "misshapen: encoder.layers.0.attention.distances.weight"),
        ("hidden_size", 33, "hidden_size 33 is odd"),
        ("vocab_size", 206, "do not fit"),
        ("decoder_layers", 3, "missing: decoder.layers.2"),
    ],
)
def test_settings_that_are_refused(copy, name, value, says):
    changed_config(copy, **{name: value})
    with pytest.raises(CheckpointError, match=says):
        load_module(copy)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("text_decoder_lang_to_code_id", {"eng": 7}, r"lang_to_code_id\.eng is 7, but the tokenizer has 205"),
        ("text_decoder_lang_to_code_id", {"xyz": 7}, r"lang_to_code_id\.xyz is 7, but the tokenizer has None"),
        ("text_decoder_lang_to_code_id", {"eng": 10**7}, "it must be an object of names"),
        ("decoder_start_token_id", 2, "decoder_start_token_id is 2, but the tokenizer has 3"),
        ("max_new_tokens", -1, "max_new_tokens is -1"),
    ],
)
def test_settings_for_decoding_that_are_refused(copy, name, value, says):
    path = copy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(CheckpointError, match=says):
        load_module(copy)


@pytest.mark.parametrize(("entries", "read"), [(200_000, True), (600_000, False)])
def test_the_texts_of_all_tokens_may_be_listed(copy, entries, read):
    """The released file has more than the 4 MiB that other JSON may have."""
    path = copy / "generation_config.json"
    texts = {str(number): f"▁token{number}" for number in range(entries)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "id_to_text": texts}, indent=2))
    assert path.stat().st_size > 4 * 2**20
    if read:
        assert load_module(copy).generation["max_new_tokens"] == 256
    else:
        with pytest.raises(CheckpointError, match="more than the 16,777,216 that are read"):
            load_module(copy)


def test_embedding_and_head_must_be_one(copy):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in ("shared.weight", "lm_head.weight") if name in weights)
    other = {"shared.weight": "lm_head.weight", "lm_head.weight": "shared.weight"}[name]
    save_file({**weights, other: weights[name] + 1}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="embedding and head must be tied"):
        load_module(copy)
    save_file({n: x for n, x in weights.items() if n != name}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.embedding\.weight"):
        load_module(copy)


@pytest.mark.parametrize("changes", [{}, {"ctc_vocabulary": 0}])
def test_what_transformers_has_no_architecture_for_stays_here(changes, tmp_path):
    encoder = W2vBertConfig(layers=2, width=24, heads=2, feedforward=48, kernel_size=5, mels=32)
    model = small_model(features=KaldiFeatureConfig(mels=32), encoder=encoder, **changes)
    with pytest.raises(
        CheckpointError, match=r"no such architecture: encoder\.width 24, .*decoder\.embedding_norm True"
    ):
        save_module(model, tmp_path / "x", form="huggingface")
    save_module(model, tmp_path / "x")
    assert load_module(tmp_path / "x").layers() == model.layers()
