"""Options with the names of faster-whisper: languages, previous text, clips, suppressed tokens, hallucinations."""

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

import canter
from canter.cli.main import main
from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.inference.engine.engine import Engine, suppressed_tokens
from canter.inference.engine.requests import EngineConfig, Hypothesis
from canter.inference.recognizer import Recognizer
from canter.inference.recording import Recording, TranscribeConfig, Transcriber
from canter.inference.transcribe import transcribe
from canter.inference.transcript.chunks import clipped
from canter.inference.transcript.reading import is_anomalous, without_hallucinations
from canter.inference.transcript.segments import Segment, Word
from canter.models.formats.checkpoint import save_model
from canter.text import train_tokenizer

from .conftest import noises, small_model

SHARED = os.environ.get("CANTER_SHARED")
SENTENCES = ["one two three", "four five six seven", "eight nine ten", "three one two", "the end of it all"]
needs_shared = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with a Whisper model and speech")


@pytest.fixture(scope="module")
def tiny_en() -> Recognizer:
    return canter.load(Path(SHARED or "") / "models" / "whisper-tiny.en", device="cpu")


@pytest.fixture(scope="module")
def canary() -> Recognizer:
    tokenizer = train_tokenizer(SENTENCES * 20, languages=["en", "de"], vocab_size=40)
    model = small_model(vocabulary=tokenizer.vocab_size, seed=30)  # which writes text
    model.tokenizer = tokenizer
    return Recognizer(model, "canary")


# -- languages --


def test_detection_gives_every_language_without_text(polyglot, spoken_tones):
    model = Recognizer(polyglot)
    found = model.detect_language(spoken_tones("ees"))
    assert found.language == "en"
    assert list(found.probabilities) == ["en", "es", "fr"]
    assert sum(found.probabilities.values()) == pytest.approx(1.0)
    assert found.probability == found.probabilities["en"] == max(found.probabilities.values())
    spoken = model.transcribe(spoken_tones("eee"))
    assert model.detect_language(spoken_tones("eee")).probability == pytest.approx(spoken.language_probability)
    silent = model.detect_language(np.zeros(32000, np.float32))
    assert (silent.language, silent.probability, silent.probabilities) == (None, None, {})
    several = list(model.detect_language([spoken_tones("ss"), "missing.wav", spoken_tones("e")]))
    assert [one.language for one in several] == ["es", None, "en"]
    assert several[1].error is not None


def test_languages_that_are_not_asked_for_are_never_found(polyglot, spoken_tones):
    model, samples = Recognizer(polyglot), spoken_tones("ee")
    assert model.transcribe(samples).language == "en"
    found = model.transcribe(samples, language=("Spanish", "fr"))
    assert found.language in ("es", "fr")
    assert found.language == model.transcribe(samples, language="es,fr").language
    assert set(model.detect_language(samples, among=("es", "fr")).probabilities) == {"es", "fr"}
    assert model.detect_language(samples, among=("es",)).probability == 1.0
    with pytest.raises(ConfigError, match="'klingon' is not the name or code of a language"):
        model.detect_language(samples, among=("en", "klingon"))


def test_models_that_cannot_detect_say_so(canary):
    with pytest.raises(ConfigError, match=r"detect_language: canary is a model .* cannot do that"):
        canary.detect_language(noises(1)[0])
    with pytest.raises(ConfigError, match="cannot detect which of en, de is spoken; name one language"):
        canary.transcribe(noises(1)[0], language="en,de")


