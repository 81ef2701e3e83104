"""The real whisper-tiny.en: tokens and scores of `transformers`, whatever the batch; long audio; int8."""

import os
import re
import warnings
from functools import cache
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch

import canter
from canter.corpus.audio import load_audio
from canter.corpus.manifest import Utterance, read_manifest
from canter.inference.engine.engine import Engine
from canter.inference.engine.int8 import quantize
from canter.inference.engine.requests import EngineConfig, Request
from canter.inference.recording import TranscribeConfig, Transcriber
from canter.inference.transcribe import transcribe
from canter.inference.transcript.chunks import split_audio

SHARED = os.environ.get("CANTER_SHARED")
pytestmark = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with a Whisper model")
START, NO_TIMESTAMPS = 50257, 50362


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(SHARED or "") / "models" / "whisper-tiny.en"


@pytest.fixture(scope="module")
def model(folder):
    return canter.load_model(folder)


@pytest.fixture(scope="module")
def spoken() -> list[tuple[np.ndarray, str]]:
    """Two short clips and what is said."""
    manifest = Path(SHARED or "") / "data" / "speech" / "librivox_mini" / "manifest.jsonl"
    rows = [row for row in read_manifest(manifest) if isinstance(row, Utterance) and row.duration < 3.2]
    return [(load_audio(row.audio_filepath), row.text) for row in rows[:2]]


