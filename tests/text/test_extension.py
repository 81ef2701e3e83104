"""Tokenizers with a language or pieces more: old ids keep their meaning, and old text its ids."""

import functools
import json
import os
import pickle
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.text import (
    JsonTokenizer,
    OwsmTokenizer,
    SentencePieceTokenizer,
    WhisperTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from canter.text.extension import extend_tokenizer, tokens_per_word
from canter.text.spelling import (
    Start,
    Vocabulary,
    byte_symbols,
    spellings,
    starts_of_extended,
    starts_of_other,
    symbol_bytes,
)
from canter.text.whisper import TIMESTAMPS

from ..helpers import write_token_lists
from .test_nemo import UNIFIED, unified_model

SHARED = Path(os.environ.get("CANTER_SHARED", "absent"))
OLD = ["the doctor opened the window", "der Arzt kam an die Tür", "la reina encontró el jardín"] * 4
NEW = ["И когда он это нарисовал, все было ужасно", "он нарисовал это, и все это было", "azul, amek telliḍ"] * 4


@functools.cache
def whisper(*languages: str) -> WhisperTokenizer:
    """Whisper's real vocabulary: English only, or multilingual."""
    source = SHARED / "models" / "whisper-tiny.en"
    if not source.is_dir():
        pytest.skip("CANTER_SHARED names no folder with Whisper's tokenizer")
    if not languages:
        return WhisperTokenizer.load(source / "tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        write_token_lists(source / "tokenizer.json", Path(folder), languages)
        return WhisperTokenizer.load_lists(folder)


@functools.cache
def shared_vocabulary() -> SentencePieceTokenizer:
    return train_tokenizer(OLD, ["en", "de", "es"], 80)


def aggregate() -> SentencePieceTokenizer:
    model = shared_vocabulary().models[""]
    special = shared_vocabulary().special
    return SentencePieceTokenizer(special, {"en": model, "de": model}, defaults={"target_lang": "en"})


@functools.cache
def owsm() -> OwsmTokenizer:
    folder = SHARED / "fixtures" / "owsm" / "v4"
    if not folder.is_dir():
        pytest.skip("CANTER_SHARED names no folder with OWSM fixtures")
    from canter.models.formats.espnet import read_espnet

    return read_espnet(folder).tokenizer


KINDS = {
    "english whisper": lambda: whisper(),
    "multilingual whisper": lambda: whisper("en", "fr", "es"),
    "one vocabulary": lambda: shared_vocabulary(),
    "aggregate": lambda: aggregate(),
    "canary-1b-v2": lambda: SentencePieceTokenizer.of_model(unified_model(user_defined_symbols=list(UNIFIED))),
    "owsm": lambda: owsm(),
}


@pytest.fixture(params=KINDS)
def old(request):
    return KINDS[request.param]()


@pytest.mark.filterwarnings("ignore:tokenizer. the text has only")
def test_old_ids_and_old_text_stay_and_new_text_takes_fewer_tokens(old, tmp_path):
    new = extend_tokenizer(old, "kab", NEW, 60)
    assert spellings(new)[: old.vocab_size] == spellings(old)
    assert new.languages == (*old.languages, "kab")
    lang = next(code for code in ("en", "eng") if code in old.languages)
    for text in (*OLD[:3], NEW[1], "<|endoftext|>"):
        assert new.encode(text, lang) == old.encode(text, lang)
    ids = new.encode(NEW[0], "kab")
    assert max(ids) >= old.vocab_size
    assert new.decode(ids) == NEW[0]
    assert tokens_per_word(new, NEW, "kab") < tokens_per_word(old, NEW, "kab")
    assert tokens_per_word(new, NEW, "kab") < 5
    for again in (pickle.loads(pickle.dumps(new)), saved(new, tmp_path / "saved")):
        assert type(again) is type(new)
        assert again.fingerprint == new.fingerprint != old.fingerprint
        assert again.encode(NEW[0], "kab") == ids
        assert again.decode(ids, special=True) == new.decode(ids, special=True)
        assert again.vocab_size == new.vocab_size


def saved(tokenizer, folder):
    tokenizer.save(folder)
    return load_tokenizer(folder)


def test_a_language_only(old):
    if isinstance(old, SentencePieceTokenizer) and "" not in old.models:
        with pytest.raises(ConfigError, match=r"has a vocabulary for each language .*'kab' needs one too"):
            extend_tokenizer(old, "kab")
        return
    new = extend_tokenizer(old, "kab")
    assert new.vocab_size == old.vocab_size + 1
    assert new.special_id("<|kab|>") == old.vocab_size
    assert new.encode("azul", "kab") == old.encode("azul", old.languages[0])
    prompt = new.prompt(Utterance("a.wav", 1.0, "x", lang="kab"))
    assert old.vocab_size in prompt
    assert new.decode(prompt) == ""
    lang = old.languages[0]
    assert new.prompt(Utterance("a.wav", 1.0, "x", lang=lang)) == old.prompt(Utterance("a.wav", 1.0, "x", lang=lang))
    with pytest.raises(ConfigError, match="knows 'kab' already"):
        extend_tokenizer(new, "kab")


@pytest.mark.filterwarnings("ignore:tokenizer. the text has only")
def test_a_second_language_leaves_the_first(old):
    one = extend_tokenizer(old, "kab", NEW, 60)
    two = extend_tokenizer(one, "xho", ["molo unjani namhlanje", "molo mhlobo wam"] * 4, 40)
    assert spellings(two)[: one.vocab_size] == spellings(one)
    assert two.languages[-2:] == ("kab", "xho")
    assert two.decode(two.encode("molo", "xho")) == "molo"
    if not isinstance(two, WhisperTokenizer):  # whose added languages share the merges
        assert two.encode(NEW[0], "kab") == one.encode(NEW[0], "kab")


def test_a_language_of_an_english_only_whisper_has_the_prompt_of_a_multilingual_one():
    """English keeps its own; the unused token of the vocabulary is renamed, so that no id has two meanings."""
    old = whisper()
    new = extend_tokenizer(old, "ru", NEW, 50)
    number = old.vocab_size
    assert new.decode(new.prompt_ids({"source_lang": "ru"}), special=True) == (
        "<|startoftranscript|><|ru|><|transcribe|><|notimestamps|>"
    )
    assert number in new.prompt_ids({"source_lang": "Russian"})
    assert new.prompt_ids({}) == old.prompt_ids({}) == new.prompt_ids({"source_lang": "en"})
    assert old.special_id("<|ru|>") < number == new.special_id("<|ru|>")
    assert new.special_id("<|unused ru|>") == old.special_id("<|ru|>")
    assert new.decode([number - 1], special=True) == "<|30.00|>"
    with pytest.raises(ConfigError, match="knows English only"):
        new.prompt_ids({"source_lang": "de"})


def test_pieces_for_every_language_of_a_whisper():
    old = whisper()
    new = extend_tokenizer(old, None, ["naproxen and ibuprofen", "ibuprofen naproxen"] * 3, 8)
    assert new.languages == old.languages
    assert len(new.encode(" ibuprofen naproxen")) < len(old.encode(" ibuprofen naproxen"))
    assert new.encode(OLD[0]) == old.encode(OLD[0])
    both = extend_tokenizer(new, "ru", NEW, 50)
    assert both.encode(" ibuprofen naproxen") == new.encode(" ibuprofen naproxen")
    assert both.encode(NEW[0]) == old.encode(NEW[0]) != both.encode(NEW[0], "ru")
    with pytest.raises(ConfigError, match="must be added before those of one, and the tokenizer has ru already"):
        extend_tokenizer(both, None, NEW, 5)


def test_transformers_reads_the_ids_of_an_extended_whisper(tmp_path):
    transformers = pytest.importorskip("transformers")
    new = extend_tokenizer(whisper("en", "fr", "es"), "kab", NEW, 50)
    new.save(tmp_path / "new")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "new" / "tokenizer.json"))
    ids = new.encode(NEW[0], "kab")
    assert theirs.encode(NEW[0], add_special_tokens=False) == ids
    assert theirs.convert_tokens_to_ids("<|kab|>") == new.special_id("<|kab|>")
    assert theirs.decode([new.special_id("<|kab|>"), *ids], skip_special_tokens=True) == NEW[0]


