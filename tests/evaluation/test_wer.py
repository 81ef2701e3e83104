"""Error rates: against hand-counted cases, a plain dynamic programme, and the rules of the leaderboard."""

import math
import re
import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from canter.evaluation.normalize import normalizer
from canter.evaluation.wer import ErrorCounts, paired_difference, rtfx, score_texts, wer_interval

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
    result = score_texts(references, hypotheses, normalize="none")
    errors = sum(edit_distance(a.split(), b.split()) for a, b in texts)
    total = sum(len(a.split()) for a, _ in texts)
    assert result.total.errors == errors
    undefined = math.inf if errors else math.nan
    assert result.wer == pytest.approx(errors / total if total else undefined, nan_ok=True)
    assert result.total.character_errors == sum(edit_distance(list(a), list(b)) for a, b in texts)
    assert result.total.words == total
    assert sum((item.counts for item in result.utterances), ErrorCounts()) == result.total


@given(pairs)
def test_alignment_spells_both_sides(texts):
    result = score_texts(*zip(*texts), normalize="none")
    for item in result.utterances:
        assert " ".join(word for _, word, _ in item.alignment if word) == texts[item.index][0]
        assert " ".join(guess for _, _, guess in item.alignment if guess) == texts[item.index][1]
        assert all((word == guess) == (operation == "equal") for operation, word, guess in item.alignment)


