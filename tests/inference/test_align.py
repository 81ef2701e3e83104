"""Given texts with their audio: words keep their spelling, long audio is divided, wrong texts score low."""

import os
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

import canter
from canter.corpus.audio import load_audio
from canter.corpus.manifest import Utterance
from canter.errors import AudioError, ConfigError
from canter.inference.align import Aligner, given_words
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.loading import load_model
from canter.models.formats.checkpoint import save_model
from canter.text import Characters, train_tokenizer

from .conftest import noises, small_model

CLIPS = Path(__file__).parent.parent / "docs" / "clips"
SENTENCES = ["one two three", "four five six seven", "eight nine ten", "three one two", "東京 is, well, a city."]
TEXTS = {
    "sense_0880.flac": "he was not an ill disposed young man",
    "sense_0930.flac": "he might even have been made amiable himself",
    "lj_011_0202.flac": "The uncle claimed her. The husband resisted.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random model with a CTC head on characters, saved with its tokenizer."""
    tokenizer = train_tokenizer(SENTENCES * 20, languages=["en"], vocab_size=70)
    model = small_model(vocabulary=tokenizer.vocab_size, positions=128, seed=30)
    model.characters = Characters("abcdefghi ,")
    return save_model(model, tmp_path_factory.mktemp("align") / "model", tokenizer)


@pytest.fixture(scope="module")
def small(folder) -> Engine:
    model = load_model(folder)
    return Engine(model, model.tokenizer.end, EngineConfig(rows=4))


@pytest.fixture(scope="module")
def whisper() -> canter.Recognizer:
    shared = os.environ.get("CANTER_SHARED")
    if not shared:
        pytest.skip("CANTER_SHARED does not name the folder of shared models")
    return canter.load(Path(shared) / "models" / "whisper-tiny.en", device="cpu")


@pytest.fixture(scope="module")
def recording() -> tuple[np.ndarray, list[float]]:
    """The clips several times, one after another with pauses, and the seconds at which each begins."""
    parts, begins = [], []
    for name in TEXTS:
        begins.append(sum(map(len, parts)) / 16000)
        parts += [load_audio(CLIPS / name, sample_rate=16000), np.zeros(12000, np.float32)]
    cycle = sum(map(len, parts)) / 16000
    return np.concatenate(parts * 3), [begin + n * cycle for n in range(3) for begin in begins]


def test_words_are_those_of_the_text():
    tokenizer = train_tokenizer(SENTENCES * 20, languages=["en"], vocab_size=70)
    words = given_words("one  two,\n\n 東京 is\t\U0001f600 city.\n", tokenizer)
    assert [word.text for word in words] == [" one", " two,", " 東", "京", " is", " \U0001f600", " city."]
    assert [word.line for word in words] == [0, 0, 2, 2, 2, 2, 2]
    joined = [token for word in words[:2] for token in word.tokens]
    assert joined == tokenizer.encode("one two,")


@pytest.mark.parametrize(("text", "message"), [("", "empty"), (" \n", "empty"), ("... -", "no letters")])
def test_texts_without_words_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        given_words(text, train_tokenizer(SENTENCES, languages=["en"], vocab_size=70))


@pytest.mark.parametrize("method", ["ctc", "attention"])
def test_words_have_times_in_order(small, method):
    audio = noises(6, shortest=1.0)
    texts = ["one two, three", "four\nfive six", "eight. Nine ten", "東京 is a city", "three (one) two 5", "ten"]
    rows = [Utterance("array", len(clip) / 16000, text, lang="en") for clip, text in zip(audio, texts)]
    for row, clip in zip(rows, audio):
        ((_, found),) = Aligner(small, small.model.tokenizer, method).align([row], clip)
        assert found.error is None
        words = [word for segment in found.segments for word in segment.words]
        assert "".join(word.text for word in words) == "".join(row.text.split())
        assert found.text.split() == row.text.split()
        assert [segment.text for segment in found.segments] == {
            "four\nfive six": ["four", "five six"],
            "eight. Nine ten": ["eight.", "Nine ten"],
        }.get(row.text, [row.text])
        assert all(0 <= word.start <= word.end <= row.duration for word in words)
        assert all(one.start <= other.start for one, other in pairwise(words))
        assert all(0 <= word.probability <= 1 for word in words)
        assert found.score < 0


def test_methods_that_a_model_lacks(small):
    tokenizer = small.model.tokenizer
    assert Aligner(small, tokenizer).spelling is not None
    assert Aligner(small, tokenizer, "attention").spelling is None
    with pytest.raises(ConfigError, match="method is 'viterbi'"):
        Aligner(small, tokenizer, "viterbi")
    without = small_model(vocabulary=tokenizer.vocab_size)  # nothing says how its head spells
    engine = Engine(without, tokenizer.end)
    assert Aligner(engine, tokenizer).spelling is None
    with pytest.raises(ConfigError, match="method ctc"):
        Aligner(engine, tokenizer, "ctc")


def test_rows_that_cannot_be_aligned_have_an_error(small, tmp_path):
    soundfile.write(tmp_path / "good.wav", noises(1)[0], 16000)
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    rows = [
        Utterance(str(tmp_path / "good.wav"), 1.0, "one two"),
        Utterance(str(tmp_path / "missing.wav"), 2.0, "one two"),
        Utterance(str(tmp_path / "bad.wav"), 3.0, "one two"),
        Utterance(str(tmp_path / "good.wav"), 1.0, "..."),
        Utterance(str(tmp_path / "good.wav"), 1.0, "one", lang="xx"),
        Utterance(str(tmp_path / "good.wav"), 1.0, "one " + "two" * 300),
    ]
    aligner = Aligner(small, small.model.tokenizer)
    found, scores = dict(aligner.align(rows)), dict(aligner.scores(rows))
    assert [found[n].error is None for n in range(6)] == [True, *[False] * 5]
    for number, named in ((1, "missing.wav"), (2, "bad.wav"), (3, "no letters"), (4, "xx"), (5, "at most")):
        assert named in str(found[number].error)
        assert named in str(scores[number])
    assert scores[0].logprob == pytest.approx(found[0].score, abs=1e-4)


def test_scores_do_not_depend_on_the_batch(small, tmp_path):
    rows = []
    for number, clip in enumerate(noises(20)):
        soundfile.write(tmp_path / f"{number}.wav", clip, 16000, subtype="FLOAT")
        text = " ".join(random.Random(number).choices(["one", "two", "three", "four", "five"], k=1 + number % 7))
        rows.append(Utterance(str(tmp_path / f"{number}.wav"), len(clip) / 16000, text, lang="en"))
    tokenizer = small.model.tokenizer
    found = [
        dict(Aligner(Engine(small.model, tokenizer.end, EngineConfig(rows=size)), tokenizer).scores(rows))
        for size in (1, 8)
    ]
    assert len(found[0]) == 20
    for number in range(20):
        one, other = (scores[number] for scores in found)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.end_logprob == pytest.approx(other.end_logprob, abs=1e-4)


def test_long_text_of_a_small_model_loses_no_word(small):
    """More audio than the window and more tokens than positions, of a model that recognises nothing right."""
    clip = np.concatenate(noises(30, shortest=2.0))
    text = " ".join(["one two three four five six seven eight nine ten"] * 20)
    ((_, found),) = Aligner(small, small.model.tokenizer).align([Utterance("a", len(clip) / 16000, text)], clip)
    words = [word for segment in found.segments for word in segment.words]
    assert [word.text for word in words] == text.split()
    assert all(one.start <= other.start for one, other in pairwise(words))


def test_a_known_text_of_real_speech(whisper):
    found = whisper.align(CLIPS / "lj_011_0202.flac", TEXTS["lj_011_0202.flac"])
    assert [word.text for word in found.words] == TEXTS["lj_011_0202.flac"].split()
    assert [segment.text for segment in found.segments] == ["The uncle claimed her.", "The husband resisted."]
    transcribed = whisper.transcribe(CLIPS / "lj_011_0202.flac", timestamps="word").words
    for word, other in zip(found.words, transcribed, strict=True):  # the model writes the same words
        assert word.start == pytest.approx(other.start, abs=0.25)
        assert word.probability > 0.5
    assert found.score > -0.3


def test_a_wrong_text_scores_low(whisper):
    right, wrong = (whisper.align(CLIPS / "sense_0880.flac", TEXTS[name]).score for name in list(TEXTS)[:2])
    assert right > -1.5
    assert wrong < -3


def test_long_audio_is_divided(whisper, recording):
    audio, begins = recording
    texts = [*TEXTS.values()] * 3
    added = [*texts[:4], "and this is a long passage that is not in the recording at all", *texts[4:]]
    found = whisper.align(audio, "\n".join(added))
    assert [segment.text for segment in found.segments] == added
    said = [segment for segment in found.segments if segment.text in TEXTS.values()]
    assert [segment.start for segment in said] == pytest.approx(begins, abs=0.6)
    unsaid = found.segments[4]
    assert unsaid.end - unsaid.start < 1.5
    assert np.mean([word.probability for word in unsaid.words]) < 0.3 < np.mean([w.probability for w in said[0].words])
    assert unsaid.avg_logprob < min(segment.avg_logprob for segment in said) - 1


def test_files_of_an_alignment(whisper, tmp_path):
    found = whisper.align(CLIPS / "lj_011_0202.flac", TEXTS["lj_011_0202.flac"])
    assert "00:00:00" in found.save(tmp_path / "a.srt").read_text()
    row = found.save(tmp_path / "a.jsonl").read_text()
    assert '"score"' in row
    assert '"probability"' in row
    assert "pred_text" not in row


def test_python_refuses_what_cannot_be_aligned(whisper, tmp_path):
    with pytest.raises(AudioError, match="does not exist"):
        whisper.align(tmp_path / "no.wav", "one")
    with pytest.raises(ConfigError, match="empty"):
        whisper.align(CLIPS / "sense_0880.flac", "  ")
    with pytest.raises(ConfigError, match="method ctc"):
        whisper.align(CLIPS / "sense_0880.flac", "one", method="ctc")
    with pytest.raises(ConfigError, match="a folder"):
        whisper.align(tmp_path, "one")
