"""Requests to a Whisper and their results: continued windows, languages, silence. The weights are random, so tests that
depend on the model's output set it."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from canter.corpus.manifest import Utterance
from canter.inference.engine.alignment import Alignment
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Hypothesis
from canter.inference.inputs import read_items
from canter.inference.languages import Defaults
from canter.inference.recording import TranscribeConfig, Transcriber
from canter.inference.transcribe import transcribe
from canter.inference.transcript.reading import Fallback
from canter.models.decoder import DecoderConfig
from canter.models.features import WhisperFeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.text import WhisperTokenizer

SECOND = 50  # of timestamps


@pytest.fixture(scope="module")
def whisper(whisper_bytes) -> SpeechModel:
    """A Whisper of English and Spanish, whose tokens are bytes and timestamps."""
    tokenizer = WhisperTokenizer(whisper_bytes("en", "es").to_str())
    torch.manual_seed(0)
    encoder = WhisperEncoderConfig(layers=1, width=16, heads=2, feedforward=32, mels=16)
    decoder = DecoderConfig(
        layers=1, width=16, heads=2, feedforward=32, vocabulary=tokenizer.vocab_size + 1501, positions=128
    )
    features = WhisperFeatureConfig(mels=16, pad_seconds=0.0)
    model = SpeechModel(ModelConfig(features, encoder, decoder)).eval()
    model.generation = {
        "no_timestamps_token_id": tokenizer.special_id("<|notimestamps|>"),
        "decoder_start_token_id": tokenizer.special_id("<|startoftranscript|>"),
    }
    model.tokenizer = tokenizer
    return model


class Told(Engine):
    """Engine that returns the given text and times for audio of the given seconds."""

    def __init__(self, model: SpeechModel, said: dict[float, list[str | float]]):
        super().__init__(model, model.tokenizer.end)
        self.said, self.heard, self.stamped = said, [], []

    def _hypothesis(self, live, slot) -> Hypothesis:
        found = super()._hypothesis(live, slot)
        self.heard.append(len(live.rows[slot].request.audio) / 16000)
        self.stamped.append(live.drawn[slot].stamped)
        tokens, text = [], []
        for one in self.said[self.heard[-1]]:
            new = (
                self.model.tokenizer.encode(one)
                if isinstance(one, str)
                else [self.rules.timestamps.first + round(one * SECOND)]
            )
            tokens += new
            text += new if isinstance(one, str) else []
        times = tuple(np.linspace(0.0, 0.5, len(text) + 1).tolist())
        return replace(found, tokens=tokens, logprob=0.0, alignment=Alignment(tuple(text), times, (1.0,) * len(text)))


def test_audio_after_an_early_end_of_whisper_is_decoded(whisper, tmp_path):
    """A sentence that the window cuts: the first timestamp is written, and then the end."""
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=16000 * 6) * 0.1, 16000)
    said = {6.0: [0.0, " one", 2.5, 2.5], 3.5: [0.0, " two", 1.0, 1.0], 2.5: [0.5, " three", 2.2, 2.2]}
    engine = Told(whisper, said)
    config = TranscribeConfig(timestamps="word")
    (found,) = transcribe(engine, whisper.tokenizer, [Utterance(str(tmp_path / "a.wav"), 6.0, "")], config=config)
    assert engine.heard == [6.0, 3.5, 2.5]
    assert found.text == "one two three"
    words = [word for one in found.segments for word in one.words]
    assert [(one.start, one.end) for one in found.segments] == [(one.start, one.end) for one in words]
    assert [one.start for one in words] == [0.0, 2.5, 3.5]
    assert [word.text for one in found.segments for word in one.words] == ["one", "two", "three"]
    assert (engine.counters.utterances, engine.counters.audio_seconds) == (1, 6.0)


def test_without_timestamps_nothing_is_decoded_again(whisper, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=16000 * 6) * 0.1, 16000)
    engine = Told(whisper, {6.0: [" one"]})
    (found,) = transcribe(engine, whisper.tokenizer, [Utterance(str(tmp_path / "a.wav"), 6.0, "")])
    assert (engine.heard, found.text) == ([6.0], "one")


def test_a_window_that_ends_in_speech_is_asked_for_timestamps(whisper, tmp_path):
    """Timestamps are requested even if not wanted: they show where a sentence that the window split begins."""
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=16000 * 8) * 0.1, 16000)
    said = {6.0: [0.0, " one", 2.5, 2.5], 3.5: [0.0, " two", 3.5], 5.0: [" two three"]}
    engine = Told(whisper, said)
    config = TranscribeConfig(vad="none", chunk_seconds=6.0, overlap_seconds=3.0)
    (found,) = transcribe(engine, whisper.tokenizer, [Utterance(str(tmp_path / "a.wav"), 8.0, "")], config=config)
    assert dict(zip(engine.heard, engine.stamped, strict=True)) == {6.0: True, 3.5: True, 5.0: False}
    assert found.text == "one two three"


@pytest.mark.parametrize("fallback", [Fallback(), None])
def test_silence_is_found_with_and_without_fallback(whisper, fallback):
    listener = Transcriber(
        Engine(whisper, whisper.tokenizer.end), whisper.tokenizer, TranscribeConfig(fallback=fallback)
    )
    request = listener.request({"source_lang": "en"})
    assert request.scored
    tokens = whisper.tokenizer.encode(" thank you")
    unlikely = Hypothesis(None, tokens, True, logprob=-3.0 * len(tokens))
    assert request.policy
    assert request.policy.retry(unlikely) == (0.2 if fallback else None)
    assert listener.segments(unlikely, 3.0)
    assert not listener.segments(replace(unlikely, no_speech=0.9), 3.0)


def test_an_unset_language_is_detected_for_a_translation_too(whisper, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 16000)
    listener = Transcriber(Engine(whisper, whisper.tokenizer.end), whisper.tokenizer)
    asked = {}
    for language in (None, "es"):
        for task in (None, "transcribe", "translate"):
            (item,) = read_items([tmp_path / "a.wav"], defaults=Defaults(language, task))
            assert item.utterance
            request = listener.request(listener.slots(item.utterance))
            shown = whisper.tokenizer.decode(request.prompt, special=True)
            asked[language, task] = (len(request.languages), "<|translate|>" in shown)
            assert language is None or "<|es|>" in shown
    assert asked == {
        (None, None): (2, False),
        (None, "transcribe"): (2, False),
        (None, "translate"): (2, True),
        ("es", None): (0, False),
        ("es", "transcribe"): (0, False),
        ("es", "translate"): (0, True),
    }
    needed = Defaults(task="translate", required=("en", "es"))  # of a model that detects none
    (refused,) = read_items([tmp_path / "a.wav"], defaults=needed)
    assert "names no language" in str(refused.problem)