def test_a_vocabulary_for_a_language_whose_token_is_there():
    """canary-1b-flash has tokens of languages without a vocabulary."""
    model = shared_vocabulary().models[""]
    special = (*shared_vocabulary().special, "<|kab|>")
    old = SentencePieceTokenizer(special, {"en": model}, defaults={"target_lang": "en"})
    with pytest.raises(ConfigError, match="knows 'kab' already; give --pieces"):
        extend_tokenizer(old, "kab")
    with pytest.warns(UserWarning, match="vocabulary lowered"):
        new = extend_tokenizer(old, "kab", NEW, 600)
    assert new.special_id("<|kab|>") == old.special_id("<|kab|>")
    with pytest.raises(ConfigError, match="--like de: the language's token is there already, and keeps its row"):
        starts_of_extended(old, new, "de")
    assert new.offsets["kab"] == old.vocab_size
    assert new.decode(new.encode(NEW[0], "kab")) == NEW[0]


def test_a_tokenizer_json_of_canary_takes_a_language():
    old = JsonTokenizer.of(shared_vocabulary())
    new = extend_tokenizer(old, "kab")
    assert new.special_id("<|kab|>") == old.vocab_size
    assert new.encode(OLD[1], "de") == old.encode(OLD[1], "de")
    assert new.prompt(Utterance("a.wav", 1.0, "x", lang="kab")).count(old.vocab_size) == 2
    with pytest.raises(ConfigError, match="takes a language token and no new pieces"):
        extend_tokenizer(old, "kab", NEW, 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "nothing to add: name a --language"),
        (("kab", [], 5), "learned from text, and there is none"),
        (("kab", [" "], 5), "learned from text, and there is none"),
        (("kab", NEW, -1), "--pieces is -1"),
        (("???", NEW, 5), "is not the code or name of a language"),
        (("German",), "the model knows 'de' already"),
        (("kab", NEW, 5), "a vocabulary of kab of 5 tokens cannot be trained; this text needs at least"),
        ((None, NEW, 50), "takes new pieces only for a language"),
    ],
)
def test_what_cannot_be_added_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        extend_tokenizer(shared_vocabulary(), *arguments)


