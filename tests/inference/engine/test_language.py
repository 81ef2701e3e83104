"""The language of a recording, its probability, and the place at which another language begins."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from canter.corpus.manifest import Utterance
from canter.inference.engine import language
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.inference.recording import TranscribeConfig, Transcriber, Transcription
from canter.inference.transcribe import Job, transcribe_jobs

seconds = st.floats(0.01, 3600.0)
shares = st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3).map(lambda found: [x / sum(found) for x in found])
pieces = st.lists(st.tuples(seconds, shares), min_size=1, max_size=8)


@given(pieces)
def test_the_language_is_the_most_probable_over_all_of_the_speech(parts):
    found = language.spoken(parts)
    assert found is not None
    total = sum(length for length, _ in parts)
    means = [sum(length * one[k] for length, one in parts) / total for k in range(3)]
    assert found[1] == pytest.approx(max(means))
    assert means[found[0]] == pytest.approx(max(means))
    assert language.spoken(reversed(parts))[1] == pytest.approx(found[1])


@given(pieces, st.integers(0, 2), st.floats(0.01, 0.5))
def test_a_stray_piece_does_not_decide_the_language(parts, other, stray):
    """However certain: a second of speech outweighs half a second of a cough."""
    parts = [(1.0 + length, [0.9, 0.05, 0.05]) for length, _ in parts]
    certain = [float(k == other) for k in range(3)]
    assert language.spoken([(stray, certain), *parts])[0] == 0


def test_nothing_detected():
    assert language.spoken([]) is None
    assert language.spoken([(1.0, ())]) is None
    assert language.spoken([(0.0, (0.2, 0.8))]) == (1, 0.8)


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 400)), max_size=12), st.floats(0.5, 6.0))
def test_stretches_are_in_order_and_long_enough(runs, least):
    voiced = np.concatenate([np.zeros(0, bool), *([False] * quiet + [True] * loud for quiet, loud in runs)])
    found = language.speech_spans(voiced.astype(bool), 0.02, least)
    inside = np.zeros(len(voiced), bool)
    for start, end in found:
        assert not inside[round(start / 0.02) : round(end / 0.02)].any()
        inside[round(start / 0.02) : round(end / 0.02)] = True
    assert found == sorted(found)
    assert inside[voiced.astype(bool)].all()  # no speech is left out
    assert len(found) < 2 or min(end - start for start, end in found) >= least
    assert all(after[0] - before[1] >= language.PAUSE - 1e-9 for before, after in zip(found, found[1:]))  # noqa: RUF007


def test_stretches_with_their_pauses_cover_all():
    assert language.with_pauses([(1.0, 2.0), (3.0, 5.0)], 9.0) == [(0.0, 2.5), (2.5, 9.0)]
    assert language.with_pauses([(1.0, 2.0)], 4.0) == [(0.0, 4.0)]


@pytest.mark.parametrize(
    ("found", "place"),
    [
        ([], None),
        ([(0.9, 0.1)], None),
        ([(0.9, 0.1), (0.9, 0.1)], None),
        ([(0.99, 0.01), (0.01, 0.99)], 5.0),
        ([(0.99, 0.01), (0.99, 0.01), (0.01, 0.99), (0.99, 0.01)], 10.0),
        ([(0.99, 0.01), (0.6, 0.4), (0.01, 0.99)], 10.0),
        ([(0.99, 0.01), (0.4, 0.6), (0.01, 0.99)], 5.0),
        ([(0.55, 0.45), (0.01, 0.99)], None),  # nothing certain before
        ([(0.9, 0.1), (0.2, 0.8)], None),  # neighbours, of which the model is not sure
    ],
)
def test_where_the_language_changes(found, place):
    places = [(5.0 * number + 0.5, 5.0 * number + 4.5) for number in range(len(found))]
    assert language.change(places, found) == place


def heard(model, audio: np.ndarray, window: float | None = None, rows: int = 4, **settings) -> Transcription:
    config = TranscribeConfig(fallback=None, chunk_seconds=window, **settings)
    listener = Transcriber(Engine(model, model.tokenizer.end, rows_of(rows)), model.tokenizer, config)
    ((_, found),) = transcribe_jobs(listener, [[(0, Job(Utterance("tones", 0.0, ""), len(audio) / 16000, audio))]])
    return found


def rows_of(rows: int) -> EngineConfig:
    return EngineConfig(rows=rows, tokens_per_frame=0.0, extra_tokens=3)


def test_each_language_of_a_window_is_decoded_on_its_own(polyglot, spoken_tones):
    found = heard(polyglot, spoken_tones("eeeessss"))
    assert found.text == "eee sss"
    assert [segment.text for segment in found.segments] == ["eee", "sss"]
    assert found.segments[0].end == pytest.approx(5.05, abs=0.15)
    assert found.segments[1].start == pytest.approx(5.2, abs=0.15)
    assert found.language_probability == pytest.approx(0.5, abs=0.1)
    several = heard(polyglot, spoken_tones("eeeesssseeeee"))
    assert several.text == "eee sss eee"
    assert several.language == "en"


def test_one_language_is_one_window(polyglot, spoken_tones):
    found = heard(polyglot, spoken_tones("ssssssss"))
    assert (found.text, found.language, len(found.segments)) == ("sss", "es", 1)
    assert found.language_probability > 0.9
    short = heard(polyglot, spoken_tones("eeees"))  # a word of another language is no change
    assert short.text == "eee"


def test_a_stray_piece_goes_by_its_neighbour(polyglot, spoken_tones):
    """Ten seconds in Spanish, a cough far behind: the recording is Spanish, and so is the cough."""
    audio = np.r_[spoken_tones("ssssss"), spoken_tones(" " * 6), spoken_tones("?")[: 16000 // 2]]
    for one in (audio, audio[::-1].copy()):
        found = heard(polyglot, one, window=10.0)
        assert (found.language, len(found.segments)) == ("es", 2)
        assert found.language_probability > 0.8


def test_languages_do_not_depend_on_the_batch(polyglot, spoken_tones):
    audio = np.r_[spoken_tones("eeeeesssss" * 3), spoken_tones("?")]
    found = [heard(polyglot, audio, window=9.0, rows=rows) for rows in (1, 8)]
    assert found[0].segments == found[1].segments
    assert found[0].language_probability == pytest.approx(found[1].language_probability, abs=1e-6)


def test_a_context_before_needs_no_language(polyglot, spoken_tones):
    plain = heard(polyglot, spoken_tones("ssss"))
    found = heard(polyglot, spoken_tones("ssss"), prompt="so they said")
    assert (found.language, found.language_probability) == ("es", plain.language_probability)
    listener = Transcriber(
        Engine(polyglot, polyglot.tokenizer.end), polyglot.tokenizer, TranscribeConfig(prompt="so they said")
    )
    (hypothesis,) = listener.engine.decode([replace(listener.request({}), audio=spoken_tones("ssss"))])
    assert list(hypothesis.prompt) == listener.prompt({"source_lang": "es"}, "so they said")


def test_a_stated_language_is_not_detected(polyglot, spoken_tones):
    listener = Transcriber(Engine(polyglot, polyglot.tokenizer.end), polyglot.tokenizer)
    assert not listener.request({"source_lang": "en"}).languages
    config = TranscribeConfig(fallback=None)
    listener = Transcriber(Engine(polyglot, polyglot.tokenizer.end, rows_of(2)), polyglot.tokenizer, config)
    utterance = Utterance("tones", 0.0, "", lang="fr")
    ((_, found),) = transcribe_jobs(listener, [[(0, Job(utterance, 10.4, spoken_tones("eeeessss")))]])
    assert (found.language, found.language_probability, len(found.segments)) == ("fr", None, 1)
