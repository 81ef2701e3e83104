"""BLEU and chrF: grouped by language, tokenised as its language needs, quoted with their signatures."""

import importlib.util
import sys

import pytest

from canter.errors import ConfigError
from canter.evaluation.translation import score_translations

needs_sacrebleu = pytest.mark.skipif(
    not importlib.util.find_spec("sacrebleu"), reason="the extra bleu is not installed"
)


@needs_sacrebleu
def test_languages_are_scored_apart():
    found = score_translations(
        ["the cat sat on the mat", "猫坐在垫子上", "a dog ran over the hill"],
        ["the cat sat on the mat", "猫坐在上面", "a dog ran over a hill"],
        ["en-US", "zh", "en"],
    )
    assert list(found) == ["en", "zh"]
    assert found["en"].utterances == 2
    assert 50 < found["en"].bleu < 100
    assert 0 < found["zh"].chrf < 100
    assert "tok:13a" in found["en"].bleu_signature
    assert "tok:zh" in found["zh"].bleu_signature


@needs_sacrebleu
def test_case_counts_and_the_right_text_is_100():
    texts = ["Ein Satz, der lang genug ist."]
    (right,) = score_translations(texts, texts, [None]).values()
    assert (right.bleu, right.chrf) == (pytest.approx(100), pytest.approx(100))
    (lower,) = score_translations(texts, [texts[0].lower()], [None]).values()
    assert lower.bleu < 70


def test_without_sacrebleu_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"pip install 'canter\[bleu\]'"):
        score_translations(["a"], ["a"], ["en"])


@needs_sacrebleu
def test_lengths_must_agree():
    with pytest.raises(ValueError, match="1 references, 2 hypotheses"):
        score_translations(["a"], ["a", "b"], ["en"])