def test_the_command_prints_languages(polyglot, spoken_tones, tmp_path, capsys):
    folder = str(save_model(polyglot, tmp_path / "model", polyglot.tokenizer))
    for name in ("ee", "ss", " "):
        soundfile.write(tmp_path / f"{name.strip() or 'silent'}.wav", spoken_tones(name), 16000)
    files = [str(tmp_path / f"{name}.wav") for name in ("ee", "ss", "silent")]
    assert main(["transcribe", folder, *files, "--detect-language"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["en", "es", "no"]
    out = tmp_path / "out.jsonl"
    assert main(["transcribe", folder, *files, "--detect-language", "--language", "en,fr", "-o", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["language"] for row in rows][::2] == ["en", None]
    assert set(rows[1]["language_probabilities"]) == {"en", "fr"}
    assert "pred_text" not in rows[0]
    for options, message in (
        (["--format", "srt"], "use --format txt, json or nemo"),
        (["-o", str(tmp_path / "folder")], "is a folder: name one"),
    ):
        assert main(["transcribe", folder, *files, "--detect-language", *options]) == 1
        assert message in capsys.readouterr().err


# -- previous text --


@needs_shared
def test_previous_text_is_the_prompt_of_the_next_chunk(tiny_en, monkeypatch):
    """Long recordings of LibriVox: each chunk has the text before it, whatever shares the batch."""
    clips = sorted(Path(SHARED or "", "data", "speech", "librivox_mini", "flac").glob("*.flac"))[:3]
    parts = [soundfile.read(path, dtype="float32")[0][:32000] for path in clips]
    pause = np.zeros(16000 * 8, np.float32)
    one = np.concatenate([part for clip in parts[:3] for part in (clip, pause)])
    two = np.concatenate([part for clip in parts[:1:-1] for part in (clip, pause)])
    prompts: list[str] = []
    request = Transcriber.request

    def noted(self: Transcriber, slots, prompt=None):
        prompts.append(prompt or "")
        return request(self, slots, prompt)

    monkeypatch.setattr(Transcriber, "request", noted)
    found = tiny_en.transcribe(one, condition_on_previous_text=True, prompt="Hello.")
    texts = [segment.text for segment in found.segments]
    assert len(texts) == 3
    assert [text for text in prompts if text][-3:] == ["Hello.", f"Hello. {texts[0]}", f"Hello. {texts[0]} {texts[1]}"]
    both = list(tiny_en.transcribe([two, one], condition_on_previous_text=True, prompt="Hello.", batch_size=2))
    assert [result.text for result in both[1:]] == [found.text]
    assert both[0].text == tiny_en.transcribe(two, condition_on_previous_text=True, prompt="Hello.").text


def test_previous_text_needs_a_place_in_the_prompt(canary, polyglot, spoken_tones):
    with pytest.raises(ConfigError, match=r"condition_on_previous_text: this is a model .* cannot do that"):
        canary.transcribe(noises(1)[0], language="en", condition_on_previous_text=True)
    samples = spoken_tones("ee ee", pause=3.0)
    found = Recognizer(polyglot).transcribe(samples, condition_on_previous_text=True)
    assert found.language == "en"


def test_text_before_a_chunk_at_a_high_temperature_is_forgotten(polyglot, spoken_tones):
    transcriber = Transcriber(Engine(polyglot, polyglot.tokenizer.end), polyglot.tokenizer)
    slots = {"source_lang": "en", "target_lang": "en"}
    recording = Recording(transcriber, transcriber.request(slots))
    chunks = list(transcriber.chunks([spoken_tones("e   e   e   e", pause=3.0)]))
    requests = list(recording.requests(chunks))
    assert len(requests) == 4
    prompts = []
    for number, (word, temperature) in enumerate([("a", 0.0), ("b", 0.4), ("c", 0.6), ("d", 0.0)]):
        prompts.append(polyglot.tokenizer.decode(recording.conditioned(number, requests[number], slots).prompt))
        tokens = polyglot.tokenizer.encode(word)
        recording.add(number, Hypothesis(None, tokens, True, temperature=temperature))
    assert [prompt.strip() for prompt in prompts] == ["", "a", "a b", ""]


# -- clips --


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=7, unique=True).map(sorted),
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
)
def test_clips_are_the_spans_of_the_samples(bounds, sizes):
    samples = np.arange(sum(sizes), dtype=np.float32)
    blocks = np.split(samples, np.cumsum(sizes)[:-1])
    seconds = [bound / 10 for bound in bounds]
    found: dict[int, list[np.ndarray]] = {}
    for number, part in clipped(blocks, seconds, 10):
        found.setdefault(number, []).append(part)
    for number, start in enumerate(bounds[::2]):
        end = bounds[2 * number + 1] if 2 * number + 1 < len(bounds) else None
        assert np.array_equal(np.concatenate(found.get(number, [samples[:0]])), samples[start:end])


def test_only_clips_are_transcribed_at_the_times_of_the_recording(canary, tmp_path):
    first, second = noises(2, shortest=2.0)
    samples = np.zeros(16000 * 30, np.float32)
    samples[16000 : 16000 + len(first)] = first
    samples[16000 * 20 : 16000 * 20 + len(second)] = second
    soundfile.write(tmp_path / "long.wav", samples, 16000, subtype="FLOAT")
    asked = {"language": "en", "timestamps": "word"}
    whole = canary.transcribe(tmp_path / "long.wav", **asked)
    assert len(whole.segments) == 2
    clip = canary.transcribe(tmp_path / "long.wav", clip_timestamps=(15.0, 25.0), **asked)
    alone = canary.transcribe(samples[16000 * 15 : 16000 * 25], **asked)
    assert clip.duration == 30.0
    assert [(one.start - 15, one.text) for one in clip.segments] == [
        (pytest.approx(one.start, abs=2e-3), one.text) for one in alone.segments
    ]
    both = canary.transcribe(tmp_path / "long.wav", clip_timestamps=(0.0, 10.0, 15.0), **asked)
    assert both.segments[-1].start > 15
    assert len(both.segments) == 2
    assert canary.transcribe(tmp_path / "long.wav", clip_timestamps=(40.0,), **asked).text == ""


@pytest.mark.parametrize("clips", [(3.0, 1.0), (-1.0,), (float("nan"),), (1.0, 1.0), (0.0, float("inf"))])
def test_clips_increase(clips):
    with pytest.raises(ConfigError, match="they must be increasing seconds"):
        TranscribeConfig(clip_timestamps=clips)


# -- suppressed tokens --


def test_suppressed_tokens_are_never_written(canary):
    clips = noises(4)
    usual = [one.text for one in canary.transcribe(clips, language="en")]
    engine = canary._engine(EngineConfig())
    tokens = {token for clip in clips for token in _tokens(canary, clip)}
    assert len(tokens) > 1
    for token in sorted(tokens)[:2]:
        without = {one for clip in clips for one in _tokens(canary, clip, suppress=(-1, token))}
        assert token not in without
    assert [one.text for one in canary.transcribe(clips, language="en", suppress_tokens=(-1,))] == usual
    assert engine is canary._engine(EngineConfig())


def _tokens(model: Recognizer, clip: np.ndarray, suppress: tuple[int, ...] = (-1,)) -> tuple[int, ...]:
    (segment,) = model.transcribe(clip, language="en", suppress_tokens=suppress, vad="none").segments or (
        Segment(0, 0, ""),
    )
    return segment.tokens


@needs_shared
def test_special_tokens_stay_suppressed(tiny_en):
    module = tiny_en.module
    usual = set(module.generation["suppress_tokens"])
    end = tiny_en.tokenizer.end
    assert set(suppressed_tokens(module, end, (-1,))) == usual
    assert set(suppressed_tokens(module, end, (-1, 11))) == usual | {11}
    left = set(suppressed_tokens(module, end, ()))
    assert left == {token for token in usual if token > end}
    assert left


def test_ids_that_cannot_be_suppressed(canary):
    end = canary.tokenizer.end
    for ids, message in (
        ((4000,), "4000 is no token"),
        ((-2,), "-2 is no token"),
        ((end,), f"{end} ends a transcript"),
    ):
        with pytest.raises(ConfigError, match=message):
            canary.transcribe(noises(1)[0], language="en", suppress_tokens=ids)


# -- hallucinations --


def said(start: float, end: float, probability: float = 0.9, words: int = 3) -> Segment:
    """A segment of equally long words."""
    times = np.linspace(start, end, words + 1).tolist()
    found = tuple(Word(one, other, f"word{place}", probability) for place, (one, other) in enumerate(pairwise(times)))
    return Segment(start, end, " ".join(word.text for word in found), words=found)


def test_words_that_look_invented():
    assert not is_anomalous(said(0.0, 1.5))
    assert is_anomalous(said(0.0, 1.5, probability=0.1))
    assert is_anomalous(said(0.0, 9.0))  # three words of 3 s
    assert is_anomalous(said(0.0, 0.1))  # of 0.03 s
    assert not is_anomalous(Segment(0.0, 1.0, "text"))
    comma = Word(1.5, 1.5, ",", 0.0)
    assert not is_anomalous(replace(said(0.0, 1.5), words=(*said(0.0, 1.5).words, comma)))


def test_anomalous_segments_between_silence_are_left_out():
    first, strange, last = said(3.0, 5.0), said(12.0, 13.0, probability=0.05), said(18.0, 21.0)
    assert without_hallucinations([first, strange, last], 30.0, 2.0) == [first, last]
    assert without_hallucinations([first, strange, last], 30.0, 8.0) == [first, strange, last]
    beside = said(5.2, 6.0, probability=0.05)
    assert without_hallucinations([first, beside, last], 30.0, 2.0) == [first, beside, last]
    assert without_hallucinations([first, said(28.5, 29.9, probability=0.05)], 30.0, 2.0) == [first]
    assert without_hallucinations([said(0.5, 1.5, probability=0.05), first], 30.0, 1.0) == [first]


@needs_shared
def test_hallucinations_are_left_out_of_a_transcript(tiny_en, monkeypatch):
    clip = sorted(Path(SHARED or "", "data", "speech", "librivox_mini", "flac").glob("*.flac"))[1]
    plain = tiny_en.transcribe(clip, timestamps="word")
    same = tiny_en.transcribe(clip, timestamps="word", hallucination_silence_threshold=1.0)
    assert same.text == plain.text
    assert same.segments == plain.segments
    with pytest.raises(ConfigError, match="needs times of words"):
        tiny_en.transcribe(clip, hallucination_silence_threshold=1.0)
    with pytest.raises(ConfigError, match="must be more than 0 seconds"):
        tiny_en.transcribe(clip, timestamps="word", hallucination_silence_threshold=0.0)


def test_detection_shares_batches(polyglot, spoken_tones, tmp_path):
    """A manifest's rows keep their order, and a stated language does not count."""
    for name in ("e", "s"):
        soundfile.write(tmp_path / f"{name}.wav", spoken_tones(2 * name), 16000)
    rows = [Utterance(str(tmp_path / f"{name}.wav"), 2.6, text="", lang="fr") for name in "essee"]
    for size in (1, 8):
        engine = Engine(polyglot, polyglot.tokenizer.end, EngineConfig(rows=size))
        found = transcribe(engine, polyglot.tokenizer, rows, config=TranscribeConfig(detect_only=True))
        assert [one.language for one in found] == ["en", "es", "es", "en", "en"]
        assert engine.counters.tokens == engine.counters.steps == 0
        assert [one.text for one in found] == [""] * 5
