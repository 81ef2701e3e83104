import json
import os
import pickle
from pathlib import Path

import pytest

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.text import WhisperTokenizer, load_tokenizer, train_tokenizer

from ..helpers import write_token_lists

SHARED = os.environ.get("CANTER_SHARED")
needs_model = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with Whisper's tokenizer")
TEXTS = (
    " He could wait no longer.",
    "Die Straße ist gesperrt, über Größe und Maß.",
    "  two  spaces, and 日本 \n",
    "",
    "it's 3,000 dollars",
)
SCRIPTS = (
    *TEXTS,
    "Съешь же ещё этих мягких французских булок.",
    "他等不及了。彼は待てなかった。그는 기다릴 수 없었다.",
    "لم يعد بإمكانه الانتظار، ٣٠٠٠ دولار",
    "वह और इंतज़ार नहीं कर सकता था।",
    "เขารอไม่ไหวแล้ว",
    "Δεν μπορούσε να περιμένει — άλλο! 👩‍👩‍👧 \u202f\x00",
)
LANGUAGES = (*(f"x{number:02}" for number in range(98)), "en", "yue")
"""As many as large-v3 has."""


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


@pytest.fixture(params=["english", "large-v3"])
def lists(request, tmp_path):
    """A folder with the token lists of a Whisper, and its added tokens."""
    source = Path(SHARED or "") / "models/whisper-tiny.en/tokenizer.json"
    return tmp_path, write_token_lists(source, tmp_path, LANGUAGES if request.param == "large-v3" else ())


@needs_model
@pytest.mark.parametrize("form", ["added_tokens.json", "tokenizer_config.json", "special_tokens_map.json", "no merges"])
def test_lists_of_tokens_give_the_tokenizer_of_transformers(lists, form):
    """Whatever file the special tokens are in, and without merges, which follow from the order of the tokens."""
    transformers = pytest.importorskip("transformers")
    folder, added = lists
    theirs = transformers.WhisperTokenizer.from_pretrained(folder)
    if form == "tokenizer_config.json":
        tokens = {number: {"content": name, "special": True, "lstrip": False} for name, number in added.items()}
        (folder / form).write_text(json.dumps({"added_tokens_decoder": tokens}))
    if form == "special_tokens_map.json":
        (folder / form).write_text(json.dumps({"additional_special_tokens": [{"content": name} for name in added]}))
    if form == "no merges":
        (folder / "merges.txt").unlink()
    elif form != "added_tokens.json":
        (folder / "added_tokens.json").unlink()
    ours = load_tokenizer(folder)
    for text in SCRIPTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True).strip()
    assert {name: ours.special_id(name) for name in added} == added
    assert ours.vocab_size == (51866 if ours.multilingual else 51864)
    ours.save(folder / "saved")
    again = transformers.WhisperTokenizer.from_pretrained(folder / "saved")
    assert again.encode(TEXTS[1], add_special_tokens=False) == ours.encode(TEXTS[1])
    assert again.convert_tokens_to_ids("<|notimestamps|>") == ours.special_id("<|notimestamps|>")


