"""Compute micro-averaged word and character error rates and their confidence intervals.

WER = (substitutions + deletions + insertions) / reference words, summed over utterances before dividing, as
NIST's sclite and the Open ASR leaderboard do. CER is the same over characters (by jiwer), including spaces except in
languages written without them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from canter.evaluation.normalize import UNSCORED, UNSPACED, Normalization, language, normalizer
from canter.text.languages import is_said

Operation = Literal["equal", "substitute", "delete", "insert"]


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """Numbers of errors of some utterances; they can be added."""

    utterances: int = 0
    words: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    characters: int = 0
    character_errors: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Word errors / reference words. Without reference words it is infinite where words were inserted, else NaN."""
        return _ratio(self.errors, self.words)

    @property
    def cer(self) -> float:
        return _ratio(self.character_errors, self.characters)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class ScoredUtterance:
    """Errors and alignment of one utterance."""

    index: int
    """Position among the texts given."""
    counts: ErrorCounts
    alignment: tuple[tuple[Operation, str, str], ...]
    """(operation, reference word, hypothesis word) of normalised words; a missing word is empty."""


@dataclass(frozen=True, slots=True)
class Score:
    """Error rates of a set of utterances."""

    total: ErrorCounts
    languages: dict[str, ErrorCounts]
    """Errors by language code, the most frequent first; ``und`` are utterances without one."""
    utterances: list[ScoredUtterance]
    empty_references: int
    """Utterances whose reference has no words after normalisation."""
    left_out: int = 0
    """Utterances that are not scored: those with TED-LIUM's mark, and by the leaderboard's rules those with an empty
    reference."""
    words_left_out: int = 0
    """Words transcribed in them, which are not counted as insertions."""

    @property
    def wer(self) -> float:
        return self.total.wer

    @property
    def cer(self) -> float:
        return self.total.cer

    def worst(self, count: int) -> list[ScoredUtterance]:
        """Return the utterances with most word errors; ties are ordered by reference length, shortest first."""
        wrong = [item for item in self.utterances if item.counts.errors]
        return sorted(wrong, key=lambda item: (-item.counts.errors, item.counts.words, item.index))[:count]

    def errors_and_words(self) -> tuple[np.ndarray, np.ndarray]:
        """Return word errors and reference words of each utterance, two float64 arrays (N,)."""
        pairs = [(item.counts.errors, item.counts.words) for item in self.utterances]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]


def score_texts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    langs: Sequence[str | None] | None = None,
    *,
    normalize: Normalization = "standard",
) -> Score:
    """Score hypotheses against references, (N,) texts each; ``langs`` chooses normalisers and groups.

    Words transcribed where the reference is empty are insertions. With ``normalize="leaderboard"`` such utterances are
    left out and counted, as the leaderboard does; TED-LIUM's mark for what is not to be scored is left out by every
    rule but "none". Raises ValueError where the sequences differ in length.
    """
    import jiwer

    langs = [None] * len(references) if langs is None else langs
    if not len(references) == len(hypotheses) == len(langs):
        raise ValueError(
            f"{len(references)} references, {len(hypotheses)} hypotheses, {len(langs)} languages: "
            "they must be equally many"
        )
    prepare = [normalizer(normalize, lang) for lang in langs]
    left = [" ".join(clean(text).split()) for clean, text in zip(prepare, references)]
    right = [" ".join(clean(text).split()) for clean, text in zip(prepare, hypotheses)]
    unscored = {"leaderboard": ("", UNSCORED), "none": ()}.get(normalize, (UNSCORED,))
    kept = [row for row, text in enumerate(left) if text not in unscored]
    empty = left.count("")
    uncounted = sum(len(text.split()) for reference, text in zip(left, right) if reference in unscored)
    if not kept:
        return Score(ErrorCounts(), {}, [], empty, len(left), uncounted)

    left, right = [left[row] for row in kept], [right[row] for row in kept]
    by_word = jiwer.process_words(left, right)
    spaceless = [language(langs[row]) in UNSPACED for row in kept]
    by_character = jiwer.process_characters(
        [text.replace(" ", "") if unspaced else text for text, unspaced in zip(left, spaceless)],
        [text.replace(" ", "") if unspaced else text for text, unspaced in zip(right, spaceless)],
    )
    utterances, groups = [], {}
    for place, row in enumerate(kept):
        words, guesses = by_word.references[place], by_word.hypotheses[place]
        alignment = tuple(_pairs(by_word.alignments[place], words, guesses))
        operations = [operation for operation, _, _ in alignment]
        counts = ErrorCounts(
            utterances=1,
            words=len(words),
            substitutions=operations.count("substitute"),
            deletions=operations.count("delete"),
            insertions=operations.count("insert"),
            characters=len(by_character.references[place]),
            character_errors=sum(
                max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                for chunk in by_character.alignments[place]
                if chunk.type != "equal"
            ),
        )
        utterances.append(ScoredUtterance(row, counts, alignment))
        groups.setdefault(language(langs[row]) if is_said(langs[row]) else "und", []).append(counts)
    languages = {name: sum(group, ErrorCounts()) for name, group in groups.items()}
    languages = dict(sorted(languages.items(), key=lambda item: (-item[1].utterances, item[0])))
    total, left_out = sum(languages.values(), ErrorCounts()), len(references) - len(kept)
    return Score(total, languages, utterances, empty, left_out, uncounted)


