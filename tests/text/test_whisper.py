import json
import os
import pickle
from pathlib import Path

import pytest

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.text import WhisperTokenizer, load_tokenizer, train_tokenizer

SHARED = os.environ.get("CANTER_SHARED")
needs_model = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with Whisper's tokenizer")
TEXTS = (
    " He could wait no longer.",
    "Die Straße ist gesperrt, über Größe und Maß.",
    "  two  spaces, and 日本 \n",
    "",
    "it's 3,000 dollars",
)


@pytest.fixture
def multilingual(whisper_bytes) -> WhisperTokenizer:
    """A vocabulary of bytes with the special tokens in Whisper's order."""
    return WhisperTokenizer(whisper_bytes("en", "es").to_str())


def test_only_a_multilingual_whisper_detects_languages(multilingual):
    assert multilingual.detects_language
    with pytest.warns(UserWarning, match="lowered"):
        trained = train_tokenizer(["a b c d e f g"] * 9, ["en", "de"], 60)
    assert not trained.detects_language


@needs_model
def test_parity_with_transformers():
    transformers = pytest.importorskip("transformers")
    folder = Path(SHARED or "") / "models/whisper-tiny.en"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True).strip()
    config = json.loads((folder / "config.json").read_text())
    assert ours.vocab_size == config["vocab_size"]
    assert (ours.end, ours.pad) == (config["eos_token_id"], config["pad_token_id"])
    generation = json.loads((folder / "generation_config.json").read_text())
    start, without = generation["decoder_start_token_id"], generation["no_timestamps_token_id"]
    assert ours.prompt(Utterance("a.wav", 1.0, "x", lang="en")) == [start, without]
    assert ours.prompt_ids({"timestamp": "yes"}) == [start]
    assert ours.decode([start, without + 51], special=True) == "<|startoftranscript|><|1.00|>"
    assert not ours.multilingual
    with pytest.raises(ConfigError, match="English only"):
        ours.prompt_ids({"source_lang": "de"})


@needs_model
@pytest.mark.parametrize("task", ["translate", "ast", "s2t_translation"])
def test_an_english_only_model_refuses_to_translate(task):
    """A row that asks for it too, instead of transcribing it."""
    english = load_tokenizer(Path(SHARED or "") / "models/whisper-tiny.en")
    with pytest.raises(ConfigError, match="the task is to translate"):
        english.prompt_ids({"task": task})
    assert english.prompt_ids({"task": "asr"}) == english.prompt_ids({"task": "transcribe"})


def test_multilingual_prompts(multilingual):
    tokenizer = multilingual
    assert tokenizer.languages == ("en", "es")
    shown = tokenizer.decode(tokenizer.prompt(Utterance("a.wav", 1.0, "x", lang="es")), special=True)
    assert shown == "<|startoftranscript|><|es|><|transcribe|><|notimestamps|>"
    translated = tokenizer.prompt_ids(
        {"source_lang": "es", "task": "translate", "timestamp": "yes", "prevtext": "hola"}
    )
    shown = tokenizer.decode(translated, special=True)
    assert shown == "<|startofprev|> hola<|startoftranscript|><|es|><|translate|>"


def test_specials_in_text_are_text_and_timestamps_are_left_out(multilingual):
    tokenizer = multilingual
    ids = tokenizer.encode("<|endoftext|>")
    assert max(ids) < tokenizer.end
    assert tokenizer.decode([*ids, tokenizer.end, tokenizer.vocab_size - 1]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.vocab_size - 1], special=True) == "<|30.00|>"


def test_saved_and_pickled(tmp_path, multilingual):
    tokenizer = multilingual
    tokenizer.save(tmp_path)
    for other in (load_tokenizer(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode("hola") == tokenizer.encode("hola")


def test_another_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