@needs_model
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", "[]", "vocab.json holds a list"),
        ("vocab.json", '{"a": 0}', "vocab.json has no token 'Ġ', which merges.txt merges"),
        ("added_tokens.json", '{"<|en|>": 0}', "vocab.json: two tokens have the same id"),
        ("vocab.json", '{"a": "0"}', "'a' has the id '0'; it must be a number below 500,000"),
        ("vocab.json", '{"a": 1e99}', "'a' has the id 1e.99; it must be a number"),
        ("added_tokens.json", '{"<|endoftext|>": 7}', "'<.endoftext.>' has the id 7, but in other files 50256"),
        ("added_tokens.json", "{", "added_tokens.json is not JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is .1.; it must be an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "a"}}}', "added_tokens_decoder.-1 is"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "a"}}', "added_tokens_decoder.1 is 'a'"),
        ("special_tokens_map.json", '{"additional_special_tokens": [5]}', "it must be a list of tokens"),
        ("special_tokens_map.json", '{"additional_special_tokens": {"a": 1}}', "it must be a list of tokens"),
        ("merges.txt", "a b\na  b\n", r"merges.txt:2: 'a  b' is not a pair"),
        ("merges.txt", "a zzzzzz\n", "vocab.json has no token 'zzzzzz', which merges.txt merges"),
        ("merges.txt", b"\xff\xfe", "merges.txt cannot be read"),
    ],
)
def test_lists_that_contradict_each_other_take_one_line(tmp_path, file, content, message):
    source = Path(SHARED or "") / "models/whisper-tiny.en/tokenizer.json"
    write_token_lists(source, tmp_path)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message) as refused:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_merges_are_not_derived_without_end(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a" * 5000: 0, "b" * 5000: 1}))
    with pytest.raises(CheckpointError, match=r"too long tokens to derive their merges; add tokenizer\.json"):
        load_tokenizer(tmp_path)


@needs_model
def test_suppressed_tokens_follow_from_the_tokenizer():
    """Those of whisper-tiny.en's own generation_config.json."""
    folder = Path(SHARED or "") / "models/whisper-tiny.en"
    derived = load_tokenizer(folder).generation()
    published = json.loads((folder / "generation_config.json").read_text())
    assert derived == {name: published[name] for name in derived}
    assert len(derived["suppress_tokens"]) == 90


@needs_model
def test_ids_of_large_v3_are_those_of_its_tokenizer(tmp_path):
    """Its 100th language moves all ids behind by one from those of the other multilingual Whispers."""
    source = Path(SHARED or "") / "models/whisper-tiny.en/tokenizer.json"
    added = write_token_lists(source, tmp_path, LANGUAGES)
    derived = load_tokenizer(tmp_path).generation()
    assert derived["no_timestamps_token_id"] == added["<|notimestamps|>"] == 50364
    assert derived["decoder_start_token_id"] == 50258
    assert derived["suppress_tokens"][-6:] == [50258, 50359, 50360, 50361, 50362, 50363]
    assert derived["begin_suppress_tokens"] == [220, 50257]
    assert derived["lang_to_id"]["<|yue|>"] == 50358
    assert derived["task_to_id"] == {"transcribe": 50360, "translate": 50359}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its vocabulary open
@pytest.mark.parametrize("languages", [0, 99, 100], ids=["english", "multilingual", "large-v3"])
def test_tokens_and_settings_are_those_of_openai_whisper(languages):
    """Its vocabularies, as a list of tokens without merges: the same ids, texts and suppressed tokens."""
    whisper = pytest.importorskip("whisper.tokenizer", reason="openai-whisper is not installed")
    theirs = whisper.get_tokenizer(bool(languages), num_languages=languages or 99)
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that stand for themselves; others follow 255
    shifted = (number for number in range(256) if number not in plain)
    spelled = {number: chr(number) for number in plain} | {number: chr(256 + n) for n, number in enumerate(shifted)}
    ranks = theirs.encoding._mergeable_ranks
    vocabulary = {"".join(map(spelled.__getitem__, token)): rank for token, rank in ranks.items()}
    ours = WhisperTokenizer.of_tokens({**vocabulary, **theirs.encoding._special_tokens}, None, "openai-whisper")
    for text in SCRIPTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)).strip()
    settings = ours.generation()
    specials = {theirs.sot, theirs.sot_prev, theirs.sot_lm, theirs.no_speech, theirs.translate, theirs.transcribe}
    assert settings["suppress_tokens"] == sorted({*theirs.non_speech_tokens, *specials})
    assert settings["begin_suppress_tokens"] == [*theirs.encode(" "), theirs.eot]
    assert settings["no_timestamps_token_id"] == theirs.no_timestamps == theirs.timestamp_begin - 1
    assert ours.vocab_size == theirs.encoding.n_vocab
    assert sorted(ours.languages) == sorted(theirs.all_language_codes if languages else ["en"])