def wer_interval(score: Score, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap confidence interval of the WER over utterances (Bisani & Ney, ICASSP 2004).

    It is (NaN, NaN) where the references have no words. Resamples without a reference word are left out.
    """
    errors, words = score.errors_and_words()
    return _quantiles(_resampled(errors, words, samples, seed), confidence)


@dataclass(frozen=True, slots=True)
class Difference:
    """WER of one system minus another's on the same utterances."""

    wer: float
    low: float
    high: float
    p_improved: float
    """Fraction of resamples in which the first system has the lower WER."""


def paired_difference(
    first: Score, second: Score, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> Difference:
    """Return the paired bootstrap of WER(first) − WER(second); each resample draws the same utterances for both.

    Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.
    Raises ValueError where the two do not score the same references.
    """
    rows_first = [(item.index, item.counts.words) for item in first.utterances]
    rows_second = [(item.index, item.counts.words) for item in second.utterances]
    if rows_first != rows_second:
        raise ValueError("the two results do not score the same references; score both on one manifest")
    if not first.total.words:
        return Difference(math.nan, math.nan, math.nan, math.nan)
    (errors, words), (other, _) = first.errors_and_words(), second.errors_and_words()
    resampled = _resampled(errors - other, words, samples, seed)
    low, high = _quantiles(resampled, confidence)
    return Difference(first.wer - second.wer, low, high, float((resampled < 0).mean()))


def rtfx(audio_seconds: float, wall_seconds: float) -> float:
    """Return the inverse real-time factor: seconds of audio transcribed per second of wall clock."""
    if wall_seconds <= 0:
        raise ValueError(f"wall_seconds is {wall_seconds}; RTFx needs a positive time")
    return audio_seconds / wall_seconds


def percent(rate: float, digits: int = 2) -> str:
    """Return an error rate as text; "n/a" where there are no reference words to divide by."""
    return f"{rate:.{digits}%}" if math.isfinite(rate) else "n/a"


def _ratio(errors: int, total: int) -> float:
    if total:
        return errors / total
    return math.inf if errors else math.nan


def _pairs(chunks, words: list[str], guesses: list[str]) -> Iterator[tuple[Operation, str, str]]:
    """Yield the words of jiwer's chunks."""
    for chunk in chunks:
        span = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for step in range(span):
            word = "" if chunk.type == "insert" else words[chunk.ref_start_idx + step]
            guess = "" if chunk.type == "delete" else guesses[chunk.hyp_start_idx + step]
            yield chunk.type, word, guess


def _resampled(errors: np.ndarray, words: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return the error rates (at most ``samples``,) of seeded resamples with replacement that have a reference word."""
    rng = np.random.default_rng(seed)
    rates: list[float] = []
    for _ in range(samples if words.any() else 0):
        drawn = np.bincount(rng.integers(len(errors), size=len(errors)), minlength=len(errors))
        if total := drawn @ words:
            rates.append(float(drawn @ errors / total))
    return np.array(rates)


def _quantiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