@given(pairs, st.randoms())
def test_order_of_utterances_does_not_matter(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert score_texts(*zip(*texts), normalize="none").total == score_texts(*zip(*shuffled), normalize="none").total


def test_counts_by_kind_and_language():
    result = score_texts(
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
    total = score_texts(["今天天气很好", "the cat"], ["今天天气很坏", "thecat"], ["zh", "en"])
    assert [(item.counts.character_errors, item.counts.characters) for item in total.utterances] == [(1, 6), (1, 7)]
    assert total.languages["zh"].cer == total.languages["zh"].wer == pytest.approx(1 / 6)


def test_languages_choose_their_normaliser():
    english, german = "Mr. Smith's colour won't fade", "Mr. Schmidt's colour won't fade!"
    assert normalizer("leaderboard", "en")(english) == "mister smith is color will not fade"
    assert normalizer("leaderboard", "de")(german) == "mr schmidt s colour won t fade "
    assert normalizer("basic", "en")(english) == "mr smith s colour won t fade"
    assert normalizer("none", "en")(english) == english
    assert score_texts(["今日は"], ["今日も"], ["ja"]).wer == pytest.approx(1 / 3)
    assert score_texts(["Twenty five, please."], ["25 please"]).wer == 0
    assert score_texts(["Twenty five"], ["25"], normalize="none").wer == 1
    with pytest.raises(ValueError, match=r"'strict' is unknown; one of: standard, leaderboard"):
        normalizer("strict")  # type: ignore[arg-type]


def test_initials_are_one_word_as_on_the_leaderboard():
    rule = normalizer("leaderboard", "en")
    assert " ".join(rule("The U.S. and the U.S.A. at 5 p.m.").split()) == "the us and the usa at 5 pm"
    assert " ".join(rule("Mr. A. Bc v.big 3.5").split()) == "mister a bc v big 3.5"
    for normalize in ("standard", "leaderboard"):
        result = score_texts(["ignore_time_segment_in_scoring", "a"], ["b", "a"], normalize=normalize)
        assert (result.wer, result.left_out, result.words_left_out) == (0.0, 1, 1)


def test_empty_texts():
    result = score_texts(["hmm", "yes"], ["so", ""], normalize="leaderboard")
    assert (result.empty_references, result.left_out, result.words_left_out) == (1, 1, 1)
    assert (result.wer, result.total.deletions) == (1.0, 1)
    assert result.utterances[0].index == 1
    assert math.isinf(score_texts([""], ["word"], normalize="none").wer)
    for normalize, insertions, left_out in (("standard", 1, 0), ("leaderboard", 0, 1)):
        nothing = score_texts(["hmm"], ["so"], normalize=normalize)
        assert not math.isfinite(nothing.wer)
        assert (nothing.total.insertions, nothing.left_out) == (insertions, left_out)
        assert all(map(math.isnan, wer_interval(nothing)))
        assert math.isnan(paired_difference(nothing, nothing).wer)
    assert math.isnan(score_texts(["hmm"], [""]).wer)  # nothing said, nothing written: no rate, no error


def test_words_where_nothing_was_said_are_insertions():
    result = score_texts(["", "we go by car"], ["thanks everyone", "we go by car"])
    assert (result.wer, result.total.insertions, result.empty_references) == (0.5, 2, 1)
    low, high = wer_interval(result)
    assert (low, high) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("text", "pred_text", "lang", "wer"),
    [
        (
            "मेरी बहन बाज़ार से ताज़ी सब्ज़ियाँ लाती है", "मेरा बहन बाज़ीर से ताज़े सब्ज़ियो लाता हो", "hi", 0.75,
        ),
        ("ฉันดื่มน้ำที่บ้าน", "ฉนดมนาทบาน", "th", 1.0),
        ("நான் வீட்டில் இருக்கிறேன்", "நன வட்டல் இருக்கறன்", "ta", 1.0),
        ("مُحَمَّدٌ كَتَبَ", "محمد كتب", "ar", 1.0),
        ("I don’t think it’s late", "I don't think it's late", "en", 0.0),
        ("“Well–known”\u00a0… it’s fine", '"well-known" ... it\'s\u202ffine', "en", 0.0),
        ("l’été n’est pas « fini »", "L'été n'est pas \"fini\"", "fr", 0.0),
        ("п’ять пʼять", "п'ять п'ять", "uk", 0.0),
        ("İSTANBUL ILIK", "istanbul ılık", "tr", 0.0),
        ("می\u200cخواهم", "میخواهم", "fa", 0.0),
        ("コーヒーが好き", "ｺｰﾋｰが好き", "ja", 0.0),
        ("がぎ", "かき", "ja", 1.0),
        ("मेरी बहन", "मेरा बहन", None, 0.5),  # the language is not named
        ("ещё й", "еще и", None, 1.0),
        ("café naïve", "cafe naive", "en", 0.0),
        ("tôi là người Việt", "toi la nguoi Viet", None, 1.0),
        ("Ọlọ́run dára", "Olorun dara", None, 1.0),
        ("Ọlọ́run dára", "Olorun dara", "yo", 1.0),
        ("don’t", "do not", None, 0.0),
        ("the café मेरी won't", "The cafe मेरा will not", "en", 0.2),
    ],
)  # fmt: skip
def test_letters_and_vowel_signs_count_and_typography_does_not(text, pred_text, lang, wer):
    result = score_texts([text], [pred_text], [lang])
    assert result.wer == pytest.approx(wer)
    assert (result.cer > 0) == (wer > 0)


@pytest.mark.parametrize("lang", ["hi", "ta", "th", "en", None, "ja", "ar", "my"])
@given(
    base=st.sampled_from("कखதநกดबমကខალمשあ"),
    mark=st.sampled_from([chr(c) for c in range(0x370, 0x11000) if unicodedata.category(chr(c))[0] == "M"]),
    before=st.sampled_from(["", "word ", "कि "]),
)
def test_a_combining_mark_more_is_an_error(lang, base, mark, before):
    """Combining marks count in every script except Latin; a variation selector is not a letter."""
    assume("VARIATION SELECTOR" not in unicodedata.name(mark, "VARIATION SELECTOR"))
    with_mark, without = before + base + mark, before + base
    for reference, hypothesis in ((with_mark, without), (without, with_mark)):
        result = score_texts([reference], [hypothesis], [lang])
        assert result.wer > 0
        assert result.cer > 0


@pytest.mark.parametrize("normalize", ["standard", "leaderboard"])
@pytest.mark.parametrize("lang", ["vi", "hi", "ko", "en", None])
@given(text=st.text(st.characters(min_codepoint=0x20, max_codepoint=0xD7FF, exclude_categories=["Cn"])))
@example(text="A.À")
def test_composed_and_decomposed_texts_are_equal(normalize, lang, text):
    rule = normalizer(normalize, lang)
    composed = unicodedata.normalize("NFC", text)
    assert rule(composed).split() == rule(unicodedata.normalize("NFD", composed)).split()


@given(st.text(), st.sampled_from(["en", "hi", "ja", "tr", None]))
def test_any_text_can_be_normalised(text, lang):
    rule = normalizer("standard", lang)
    once = rule(text)
    assert not re.search("[\U000f0000-\U0010ffff]", once) or re.search("[\U000f0000-\U0010ffff]", text)
    with pytest.raises(ValueError, match="1 references, 2 hypotheses"):
        score_texts(["a"], ["a", "b"])


def test_interval_holds_the_rate_and_shrinks_with_data():
    few = score_texts(["a b c d"] * 20, ["a b c d", "a b x d"] * 10, normalize="none")
    many = score_texts(["a b c d"] * 500, ["a b c d", "a b x d"] * 250, normalize="none")
    for result in (few, many):
        low, high = wer_interval(result)
        assert low < result.wer < high
    assert wer_interval(few) == wer_interval(few)
    width = [high - low for low, high in (wer_interval(few), wer_interval(many))]
    assert width[0] > 3 * width[1]


def test_paired_difference_sees_what_single_intervals_cannot():
    references = ["a b c d"] * 60
    second = score_texts(references, ["a b c d", "x x x x"] * 30, normalize="none")
    first = score_texts(references, ["a b c d", "x x x d"] * 30, normalize="none")
    assert wer_interval(first)[1] > second.wer - 0.05  # apart, their intervals overlap
    difference = paired_difference(first, second)
    assert difference.wer == pytest.approx(-0.125)
    assert difference.low <= difference.wer <= difference.high < 0
    assert difference.p_improved == 1
    same = paired_difference(first, first)
    assert (same.low, same.high, same.p_improved) == (0, 0, 0)
    with pytest.raises(ValueError, match="same references"):
        paired_difference(first, score_texts(["a b"], ["a b"], normalize="none"))


def test_rtfx():
    assert rtfx(3600, 36) == 100
    with pytest.raises(ValueError, match="wall_seconds is 0"):
        rtfx(1, 0)
