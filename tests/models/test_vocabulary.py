"""Models with a larger or another vocabulary: what both have is kept to the bit."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from canter.errors import CheckpointError, ConfigError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.loading import load_model, save_module
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.espnet import read_espnet
from canter.models.formats.nemo import read_nemo_archive
from canter.models.vocabulary import extend_vocabulary, replace_vocabulary
from canter.text import SentencePieceTokenizer, WhisperTokenizer, train_tokenizer
from canter.text.extension import extend_tokenizer

from .conftest import small_model, small_whisper

SHARED = Path(os.environ.get("CANTER_SHARED", "absent"))
OLD = ["the doctor opened the window", "der Arzt kam an die Tür"] * 4
NEW = ["И когда он это нарисовал, все было ужасно", "он нарисовал это, и все это было"] * 4
AUDIO = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))


def with_tokenizer(model, tokenizer):
    """The model with random rows for the ids of the tokenizer."""
    decoder = dataclasses.replace(model.config.decoder, vocabulary=tokenizer.vocab_size, pad=tokenizer.pad)
    torch.manual_seed(1)
    made = type(model)(dataclasses.replace(model.config, decoder=decoder)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.tokenizer = tokenizer
    if isinstance(tokenizer, WhisperTokenizer):
        made.generation = tokenizer.generation()
    return made


def canary(ctc=11):
    """Canary with a vocabulary for each of two languages, and a CTC head on characters."""
    trained = train_tokenizer(OLD, ["en", "de"], 70)
    return with_tokenizer(
        small_model(
            features=FeatureConfig(mels=32),
            encoder=FastConformerConfig(layers=2, width=32, heads=2, feedforward=64, subsampling_channels=8, mels=32),
            decoder=DecoderConfig(layers=1, width=32, heads=4, feedforward=64, positions=64),
            ctc_vocabulary=ctc,
        ),
        SentencePieceTokenizer(trained.special, {"en": trained.models[""], "de": trained.models[""]}),
    )


def whisper(whisper_bytes):
    return with_tokenizer(small_whisper(), WhisperTokenizer(whisper_bytes("en", "es").to_str()))


def owsm(_):
    folder = SHARED / "fixtures" / "owsm" / "v4"
    if not folder.is_dir():
        pytest.skip("CANTER_SHARED names no folder with OWSM fixtures")
    return read_espnet(folder).eval()


KINDS = {"canary": lambda _: canary(), "whisper": whisper, "owsm": owsm}


@pytest.fixture(params=KINDS)
def model(request, whisper_bytes):
    return KINDS[request.param](whisper_bytes)


@torch.no_grad()
def scores(model, ids):
    """Logits of every token, and of CTC."""
    encoded, lengths = model.encode(*model.features(AUDIO, torch.tensor([16000, 12000])))
    logits = model.logits(encoded, lengths, torch.tensor([ids, ids]))
    ctc = None if model.ctc is None else model.ctc(encoded)
    return logits, ctc


def tables(model):
    """The tensors over the vocabulary, and all others."""
    names = ["decoder.embedding.weight", "decoder.output", "decoder.head_bias"]
    names += ["ctc.weight", "ctc.bias"] if model.supports and "characters" not in model.supports else []
    state = model.state_dict()
    return {n: state.pop(n) for n in names if state.get(n) is not None}, state


def test_old_rows_stay_to_the_bit_and_old_logits_with_them(model, tmp_path):
    old = model.tokenizer
    tokenizer = extend_tokenizer(old, "kab", NEW, 60)
    change = extend_vocabulary(model, tokenizer)
    size, more = old.vocab_size, change.model
    assert more.vocabulary == tokenizer.vocab_size
    assert (change.kept, change.dropped) == (size, 0)
    (before, others), (after, same) = tables(model), tables(more)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][:size], tensor[:size]), name
        assert len(after[name]) == tokenizer.vocab_size
        assert torch.isfinite(after[name]).all()
    assert all(torch.equal(same[name], tensor) for name, tensor in others.items())
    assert same.keys() == others.keys()
    prompt = tokenizer.prompt_ids({"source_lang": old.languages[0], "target_lang": old.languages[0]})
    assert prompt == old.prompt_ids({"source_lang": old.languages[0], "target_lang": old.languages[0]})
    (logits, ctc), (ours, our_ctc) = scores(model, prompt), scores(more, prompt)
    assert torch.allclose(ours[..., :size], logits[..., :size], atol=1e-5, rtol=1e-6)
    assert (ours.argmax(-1) == logits.argmax(-1)).all()
    if ctc is not None:
        assert torch.allclose(our_ctc[..., : ctc.shape[-1]], ctc, atol=1e-5, rtol=1e-6)
    save_module(more, tmp_path / "more")
    again = load_model(tmp_path / "more")
    assert again.tokenizer.fingerprint == tokenizer.fingerprint
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in more.state_dict().items())
    assert again.generation == more.generation


def test_new_rows_are_means_of_the_pieces_that_spell_them_and_languages_of_languages(whisper_bytes):
    model = whisper(whisper_bytes)
    tokenizer = extend_tokenizer(model.tokenizer, "kab", NEW, 20)
    rows = extend_vocabulary(model, tokenizer).model.decoder.embedding.weight
    old = model.decoder.embedding.weight
    size = model.tokenizer.vocab_size
    languages = [model.tokenizer.special_id(f"<|{code}|>") for code in ("en", "es")]
    assert torch.allclose(rows[size], old[languages].mean(0))
    for number in range(size + 1, tokenizer.vocab_size):
        spelled = tokenizer.spelling(number)
        alone = [model.tokenizer._backend.token_to_id(symbol) for symbol in tokenizer._backend.id_to_token(number)]
        assert len(alone) == len(spelled)
        assert torch.allclose(rows[number], old[alone].mean(0), atol=1e-6)
    like = extend_vocabulary(model, tokenizer, "Spanish").model.decoder.embedding.weight
    assert torch.equal(like[size], old[languages[1]])
    assert extend_vocabulary(model, tokenizer).model.generation["lang_to_id"]["<|kab|>"] == size


@pytest.mark.filterwarnings("ignore:.* the 20 added pieces have ids after the timestamps")
def test_transformers_loads_an_extended_whisper(whisper_bytes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = whisper(whisper_bytes)
    more = extend_vocabulary(model, extend_tokenizer(model.tokenizer, "kab", NEW, 20), "es").model
    more.set_features(pad_seconds=2.0)
    save_module(more, tmp_path / "theirs", form="huggingface")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    assert theirs.get_input_embeddings().weight.shape[0] == more.vocabulary
    assert torch.equal(theirs.proj_out.weight, more.decoder.embedding.weight)
    prompt = more.tokenizer.prompt_ids({"source_lang": "kab"})
    features, lengths = more.features(AUDIO, torch.tensor([16000, 16000]))
    with torch.no_grad():
        encoded = more.encode(features, lengths)
        ours = more.logits(*encoded, torch.tensor([prompt, prompt]))
        states = transformers.modeling_outputs.BaseModelOutput(encoded[0])
        found = theirs(encoder_outputs=states, decoder_input_ids=torch.tensor([prompt, prompt])).logits
    assert torch.allclose(ours, found, atol=1e-4)
    assert theirs.generation_config.lang_to_id["<|kab|>"] == more.vocabulary - 21


def test_transformers_generates_the_new_language(whisper_bytes, tmp_path):
    """By its token; of new pieces, whose ids it takes for times, a warning tells."""
    transformers = pytest.importorskip("transformers")
    model = whisper(whisper_bytes)
    model.set_features(pad_seconds=4.0)  # the positions of its encoder
    more = extend_vocabulary(model, extend_tokenizer(model.tokenizer, "kab")).model
    save_module(more, tmp_path / "theirs", form="huggingface")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    features, _ = more.features(AUDIO, torch.tensor([16000, 16000]))
    settings = {"language": "<|kab|>", "task": "transcribe", "max_new_tokens": 12}
    found = theirs.generate(features.transpose(1, 2), return_dict_in_generate=True, **settings)["sequences"]
    prompt = more.tokenizer.prompt_ids({"source_lang": "kab"})
    requests = [Request(one.numpy(), prompt) for one in AUDIO]
    ours = Engine(more, more.tokenizer.end, EngineConfig(tokens_per_frame=99.0, max_repeats=0)).decode(requests)
    for theirs_of, ours_of in zip(found.tolist(), ours, strict=True):
        text, our_text = ([token for token in ids if token not in prompt] for ids in (theirs_of, ours_of.tokens))
        assert len(text) > 3
        assert text == our_text[: len(text)]
    pieces = extend_vocabulary(model, extend_tokenizer(model.tokenizer, "kab", NEW, 20)).model
    with pytest.warns(UserWarning, match="20 added pieces have ids after the timestamps"):
        save_module(pieces, tmp_path / "pieces", form="huggingface")


def test_nemo_gets_the_language_among_its_special_tokens(tmp_path):
    """Its ids are others, as its special tokens are first; scores of the same tokens are equal."""
    model = canary(ctc=0)
    tokenizer = extend_tokenizer(model.tokenizer, "kab", NEW, 60)
    more = extend_vocabulary(model, tokenizer).model
    save_module(more, tmp_path / "x.nemo", form="nemo")
    theirs = read_nemo_archive(tmp_path / "x.nemo").eval()
    assert theirs.tokenizer.languages == tokenizer.languages
    assert list(theirs.tokenizer.models) == ["en", "de", "kab"]
    slots = {"source_lang": "kab", "target_lang": "kab"}
    ours, found = (
        scores(one, [*one.tokenizer.prompt_ids(slots), *one.tokenizer.encode(NEW[0], "kab")])[0]
        for one in (more, theirs)
    )
    order = [theirs.tokenizer.special_id(token) for token in tokenizer.special]
    pieces = more.tokenizer.vocab_size - len(tokenizer.special) - 1
    first = len(theirs.tokenizer.special)
    order += [*range(first, first + tokenizer.offsets["kab"] - len(tokenizer.special) - 1)]
    order += [theirs.tokenizer.special_id("<|kab|>")]
    order += range(theirs.tokenizer.offsets["kab"], first + pieces)
    assert sorted(order) == list(range(tokenizer.vocab_size))
    assert torch.allclose(ours, found[..., order], atol=1e-5)
    assert theirs.tokenizer.decode(theirs.tokenizer.encode(NEW[0], "kab")) == NEW[0]


def test_formats_that_cannot_hold_an_extension_say_so(tmp_path):
    model = owsm(None)
    more = extend_vocabulary(model, extend_tokenizer(model.tokenizer, "kab", NEW, 60)).model
    with pytest.raises(
        CheckpointError, match="ESPnet has one SentencePiece model for all languages, and kab has its own"
    ):
        save_module(more, tmp_path / "espnet", form="espnet")
    only = extend_vocabulary(model, extend_tokenizer(model.tokenizer, "kab")).model
    save_module(only, tmp_path / "espnet", form="espnet")
    again = read_espnet(tmp_path / "espnet")
    assert again.tokenizer.languages[-1] == "kab"
    assert torch.equal(again.ctc.weight, only.ctc.weight)


def test_padding_rows_of_a_checkpoint_make_room(tmp_path):
    """NeMo rounds the vocabulary up; what no id of the tokenizer means is no old row."""
    model = canary(ctc=0)
    save_module(model, tmp_path / "x.nemo", form="nemo")
    padded = read_nemo_archive(tmp_path / "x.nemo")
    assert padded.vocabulary % 8 == 0
    tokenizer = extend_tokenizer(padded.tokenizer, "kab", NEW, 60)
    more = extend_vocabulary(padded, tokenizer)
    assert more.model.vocabulary == tokenizer.vocab_size


def test_another_tokenizer_keeps_what_both_have(model):
    other = train_tokenizer([*OLD, *NEW], ["en", "ru"], 90)
    if model.ctc is not None and "characters" not in model.supports:
        with pytest.raises(ConfigError, match="CTC head is on its tokens, of which id 0 is the blank"):
            replace_vocabulary(model, other)
        return
    change = replace_vocabulary(model, other)
    old, new = model.tokenizer, change.model
    assert new.tokenizer is other
    assert new.vocabulary == other.vocab_size == change.kept + change.copied + change.averaged
    (before, others), (after, same) = tables(model), tables(new)
    assert all(torch.equal(same[name], tensor) for name, tensor in others.items())
    english = "<|en|>"
    for name, tensor in before.items():
        assert torch.equal(after[name][other.end], tensor[old.end])
        assert torch.equal(after[name][other.pad], tensor[old.pad])
        assert torch.equal(after[name][other.special_id("<|en|>")], tensor[old.special_id(english)])
        letter = next(number for number in range(other.vocab_size) if other.spelling(number) == b"t")
        known = next(number for number in range(old.vocab_size) if old.spelling(number) == b"t")
        assert torch.equal(after[name][letter], tensor[known])
    assert new.config.decoder.pad == other.pad
    assert not {"suppress_tokens", "lang_to_id", "no_timestamps_token_id"} & new.generation.keys()
    text = str(change)
    assert f"{change.kept:,} keep the rows of the model" in text
    assert f"{change.dropped:,} old ones are dropped" in text


def test_the_same_tokenizer_changes_nothing(model):
    change = replace_vocabulary(model, model.tokenizer)
    assert (change.copied, change.averaged) == (0, 0)
    (before, others), (after, same) = tables(model), tables(change.model)
    size = model.tokenizer.vocab_size
    duplicates = isinstance(model.tokenizer, SentencePieceTokenizer)  # of the two vocabularies
    assert all(duplicates or torch.equal(after[name], tensor[:size]) for name, tensor in before.items())
    assert all(torch.equal(same[name], tensor) for name, tensor in others.items())


def test_a_model_without_a_tokenizer_is_named():
    model = small_model()
    with pytest.raises(ConfigError, match="the model has no tokenizer"):
        replace_vocabulary(model, train_tokenizer(OLD, ["en"], 60))
