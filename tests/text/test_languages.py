"""Languages as people write them: one table, the models' own codes, and rows that name none of them."""

import os
from pathlib import Path

import pytest

import canter
from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.evaluation.normalize import language
from canter.inference.languages import Defaults
from canter.text import WhisperTokenizer, train_tokenizer
from canter.text.languages import canonical, english_name, find, is_said, resolve, same

SHARED = os.environ.get("CANTER_SHARED")
WAYS = {
    "en": "en EN English english en-US en_us eng <|en|> en_US.UTF-8 ENGLISH en-GB",
    "zh": "zh zh-CN cmn cmn_hans_cn Chinese Mandarin zho chi Chinese,simplified",
    "pt": "pt pt-BR por Portuguese",
    "ca": "ca catalan Valencian",
    "kab": "kab Kabyle",
    "yue": "yue Cantonese",
    "jv": "jv jw jav Javanese",
    "he": "he iw heb Hebrew",
    "no": "no nb nob nor Norwegian Bokmål",
    "nn": "nn nno Nynorsk",
    "tl": "fil tl tgl Filipino Tagalog",
    "ht": "ht Haitian_Creole haitian",
    "xyz": "xyz",
}


@pytest.mark.parametrize(("written", "code"), [(one, code) for code, ways in WAYS.items() for one in ways.split()])
def test_all_ways_to_write_a_language(written, code):
    assert canonical(written) == code
    assert same(written, code)
    assert language(written) == code


def test_what_names_no_language():
    assert [is_said(one) for one in (None, "", " ", "auto", "AUTO", "und", "en")] == [False] * 6 + [True]
    assert [canonical(one) for one in ("klingon", "日本語", "12")] == [None, None, None]
    assert english_name("de") == "German"
    assert language(None) == language("auto") == "en"


def test_a_models_own_codes_are_found():
    assert find("Javanese", ["en", "jw"]) == "jw"
    assert find("zh-CN", ["eng", "cmn", "cmn_Hant"]) == "cmn"
    assert find("cmn_hant", ["eng", "cmn", "cmn_Hant"]) == "cmn_Hant"
    assert find("pt-br", ["pt-PT", "pt-BR"]) == "pt-BR"
    assert find("en", ["eng"]) == "eng"
    assert find("yue", ["zh", "en"]) is None


def test_an_unknown_language_names_itself_and_those_known():
    with pytest.raises(ConfigError, match=r"^'kab' \(Kabyle\) is not a language of this model; it knows en, de$"):
        resolve("kab", ["en", "de"])
    with pytest.raises(ConfigError, match=r"^'klingon' is not the name or code of a language; it knows en$"):
        resolve("klingon", ["en"])
    many = [f"{first}{second}" for first in "abcde" for second in "abcdefghij"]
    with pytest.raises(ConfigError, match=r"it knows aa, ab, .*, bb, and 38 more$"):
        resolve("French", many)
    with pytest.raises(ConfigError, match="it has no languages to choose from"):
        resolve("German", [])


def test_prompts_of_every_kind(whisper_bytes):
    whisper = WhisperTokenizer(whisper_bytes("en", "jw", "zh").to_str())
    canary = train_tokenizer(["one two three"] * 20, ["English", "en-US", "de"], vocab_size=40)
    assert canary.languages == ("de", "en")
    for tokenizer, ways in ((whisper, "jv jav Javanese"), (whisper, "cmn zh-CN"), (canary, "EN English eng")):
        prompts = {tuple(tokenizer.prompt(Utterance("a.wav", 1.0, "x", lang=way))) for way in ways.split()}
        assert len(prompts) == 1
    # two ways to write one language are no translation
    row = Utterance("a.wav", 1.0, "x", source_lang="en-US", target_lang="English")
    assert canary.prompt(row) == canary.prompt(Utterance("a.wav", 1.0, "x", lang="en"))
    english = WhisperTokenizer(whisper_bytes("en").to_str())
    for tokenizer, written in ((whisper, "German"), (canary, "fr")):
        with pytest.raises(ConfigError, match="is not a language of this model"):
            tokenizer.prompt(Utterance("a.wav", 1.0, "x", lang=written))
    assert Defaults.of(english, None).language == "en"
    assert Defaults.of(canary, "German", "translate", "English") == Defaults("de", "translate", "en")
    with pytest.raises(ConfigError, match="cannot translate"):
        Defaults.of(english, None, "translate")


@pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder of cases")
def test_an_index_leaves_out_what_the_tokenizer_cannot_prompt(whisper_bytes):
    names = ("en", "zh", "pt", "ca", "am", "jw", "iw", "no", "tl")
    tokenizer = WhisperTokenizer(whisper_bytes(*names).to_str())
    manifest = Path(SHARED or "", "cases", "training", "langs.jsonl")
    index = canter.build_index(manifest, tokenizer=tokenizer, progress=False)
    left_out = {problem.line: problem.reason for problem in index.problems}
    assert left_out.keys() == {15, 17, 27, 28}  # kab, yue, and two rows that name none
    assert left_out[15].startswith("prompt cannot be made: 'kab' (Kabyle) is not a language of this model")
    assert len(index) == 24
