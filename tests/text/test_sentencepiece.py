import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.text import SentencePieceTokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "the doctor opened the window",
    "the farmer carried the basket across the river because the teacher forgot",
    "la reina encontró el jardín",
    "el médico compró la naranja mientras la hermana miraba la playa",
] * 3
CHARACTERS = sorted(set("".join(TEXTS)) - {" "})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, ["en", "es", "es"], 90, tmp_path_factory.mktemp("tokenizer"))


def test_size_prompt_and_languages(tokenizer):
    assert tokenizer.vocab_size == 90
    assert tokenizer.languages == ("en", "es")
    spanish = Utterance("a.wav", 1.0, "la reina", lang="es")
    tokens = ["<|startoftranscript|>", "<|es|>", "<|transcribe|>", "<|es|>", "<|pnc|>"]
    assert tokenizer.prompt(spanish) == [tokenizer.special_id(token) for token in tokens]
    assert tokenizer.decode(tokenizer.prompt(spanish)) == ""
    assert tokenizer.decode(tokenizer.prompt(spanish), special=True) == "".join(tokens)


def test_an_utterance_without_a_language_gets_the_default(tokenizer):
    somehow = tokenizer.prompt(Utterance("a.wav", 1.0, "la"))
    assert somehow[1] == somehow[3] == tokenizer.special_id("<|unklang|>")
    english = train_tokenizer(TEXTS[:2], ["en"], 60)
    assert english.prompt(Utterance("a.wav", 1.0, "the"))[1] == english.special_id("<|en|>")


def test_a_translation_and_its_punctuation(tokenizer):
    utterance = Utterance("a.wav", 1.0, "the", source_lang="es", target_lang="en", pnc="no")
    tokens = ["<|startoftranscript|>", "<|es|>", "<|translate|>", "<|en|>", "<|nopnc|>"]
    assert tokenizer.prompt(utterance) == [tokenizer.special_id(token) for token in tokens]


def test_an_unknown_language_is_named(tokenizer):
    with pytest.raises(ConfigError, match=r"'fr' \(French\) is not a language of this model; it knows en, es"):
        tokenizer.prompt(Utterance("a.wav", 1.0, "la", lang="fr"))


@given(st.lists(st.text(CHARACTERS, min_size=1, max_size=8), max_size=6))
def test_texts_come_back(tokenizer, words):
    text = " ".join(words)
    ids = tokenizer.encode(text, "es")
    assert all(len(tokenizer.special) <= number < tokenizer.vocab_size for number in ids)
    assert tokenizer.decode(ids) == text


@given(st.text())
def test_any_text_is_encoded_and_only_a_final_end_is_special(tokenizer, text):
    ids = tokenizer.encode(text + "<|pnc|>" + text)
    assert all(number >= len(tokenizer.special) for number in ids)
    assert tokenizer.encode(text + "<|endoftext|>")[-1] == tokenizer.end


def test_saved_loaded_and_pickled_are_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    for other in (load_tokenizer(tmp_path / "model"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
        assert other.prompt_ids({"source_lang": "es"}) == tokenizer.prompt_ids({"source_lang": "es"})


def test_training_twice_gives_the_same(tokenizer):
    assert train_tokenizer(iter(TEXTS), {"es", "en"}, 90).fingerprint == tokenizer.fingerprint
    assert train_tokenizer(TEXTS, ["en", "es"], 80).fingerprint != tokenizer.fingerprint


def test_too_large_a_vocabulary_is_lowered_with_a_notice(tmp_path):
    with pytest.warns(UserWarning, match="vocabulary lowered from 5000 to"):
        small = train_tokenizer(TEXTS, ["en"], 5000, tmp_path)
    assert 100 < small.vocab_size < 5000
    assert small.decode(small.encode(TEXTS[0])) == TEXTS[0]


def test_what_cannot_be_trained():
    with pytest.raises(ConfigError, match="there is no text"):
        train_tokenizer(["", "  "], ["en"], 100)
    with pytest.raises(ConfigError, match=r"of 20 tokens .* at least (\d+)") as caught:
        train_tokenizer(TEXTS, ["en"], 20)
    least = int(str(caught.value).split()[-1])
    assert train_tokenizer(TEXTS, ["en"], least).vocab_size == least


def test_one_vocabulary_a_language_has_offsets(tokenizer):
    model = tokenizer.models[""]
    both = SentencePieceTokenizer(tokenizer.special, {"en": model, "es": model}, defaults=tokenizer.defaults)
    shift = both.offsets["es"] - both.offsets["en"]
    assert both.vocab_size == tokenizer.vocab_size + shift
    english, spanish = both.encode("la reina", "en"), both.encode("la reina", "es")
    assert english == tokenizer.encode("la reina")
    assert spanish == [number + shift for number in english]
    assert both.decode(spanish) == "la reina"
    with pytest.raises(ConfigError, match="language 'fr', only en, es"):
        both.encode("la", "fr")


@pytest.mark.parametrize(
    "damage", [{"format": "x"}, {"models": {"": "../a.model"}}, {"models": {"": "none.model"}}, {"special": []}]
)
def test_a_malformed_tokenizer_is_named(tokenizer, tmp_path, damage):
    tokenizer.save(tmp_path)
    file = tmp_path / "canter_tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(CheckpointError, match=r"canter_tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_ids_beyond_the_vocabulary_and_empty_folders(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="token id 90 is not in the vocabulary"):
        tokenizer.decode([90])
    with pytest.raises(CheckpointError, match="no tokenizer; give"):
        load_tokenizer(tmp_path)
