"""Error rates: against hand-counted cases, a plain dynamic programme, and the rules of the leaderboard."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.evaluation.normalize import normalizer
from canter.evaluation.wer import Counts, paired_difference, rtfx, score, wer_interval

words = st.lists(st.sampled_from("abcdef"), max_size=7).map(" ".join)
pairs = st.lists(st.tuples(words, words), min_size=1, max_size=6)


def edit_distance(left: list[str], right: list[str]) -> int:
    """Levenshtein's recurrence, one row at a time."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


@given(pairs)
def test_rates_are_edit_distances_summed_before_dividing(texts):
    references, hypotheses = zip(*texts)
    result = score(references, hypotheses, normalize="none")
    errors = sum(edit_distance(a.split(), b.split()) for a, b in texts)
    total = sum(len(a.split()) for a, _ in texts)
    assert result.total.errors == errors
    assert result.wer == (errors / total if total else (math.inf if errors else 0.0))
    assert result.total.character_errors == sum(edit_distance(list(a), list(b)) for a, b in texts)
    assert result.total.words == total
    assert sum((item.counts for item in result.utterances), Counts()) == result.total


@given(pairs)
def test_alignment_spells_both_sides(texts):
    result = score(*zip(*texts), normalize="none")
    for item in result.utterances:
        assert " ".join(word for _, word, _ in item.alignment if word) == texts[item.index][0]
        assert " ".join(guess for _, _, guess in item.alignment if guess) == texts[item.index][1]
        assert all((word == guess) == (operation == "equal") for operation, word, guess in item.alignment)


@given(pairs, st.randoms())
def test_order_of_utterances_does_not_matter(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert score(*zip(*texts), normalize="none").total == score(*zip(*shuffled), normalize="none").total


def test_counts_by_kind_and_language():
    result = score(
        ["the cat sat", "der hund bellt laut", "one two"],
        ["the bat sat down", "der hund laut", "one two"],
        ["en-US", "de", "en"],
        normalize="none",
    )
    assert (result.total.substitutions, result.total.deletions, result.total.insertions) == (1, 1, 1)
    assert result.wer == pytest.approx(3 / 9)
    assert {name: counts.errors for name, counts in result.languages.items()} == {"en": 2, "de": 1}
    assert [item.index for item in result.worst(5)] == [0, 1]


def test_characters_of_unspaced_scripts_are_counted_without_the_spaces_that_split_them():
    total = score(["今天天气很好", "the cat"], ["今天天气很坏", "thecat"], ["zh", "en"])
    assert [(item.counts.character_errors, item.counts.characters) for item in total.utterances] == [
        (1, 6),
        (1, 7),
    ]
    assert total.languages["zh"].cer == total.languages["zh"].wer == pytest.approx(1 / 6)


def test_languages_choose_their_normaliser():
    english, german = "Mr. Smith's colour won't fade", "Mr. Schmidt's colour won't fade!"
    assert normalizer("leaderboard", "en")(english) == "mister smith is color will not fade"
    assert normalizer("leaderboard", "de")(german) == "mr schmidt s colour won t fade "
    assert normalizer("basic", "en")(english) == "mr smith s colour won t fade"
    assert normalizer("none", "en")(english) == english
    assert score(["今日は"], ["今日も"], ["ja"]).wer == pytest.approx(1 / 3)
    assert score(["Twenty five, please."], ["25 please"]).wer == 0
    assert score(["Twenty five"], ["25"], normalize="none").wer == 1
    with pytest.raises(ValueError, match=r"'strict' is unknown; one of: leaderboard"):
        normalizer("strict")  # type: ignore[arg-type]


def test_initials_are_one_word_as_on_the_leaderboard():
    rule = normalizer("leaderboard", "en")
    assert " ".join(rule("The U.S. and the U.S.A. at 5 p.m.").split()) == "the us and the usa at 5 pm"
    assert " ".join(rule("Mr. A. Bc v.big 3.5").split()) == "mister a bc v big 3.5"
    result = score(["ignore_time_segment_in_scoring", "a"], ["b", "a"])
    assert (result.wer, result.empty_references) == (0.0, 1)


def test_empty_texts():
    result = score(["hmm", "yes"], ["so", ""])
    assert result.empty_references == 1
    assert (result.wer, result.total.deletions) == (1.0, 1)
    assert result.utterances[0].index == 1
    assert math.isinf(score([""], ["word"], normalize="none").wer)
    nothing = score(["hmm"], ["so"])
    assert (nothing.wer, nothing.utterances, wer_interval(nothing)) == (0.0, [], (0.0, 0.0))
    with pytest.raises(ValueError, match="1 references, 2 hypotheses"):
        score(["a"], ["a", "b"])


def test_interval_holds_the_rate_and_shrinks_with_data():
    few = score(["a b c d"] * 20, ["a b c d", "a b x d"] * 10, normalize="none")
    many = score(["a b c d"] * 500, ["a b c d", "a b x d"] * 250, normalize="none")
    for result in (few, many):
        low, high = wer_interval(result)
        assert low < result.wer < high
    assert wer_interval(few) == wer_interval(few)
    width = [high - low for low, high in (wer_interval(few), wer_interval(many))]
    assert width[0] > 3 * width[1]


def test_paired_difference_sees_what_single_intervals_cannot():
    references = ["a b c d"] * 60
    second = score(references, ["a b c d", "x x x x"] * 30, normalize="none")
    first = score(references, ["a b c d", "x x x d"] * 30, normalize="none")
    assert wer_interval(first)[1] > second.wer - 0.05  # apart, their intervals overlap
    difference = paired_difference(first, second)
    assert difference.wer == pytest.approx(-0.125)
    assert difference.low <= difference.wer <= difference.high < 0
    assert difference.p_improved == 1
    same = paired_difference(first, first)
    assert (same.low, same.high, same.p_improved) == (0, 0, 0)
    with pytest.raises(ValueError, match="same references"):
        paired_difference(first, score(["a b"], ["a b"], normalize="none"))


def test_rtfx():
    assert rtfx(3600, 36) == 100
    with pytest.raises(ValueError, match="wall_seconds is 0"):
        rtfx(1, 0)