def test_kinds_without_an_extension_are_named():
    from canter.corpus.counting import UnitCounter

    with pytest.raises(ConfigError, match="a UnitCounter cannot be extended; the tokenizers of Whisper"):
        extend_tokenizer(UnitCounter("chars"), "kab")
    with pytest.raises(ConfigError, match="vocabulary of a UnitCounter cannot be changed"):
        spellings(UnitCounter("chars"))


def test_older_files_do_not_change_their_format(tmp_path):
    """And those with additions say so, as older versions would give their ids other meanings."""
    old = shared_vocabulary()
    old.save(tmp_path / "old")
    values = json.loads((tmp_path / "old" / "canter_tokenizer.json").read_text())
    assert (values["format"], "added" in values) == ("canter-tokenizer/1", False)
    extend_tokenizer(old, "kab").save(tmp_path / "new")
    values = json.loads((tmp_path / "new" / "canter_tokenizer.json").read_text())
    assert (values["format"], values["added"]) == ("canter-tokenizer/2", ["<|kab|>"])
    with pytest.raises(ValueError, match="are not those of its models"):
        SentencePieceTokenizer(old.special, old.models, added=("kab",))


@given(st.binary(max_size=30))
def test_symbols_of_bytes_are_the_bytes(content):
    symbols = {byte: symbol for symbol, byte in byte_symbols().items()}
    assert symbol_bytes("".join(symbols[byte] for byte in content)) == content


@given(st.text("the doctrwin ▁", max_size=20))
def test_new_pieces_are_cut_into_old_ones_that_spell_them(text):
    old = Vocabulary(shared_vocabulary())
    content = text.replace("▁", " ").encode()
    ids = old.cut(content)
    assert b"".join(old.spelled[number] for number in ids) == content
    assert len(ids) <= len(content)


def test_where_rows_start():
    old = shared_vocabulary()
    vocabulary = Vocabulary(old)
    the = old.encode("the")
    assert vocabulary.start(b" the") == Start(tuple(the), kept=len(the) == 1)
    assert vocabulary.start("Ж".encode()) == Start(tuple(vocabulary.text.values()))
    languages = tuple(old.special_id(f"<|{code}|>") for code in old.languages)
    assert vocabulary.start("<|kab|>") == Start(languages)
    assert vocabulary.start("<|kab|>", "de") == Start((old.special_id("<|de|>"),))
    new = extend_tokenizer(old, "kab", NEW, 60)
    starts = starts_of_extended(old, new, "Spanish")
    assert starts[old.vocab_size] == Start((old.special_id("<|es|>"),))
    assert all(start == Start((number,), kept=True) for number, start in enumerate(starts[: old.vocab_size]))
    assert not any(start.kept for start in starts[old.vocab_size :])
    with pytest.raises(ConfigError, match="--like xho is not a language of this model; it knows de, en, es"):
        starts_of_extended(old, new, "xho")


def test_another_tokenizer_shares_pieces_by_their_text_and_tokens_by_their_role():
    old, new = shared_vocabulary(), whisper("en", "fr", "es")
    starts = starts_of_other(old, new)
    assert len(starts) == new.vocab_size
    assert starts[new.end] == Start((old.end,), kept=True)
    assert starts[new.special_id("<|es|>")] == Start((old.special_id("<|es|>"),), kept=True)
    assert not starts[new.special_id("<|fr|>")].kept
    (the,) = new.encode(" the")
    assert starts[the].kept is (b" the" in Vocabulary(old).ids)
    assert starts[the].ids == tuple(old.encode("the"))
    timestamps = starts[new.vocab_size - TIMESTAMPS :]
    assert not any(start.kept for start in timestamps)