@pytest.fixture(scope="module")
def oracle(folder, spoken):
    """``generate(**settings)`` of `transformers` on the same clips."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    reference = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    features = extractor([clip for clip, _ in spoken], sampling_rate=16000, return_tensors="pt").input_features

    @cache
    def generate(**settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reference.generate(
                features, max_new_tokens=40, return_dict_in_generate=True, output_scores=True, **settings
            )
        found = found if isinstance(found, dict) else {**found}
        rows = [[t for t in row if t not in (50256, START, NO_TIMESTAMPS)] for row in found["sequences"].tolist()]
        return rows, found.get("sequences_scores")

    return generate


def decoded(model, spoken, prompt, rows=64, **settings):
    config = EngineConfig(rows=rows, tokens_per_frame=0, extra_tokens=40, max_repeats=0, **settings)
    engine = Engine(model, model.tokenizer.end, config)
    return engine.decode([Request(clip, prompt) for clip, _ in spoken])


@pytest.mark.parametrize("rows", [1, 64])
def test_greedy_tokens(model, spoken, oracle, rows):
    found = decoded(model, spoken, [START, NO_TIMESTAMPS], rows)
    assert [one.tokens for one in found] == oracle(num_beams=1)[0]


def test_timestamps(model, spoken, oracle):
    expected = oracle(num_beams=1, return_timestamps=True)[0]
    assert [one.tokens for one in decoded(model, spoken, [START])] == expected
    assert all(tokens[0] > NO_TIMESTAMPS and tokens[-1] > NO_TIMESTAMPS for tokens in expected)


def test_beam_scores(model, spoken, oracle):
    tokens, scores = oracle(num_beams=5)
    found = decoded(model, spoken, [START, NO_TIMESTAMPS], beams=5)
    assert [one.tokens for one in found] == tokens
    assert [one.avg_logprob for one in found] == pytest.approx(scores.tolist(), abs=1e-4)


def errors(expected: str, heard: str) -> float:
    def plain(text: str) -> str:
        return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())

    return jiwer.wer(plain(expected), plain(heard))


def test_long_audio_loses_and_doubles_nothing(model, spoken, tmp_path):
    """The clips in one file, cut with an overlap in mid-speech: the words are those of the clips."""
    audio = np.concatenate([np.concatenate([clip, np.zeros(3200, np.float32)]) for clip, _ in spoken])
    soundfile.write(tmp_path / "long.wav", audio, 16000)
    utterances = [Utterance(str(tmp_path / "long.wav"), len(audio) / 16000, "")]
    engine = Engine(model, model.tokenizer.end, EngineConfig(rows=8))
    whole = transcribe(engine, model.tokenizer, utterances)[0]
    config = TranscribeConfig(timestamps="word", vad="none", chunk_seconds=4.5, overlap_seconds=2.0)
    assert len(list(split_audio([audio], None, 4.5, 2.0))) > 1
    found = transcribe(engine, model.tokenizer, utterances, config=config)[0]
    assert errors(whole.text, found.text) < 0.2
    words = [word for segment in found.segments for word in segment.words]
    assert " ".join(word.text for word in words) == found.text
    starts = [word.start for word in words]
    assert all(after > before - 0.5 for before, after in zip(starts, starts[1:]))  # noqa: RUF007
    assert words[-1].end <= len(audio) / 16000 + 0.01


def test_word_times_follow_the_audio(model, spoken, tmp_path):
    """The same clip after two seconds of silence: every word is two seconds later."""
    clip = spoken[0][0]
    for name, audio in (("a", clip), ("b", np.concatenate([np.zeros(32000, np.float32), clip]))):
        soundfile.write(tmp_path / f"{name}.wav", audio, 16000)
    utterances = [
        Utterance(str(tmp_path / "a.wav"), len(clip) / 16000, ""),
        Utterance(str(tmp_path / "b.wav"), len(clip) / 16000 + 2, ""),
    ]
    engine = Engine(model, model.tokenizer.end)
    found = transcribe(engine, model.tokenizer, utterances, config=TranscribeConfig(timestamps="word"))
    early, late = ([word for one in result.segments for word in one.words] for result in found)
    assert [word.text.strip(",.") for word in early] == [word.text.strip(",.") for word in late]
    shifts = [after.start - before.start for before, after in zip(early[1:], late[1:])]
    assert np.median(shifts) == pytest.approx(2.0, abs=0.15)


def test_text_that_comes_before(model, spoken, tmp_path):
    """It stands in the prompt, cut to its end where it is long, and decides how words are written."""
    clip = spoken[0][0]
    soundfile.write(tmp_path / "a.wav", clip, 16000)
    utterance = Utterance(str(tmp_path / "a.wav"), len(clip) / 16000, "")
    engine, tokenizer = Engine(model, model.tokenizer.end), model.tokenizer
    listener = Transcriber(engine, tokenizer, TranscribeConfig(prompt="so they said"))
    assert list(listener.request({}).prompt) == tokenizer.prompt_ids({"prevtext": "so they said"})
    many = listener.prompt({}, "one two three " * 300)
    assert 100 < len(many) <= model.config.decoder.positions // 2
    loud = transcribe(engine, tokenizer, [utterance], config=TranscribeConfig(prompt="HE SAID: NO! SHE SAID: YES!"))
    plain = transcribe(engine, tokenizer, [utterance])
    assert plain[0].text.casefold().strip(".") in loud[0].text.casefold()
    assert loud[0].text != plain[0].text


def test_int8(folder, model, spoken):
    quantized = quantize(canter.load_model(folder))
    found = decoded(quantized, spoken, [START, NO_TIMESTAMPS])
    plain = decoded(model, spoken, [START, NO_TIMESTAMPS])
    texts = [[model.tokenizer.decode(one.tokens) for one in some] for some in (plain, found)]
    assert errors(" ".join(texts[0]), " ".join(texts[1])) < 0.2
    assert all(parameter.dtype == torch.float32 for parameter in quantized.parameters())
    sizes = [sum(p.numel() for p in one.encoder.layers.parameters()) for one in (quantized, model)]
    assert sizes[0] < 0.01 * sizes[1]


@pytest.fixture(scope="module")
def recognizer(folder) -> canter.Recognizer:
    return canter.load(folder, device="cpu")


@pytest.fixture(scope="module")
def cases() -> Path:
    return Path(SHARED or "") / "cases" / "inference"


@pytest.mark.parametrize("vad", ["energy", "silero"])
def test_silence_says_nothing_and_cues_begin_with_speech(recognizer, cases, vad):
    if vad == "silero":
        pytest.importorskip("silero_vad")
        pytest.importorskip("onnxruntime")
    silence, speech = recognizer.transcribe(
        [cases / "silence_10s.flac", cases / "lead_silence_10s.opus"], timestamps="segment", vad=vad
    )
    assert (silence.text, silence.segments) == ("", ())
    assert "ask not what your country can do for you" in speech.text
    assert 9.5 <= speech.segments[0].start <= 10.2
    assert 19.5 <= speech.segments[-1].end <= 21.0


def test_repeated_words_are_kept(recognizer, cases):
    """ "No" eight or nine times, then "Stop it.": what is written without a guard."""
    guarded, free = (
        recognizer.transcribe(cases / "repeated_word.flac", max_repeats=repeats).text for repeats in (3, 0)
    )
    assert guarded == free
    assert guarded.lower().count("no") >= 8
    assert "stop it" in guarded.lower()


def test_clips_without_silence_are_decoded_as_before(model, recognizer, spoken):
    """Detectors change no text of theirs."""
    texts = [
        [one.text for one in recognizer.transcribe([clip for clip, _ in spoken], vad=vad)] for vad in ("energy", "none")
    ]
    assert texts[0] == texts[1]
