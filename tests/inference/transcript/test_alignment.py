"""The path is the cheapest one; words join to the text; pieces join without lost or doubled words."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.inference.engine.alignment import Alignment, path_starts
from canter.inference.engine.requests import Hypothesis
from canter.inference.engine.timestamps import TimestampTokens
from canter.inference.transcript.reading import (
    Assembly,
    Fallback,
    WindowPolicy,
    compression_ratio,
    ended_early,
    in_speech,
    join_overlap,
    segments_of,
    skipped,
    words_of,
)
from canter.inference.transcript.segments import Segment, Word
from canter.text import Characters

FIRST = 1000  # a first timestamp
STAMPS = TimestampTokens(FIRST, FIRST + 1500)


def cheapest(cost: np.ndarray) -> float:
    """The cost of the cheapest path, cell by cell."""
    total = np.full((len(cost) + 1, cost.shape[1] + 1), np.inf)
    total[0, 0] = 0
    for i in range(len(cost)):
        for j in range(cost.shape[1]):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    return total[-1, -1]


def cost_of(cost: np.ndarray, starts: np.ndarray) -> float:
    """The least cost of a path that comes to each token at these frames: it stays until the next start, and moves on
    either in that frame or just before."""
    total = 0.0
    for row, start in enumerate(starts):
        last = starts[row + 1] if row + 1 < len(starts) else cost.shape[1] - 1
        stay = cost[row, start : last + 1]
        moves = row + 1 < len(starts) and last > start and cost[row, last] > 0
        total += stay[:-1].sum() if moves else stay.sum()
    return total


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 999))
def test_path_is_the_cheapest(rows, columns, seed):
    cost = np.random.default_rng(seed).uniform(0.1, 1, size=(rows, columns))
    starts = path_starts(cost)
    assert starts[0] == 0
    assert (np.diff(starts) >= 0).all()
    if columns >= rows:  # costs are positive, so a path moves diagonally and never stays where it has left
        assert cost_of(cost, starts) == pytest.approx(cheapest(cost))


def test_path_follows_a_staircase():
    cost = np.ones((3, 9))
    for token in range(3):
        cost[token, 3 * token : 3 * token + 3] = -1
    assert path_starts(cost).tolist() == [0, 3, 6]


LETTERS = dict(enumerate("abcdefgh ,'(東京", 1))


class Spelled:
    """A tokenizer whose tokens are numbers of characters; 200 and 201 are halves of one."""

    def decode(self, ids, *, special=False):
        ids, out = list(ids), ""
        while ids:
            one = ids.pop(0)
            if one == 200:
                out += "é" if ids and ids.pop(0) == 201 else "\ufffd"
            elif one < FIRST:
                out += LETTERS.get(one, "\ufffd")
        return out if special else out.strip()


def tokens_of(text: str) -> list[int]:
    table = {value: key for key, value in LETTERS.items()}
    return [number for one in text for number in ([200, 201] if one == "é" else [table[one]])]


def aligned(text: str) -> Alignment:
    tokens = tokens_of(text)
    return Alignment(tuple(tokens), tuple(np.arange(len(tokens) + 1) * 0.5), (1.0,) * len(tokens))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" ab cd", [" ab", " cd"]),
        (" ab, c'd", [" ab,", " c'd"]),
        (" é a", [" é", " a"]),
        (" (ab c", [" (ab", " c"]),
        ("東京a", ["東", "京", "a"]),
    ],
)
def test_words(text, expected):
    words = words_of(aligned(text), Spelled())
    assert [word.text for word in words] == expected
    assert "".join(word.text for word in words) == text
    assert words[0].start == 0
    assert all(one.end == other.start for one, other in pairwise(words))


def test_segments_of_timestamps():
    tokens = [FIRST, *tokens_of(" ab"), FIRST + 50, FIRST + 100, *tokens_of(" cd"), FIRST + 200]
    tokens += [FIRST + 250, *tokens_of(" e")]
    found = segments_of(Hypothesis(None, tokens, True), Spelled(), 5.5, STAMPS)
    assert [(one.start, one.end, one.text) for one in found] == [(0, 1, "ab"), (2, 4, "cd"), (5, 5.5, "e")]
    with_words = Hypothesis(None, tokens, True, alignment=aligned(" ab cd e"))
    found = segments_of(with_words, Spelled(), 5.5, STAMPS)
    assert [[word.text for word in one.words] for one in found] == [[" ab"], [" cd"], [" e"]]


def test_pauses_are_no_part_of_the_words_beside_them():
    """The path begins with the audio and ends with it; the pauses between segments fall to the words beside."""
    tokens = tokens_of(" a b c") * 2
    starts = [0.0, 3.0, 3.4, 3.8, 4.0, 4.2, 4.4, 7.0, 7.2, 7.4, 7.6, 7.8, 10.0]
    alignment = Alignment(tuple(tokens), tuple(starts), (1.0,) * len(tokens))
    stamped = [FIRST, *tokens_of(" a b c"), FIRST + 225, FIRST + 350, *tokens_of(" a b c"), FIRST + 400]
    found = segments_of(Hypothesis(None, stamped, True, alignment=alignment), Spelled(), 10.0, STAMPS)
    times = [[(round(word.start, 2), round(word.end, 2)) for word in one.words] for one in found]
    assert times == [
        [(2.0, 3.4), (3.4, 4.0), (4.0, 4.4)],  # 1.4 s: the median is over LONG_WORD
        [(7.0, 7.2), (7.2, 7.6), (7.6, 8.0)],
    ]


@pytest.mark.parametrize(
    ("times", "seconds", "expected"),
    [
        (["ab", 2.0, 2.0], 6.0, 2.0),
        (["ab", 2.0, 2.0], 2.4, None),  # too little is left
        (["ab", 2.0], 6.0, None),  # nobody speaks any more
        (["ab", 2.0, 2.0, "cd"], 6.0, None),
        ([0.6], 6.0, 0.6),
        ([0.4], 6.0, None),  # windows that go on by so little would never end
        ([0.0], 6.0, None),  # nothing heard: no use to ask again
        ([], 6.0, None),
    ],
)
def test_where_a_hypothesis_ended_early(times, seconds, expected):
    tokens = []
    for one in times:
        tokens += tokens_of(one) if isinstance(one, str) else [FIRST + round(50 * one)]
    assert ended_early(Hypothesis(None, tokens, True), seconds, STAMPS) == expected


def voiced(*spans: tuple[float, float], seconds: float) -> np.ndarray:
    """Return a mask of frames of the given length in seconds, true within the spans."""
    found = np.zeros(round(seconds * 50), bool)
    for start, end in spans:
        found[round(start * 50) : round(end * 50)] = True
    return found


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0.0, 2.0)], None),
        ([(0.0, 2.2), (9.0, 9.5)], None),  # a cough
        ([(0.0, 2.0), (5.0, 9.5)], 4.7),
        ([(0.0, 9.5)], 2.0),
        ([], None),
    ],
)
def test_after_one_timestamp_the_detector_is_asked(spans, expected):
    """The model reports silence after the text, as it also does after a window that ends too early."""
    tokens = [FIRST, *tokens_of("ab"), FIRST + 100]
    found = ended_early(Hypothesis(None, tokens, True), 10.0, STAMPS, voiced(*spans, seconds=10.0))
    assert found == (None if expected is None else pytest.approx(expected, abs=0.03))
    of_a_rest = voiced((0.0, 5.0), *((start + 5, end + 5) for start, end in spans), seconds=15.0)
    assert ended_early(Hypothesis(None, tokens, True), 10.0, STAMPS, of_a_rest) == found
    assert ended_early(Hypothesis(None, tokens, True), 10.0, STAMPS, np.zeros(0, bool)) is None
    without = Hypothesis(None, tokens[1:], True)  # it was not asked for timestamps
    assert ended_early(without, 10.0, STAMPS, voiced((0.0, 9.5), seconds=10.0)) is None


def test_speech_without_text_is_decoded_again():
    """One word stands for sixteen seconds of speech: decoding continues in the pause after that word."""
    tokens = [FIRST, *tokens_of("abc" * 20), FIRST + 250, FIRST + 250, *tokens_of("de"), FIRST + 1050]
    speech = voiced((0.0, 6.4), (6.8, 12.0), (12.5, 21.0), seconds=22.0)
    asked = (Hypothesis(None, tokens, True), Spelled(), 22.0, STAMPS)
    assert skipped(*asked, speech) == pytest.approx(6.4, abs=0.03)
    assert skipped(*asked, None) is skipped(*asked, np.zeros(0, bool)) is None
    assert skipped(*asked, voiced((0.0, 6.4), seconds=22.0)) is None  # the rest is silence
    dense = [FIRST, *tokens_of("abc" * 20), FIRST + 250, FIRST + 250, *tokens_of("de" * 40), FIRST + 1050]
    assert skipped(Hypothesis(None, dense, True), *asked[1:], speech) is None


def test_segments_begin_and_end_with_speech():
    speech = voiced((2.0, 4.0), (4.3, 6.0), (9.0, 9.9), seconds=12.0)
    found = in_speech([Segment(0.0, 8.0, "a b"), Segment(8.9, 12.0, "c")], speech)
    assert [one.start for one in found] == pytest.approx([1.9, 8.9], abs=0.03)
    assert [one.end for one in found] == pytest.approx([6.1, 10.0], abs=0.03)
    words = (Word(0.5, 2.4, "a", 1.0), Word(2.4, 7.5, "b", 1.0))
    (timed,) = in_speech([Segment(0.5, 7.5, "a b", words=words)], speech)
    assert (timed.words[0].start, timed.words[-1].end) == (timed.start, timed.end)
    assert (timed.start, timed.end) == pytest.approx((1.9, 6.1), abs=0.03)
    silent = [Segment(10.5, 12.0, "d")]
    assert in_speech(silent, speech) == silent  # the detector may be wrong
    assert in_speech(silent, np.zeros(0, bool)) == silent


@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 3)), max_size=4),
    st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 3)), max_size=4),
)
def test_segments_only_shrink(spans, places):
    segments = [Segment(start, start + length, "a") for start, length in spans]
    found = in_speech(segments, voiced(*((a, a + b) for a, b in places), seconds=12.0))
    for before, after in zip(segments, found, strict=True):
        assert before.start <= after.start < after.end <= before.end


def test_words_of_canarys_timestamps():
    class Stamped(Characters):
        def decode(self, ids, *, special=False):
            return "<|0|> one<|5|><|7|> two<|12|>" if special else "one two"

    found = segments_of(Hypothesis(None, [1], True), Stamped("ab"), 2.0)
    assert [(w.text, round(w.start, 2), round(w.end, 2)) for w in found[0].words] == [
        (" one", 0.0, 0.4),
        (" two", 0.56, 0.96),
    ]
    assert (found[0].start, round(found[0].end, 2), found[0].text) == (0.0, 0.96, "one two")


def spoken(words: list[str], start: float = 0.0) -> list[Word]:
    return [Word(start + n, start + n + 0.9, " " + word, 1.0) for n, word in enumerate(words)]


@given(st.integers(8, 30), st.integers(2, 6), st.integers(0, 2), st.integers(0, 2), st.integers(0, 99))
def test_pieces_join(count, shared, worse_end, worse_start, seed):
    """Distinct words one a second; of the shared ones each side mishears some at its edge."""
    words = [f"w{n}" for n in range(count)]
    at = count // 2
    worse_end, worse_start = min(worse_end, shared // 3), min(worse_start, shared // 3)
    before = words[: at + shared - worse_end] + ["x"] * worse_end
    after = ["y"] * worse_start + words[at + worse_start :]
    assembly = Assembly()
    parts = [(0.0, before, 0.0), (float(at), after, float(shared))]
    assembly.total = 2
    for number, (start, part, overlap) in list(enumerate(parts))[:: 1 if seed % 2 else -1]:
        heard = spoken(part)
        segment = Segment(0.0, len(part), " ".join(part), (1,), tuple(heard))
        assembly.add(number, [segment], start, overlap)
    text, segments = assembly.finished()
    assert text.split() == words
    assert [word.text for one in segments for word in one.words] == words
    starts = [word.start for one in segments for word in one.words]
    assert starts == pytest.approx(list(range(count)))


def test_nothing_alike_parts_in_the_middle():
    assert join_overlap(spoken(["a", "b", "c", "d"]), spoken(["e", "f", "g"], 2.0), 2.0, 4.0) == (3, 1)


def test_if_one_piece_is_empty_the_other_is_kept():
    heard = spoken(["hello", "there", "friend"], 27.0)
    assert join_overlap([], heard, 27.0, 30.0) == (0, 0)
    assert join_overlap(heard, [], 27.0, 30.0) == (3, 0)


def test_one_that_fell_silent_loses_nothing():
    """Words of the overlap that the first piece misses come from the second, even if one word is similar in both."""
    before = [Word(n, n + 0.5, f" {text}", 1.0) for n, text in enumerate(["as", "he", "was"])]
    after = [Word(3 + n, 3.5 + n, f" {text}", 1.0) for n, text in enumerate(["he", "might", "even"])]
    assert join_overlap(before, after, 2.5, 5.5) == (3, 0)


def test_segments_are_returned_once_they_are_final():
    assembly = Assembly()
    one = Segment(0.0, 1.0, "a", (1,), tuple(spoken(["a"])))
    assert assembly.add(1, [one], 5.0, 0.0) == []
    assert assembly.add(0, [one], 0.0, 0.0) == [Segment(0.0, 1.0, "a", (1,), (Word(0.0, 0.9, "a", 1.0),))]
    assembly.total = 3
    last = assembly.add(2, [one], 9.0, 0.0)
    assert [segment.start for segment in last] == [5.0, 9.0]
    assert assembly.complete


def test_fallback():
    rule = Fallback()

    def retry(hypothesis, text):
        tokenizer = SimpleNamespace(decode=lambda tokens: text)
        return WindowPolicy(tokenizer, rule).retry(hypothesis)

    good = Hypothesis(None, [1] * 9, True, logprob=-1.0)
    assert retry(good, "a text that is said once") is None
    assert compression_ratio("abc " * 50) > 2.4
    assert retry(good, "abc " * 50) == 0.2
    assert retry(Hypothesis(None, [1] * 9, True, logprob=-11.0, temperature=0.2), "a") == 0.4
    assert retry(Hypothesis(None, [1] * 9, True, logprob=-11.0, temperature=1.0), "a") is None
    silence = Hypothesis(None, [1] * 9, True, logprob=-11.0, no_speech=0.9)
    assert retry(silence, "a") is None
    assert rule.silent(silence)
    assert not rule.silent(Hypothesis(None, [1] * 9, True, logprob=-1.0, no_speech=0.9))
