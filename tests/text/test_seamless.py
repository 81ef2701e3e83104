"""Seamless' tokenizer: equal to transformers', in both kinds of files, and prompts of languages in any spelling."""

import json
import pickle

import pytest

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.inference.languages import Defaults
from canter.text import SeamlessTokenizer, load_tokenizer
from canter.text.extension import extend_tokenizer
from canter.text.spelling import Start, spellings, starts_of_extended

from ..models.formats.small_seamless import LANGUAGES, TEXTS, small_tokenizer, transformers

ODD = ("  two  spaces", "café ½ ﬁ", "a\tb\nc", "", "__eng", "unknown: 漢字 ☃", " ", "l'été,où?")


@pytest.fixture(scope="module", params=["sentencepiece.bpe.model", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    """Return a tokenizer of each kind of file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer().save(folder)
    if request.param == "tokenizer.json":
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        folder = tmp_path_factory.mktemp("serialised")
        theirs.save_pretrained(folder)
    assert (folder / request.param).exists()
    return load_tokenizer(folder)


def test_ids_and_texts_are_theirs(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs) is transformers.SeamlessM4TTokenizer
    assert len(theirs) == tokenizer.vocab_size
    for text in TEXTS + ODD:
        expected = theirs(text_target=text, tgt_lang="cmn_Hant")["input_ids"]
        assert [*tokenizer.prompt_ids({"source_lang": "cmn_Hant"}), *tokenizer.encode(text), tokenizer.end] == expected
        assert tokenizer.decode(expected) == theirs.decode(expected, skip_special_tokens=True).strip()
        assert tokenizer.decode(expected, special=True).replace(" ", "") == theirs.decode(expected).replace(" ", "")


def test_a_language_more(tokenizer, tmp_path):
    new = extend_tokenizer(tokenizer, "kab")
    assert new.languages == (*LANGUAGES, "kab")
    assert spellings(new)[: tokenizer.vocab_size] == spellings(tokenizer)
    assert new.prompt_ids({"source_lang": "kab"}) == [new.end, tokenizer.vocab_size]
    languages = tuple(tokenizer.language_ids.values())
    assert starts_of_extended(tokenizer, new)[-1] == Start(languages)
    assert all(new.encode(text) == tokenizer.encode(text) for text in TEXTS)
    new.save(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("__kab__") == new.vocab_size - 1
    with pytest.raises(ConfigError, match="Seamless takes a language token and no new pieces"):
        extend_tokenizer(tokenizer, "kab", TEXTS, 20)


def test_special_tokens_in_a_text_are_text(tokenizer):
    ids = tokenizer.encode("say __eng__ or </s>")
    assert not {tokenizer.language_ids["eng"], tokenizer.end} & set(ids)


def test_only_special_tokens_are_languages(tmp_path):
    """A piece of text may look like one."""
    tokenizer = small_tokenizer(["__xyz__"])
    assert "__xyz__" in tokenizer.ids
    assert tokenizer.languages == LANGUAGES


def test_it_is_saved_pickled_and_told_apart(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for again in (SeamlessTokenizer.load(tmp_path), load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    assert tokenizer.languages == LANGUAGES
    assert tokenizer.special_id("<|deu|>") == tokenizer.special_id("__deu__") == tokenizer.language_ids["deu"]


@pytest.mark.parametrize(
    ("row", "written"),
    [
        ({"lang": "en"}, "eng"),
        ({"lang": "English"}, "eng"),
        ({"source_lang": "zh-Hant"}, "cmn_Hant"),
        ({"lang": "zh"}, "cmn"),
        ({"lang": "zh-CN"}, "cmn"),
        ({"lang": "cmn_hant"}, "cmn_Hant"),
        ({"source_lang": "en", "target_lang": "de"}, "deu"),
        ({"lang": "eng", "target_lang": "Arabic", "taskname": "translate"}, "arb"),
        ({"target_lang": "fr", "taskname": "translate"}, "fra"),
        ({"target_lang": "fr"}, "fra"),
        ({"lang": "en", "taskname": "asr"}, "eng"),
    ],
)
def test_the_prompt_names_the_language_that_is_written(tokenizer, row, written):
    prompt = tokenizer.prompt(Utterance("a.wav", 1.0, "x", **row))
    assert prompt == [tokenizer.end, tokenizer.language_ids[written]]


def test_prompts_that_cannot_be_made(tokenizer):
    with pytest.raises(ConfigError, match="the prompt needs source_lang: give 'lang' in the manifest, or --language"):
        tokenizer.prompt_ids({})
    with pytest.raises(ConfigError, match="the prompt needs target_lang"):
        tokenizer.prompt_ids({"source_lang": "en", "task": "translate"})
    with pytest.raises(ConfigError, match=r"'ja' \(Japanese\) is not a language of this model; it knows arb"):
        tokenizer.prompt_ids({"source_lang": "ja"})
    with pytest.raises(ConfigError, match="'sing' is not a task"):
        tokenizer.prompt_ids({"source_lang": "en", "task": "sing"})


def test_what_a_user_must_say(tokenizer):
    """No language is detected; a translation needs only the language that is written."""
    row = Utterance("a.wav", 1.0, "x")
    with pytest.raises(ConfigError, match=r"^a.wav names no language, and the model knows arb, .*--language$"):
        Defaults.of(tokenizer, None).complete(row)
    with pytest.raises(ConfigError, match="names no language"):
        Defaults.of(tokenizer, "auto", "transcribe").complete(row)
    stated = Defaults.of(tokenizer, "de").complete(row)
    translated = Defaults.of(tokenizer, None, "translate", "de").complete(row)
    both = Defaults.of(tokenizer, "en", "translate", "de").complete(row)
    assert tokenizer.prompt(stated) == tokenizer.prompt(translated) == tokenizer.prompt(both)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("sentencepiece.bpe.model", b"no protobuf", "not a SentencePiece model"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "not a tokenizer.json"),
        ("added_tokens.json", b'{"__eng__": -1}', "the id of the added token '__eng__' is -1"),
        ("added_tokens.json", b'{"__eng__": "3"}', "the id of the added token '__eng__' is '3'"),
        ("added_tokens.json", b'{"__eng__": 3}', "language tokens such as __eng__, or one id for two"),
        ("added_tokens.json", b'{"<special>": 201}', "has no language tokens such as __eng__"),
        ("added_tokens.json", b"[1]", "added_tokens.json holds no JSON object of added tokens"),
        ("added_tokens.json", b'{"__eng__"', "is not JSON"),
    ],
)
def test_damaged_files(name, content, says, tmp_path):
    small_tokenizer().save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_of_added_tokens_are_in_either_file(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    assert load_tokenizer(tmp_path).language_ids == tokenizer.language_ids
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for value in ({"1": 3}, {"x": {"content": "__eng__"}}, {"1": {}}, {}, 3):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": value}))
        with pytest.raises(CheckpointError, match=r"added token|language tokens"):
            load_tokenizer(tmp_path)


def test_another_models_tokenizer_is_refused(whisper_bytes, tmp_path):
    small_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whisper_bytes("en", "de").to_str())
    with pytest.raises(CheckpointError, match="has no <pad>; is it Seamless'"):
        load_tokenizer(tmp_path)
