"""Pieces of a long recording: every word of the text once, in order, cut where transcript and text agree."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.inference.transcript.matching import GivenWord, levels, pieces_of
from canter.inference.transcript.segments import Word
from canter.inference.transcript.vad import FRAME

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def given_text(text: str, tokens: int = 2) -> list[GivenWord]:
    return [GivenWord(f" {word}", (7,) * tokens) for word in text.split()]


def spoken(text: str, start: float = 0.0, seconds: float = 0.5) -> list[Word]:
    """The words one after another, each followed by a pause of its length."""
    places = [start + 2 * seconds * n for n in range(len(text.split()))]
    return [Word(place, place + seconds, word, 0.9) for place, word in zip(places, text.split())]


def level_of(words: list[Word], seconds: float) -> np.ndarray:
    """Loud while a word lasts, else quiet."""
    found = np.full(round(seconds / FRAME), -60.0)
    for word in words:
        found[round(word.start / FRAME) : round(word.end / FRAME)] = -20.0
    return found


@given(
    st.lists(st.sampled_from([*LETTERS, "-", "alpha", "omega"]), min_size=1, max_size=60),
    st.lists(st.sampled_from([*LETTERS, "alpha", "omega"]), max_size=60),
    st.floats(1.0, 20.0),
    st.integers(2, 30),
)
def test_every_word_is_in_one_piece(text, recognised, window, most):
    words = given_text(" ".join(text))
    said = spoken(" ".join(recognised))
    seconds = 1.0 + (said[-1].end if said else 10.0)
    pieces = pieces_of(words, said, level_of(said, seconds), window, most)
    assert [n for piece in pieces for n in range(piece.first, piece.last)] == list(range(len(words)))
    for piece in pieces:
        assert 0 <= piece.start < piece.end <= seconds + 0.2
        assert piece.end - piece.start <= window + 0.2 + FRAME
        assert sum(len(word.tokens) for word in words[piece.first : piece.last]) <= max(most, 2)
    assert all(one.start <= other.start + 0.2 for one, other in pairwise(pieces))


def test_cuts_are_in_pauses_between_words_that_agree():
    text = " ".join(f"word{n}" for n in range(30))
    said = spoken(text.replace("word9 ", "bird9 "))
    pieces = pieces_of(given_text(text), said, level_of(said, 30.0), 10.0, 1000)
    for piece, following in pairwise(pieces):
        assert piece.end == following.start
        assert said[piece.last - 1].end - FRAME <= piece.end <= said[piece.last].start
        assert piece.last not in (9, 10)
    assert len(pieces) == 4


def test_a_passage_that_is_not_said_has_a_piece_of_its_own():
    before, after = " ".join(LETTERS[:10]), " ".join(LETTERS[10:20])
    unsaid = "nothing of this long passage is in the recording"
    said = spoken(f"{before} {after}")
    words = given_text(f"{before} {unsaid} {after}")
    pieces = pieces_of(words, said, level_of(said, 20.0), 30.0, 1000)
    assert [(piece.first, piece.last) for piece in pieces] == [(0, 10), (10, 19), (19, 29)]
    assert pieces[1].start >= said[9].end
    assert pieces[1].end <= said[10].start


def test_speech_that_the_text_lacks_is_in_no_piece():
    text = " ".join(LETTERS[:20])
    said = [*spoken("an introduction that nobody wrote down here"), *spoken(text, 10.0)]
    (piece,) = pieces_of(given_text(text), said, level_of(said, 30.0), 30.0, 1000)
    assert said[6].end <= piece.start <= 10.0
    assert piece.end > said[-1].start


def test_without_recognised_words_the_text_is_spread_evenly():
    words = given_text(" ".join(["four"] * 30))
    pieces = pieces_of(words, [], np.zeros(round(30 / FRAME)), 10.0, 1000)
    assert [(piece.first, piece.last) for piece in pieces] == [(0, 10), (10, 20), (20, 30)]
    assert [piece.end for piece in pieces] == pytest.approx([10, 20, 30])


def test_levels():
    loud = np.sin(np.arange(16000) * 0.1).astype(np.float32)
    found = levels(np.concatenate([np.zeros(16000, np.float32), loud, np.zeros(7, np.float32)]), 16000)
    assert len(found) == 101
    assert found[:45].max() < -90
    assert found[55:95] == pytest.approx(-3.0, abs=0.3)
