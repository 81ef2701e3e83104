"""Make the page of a scored result: error rates, frequent errors, and the worst utterances word by word."""

from collections import Counter
from collections.abc import Mapping, Sequence

from canter.evaluation.transcripts import ScoredTranscript
from canter.evaluation.translation import TranslationScore
from canter.evaluation.wer import ErrorCounts, Score, ScoredUtterance, percent
from canter.reporting import html
from canter.reporting.html import Html

FREQUENT = 20  # errors listed
NO_WORD = "∅"


def score_page(
    name: str,
    result: Score,
    transcripts: Sequence[ScoredTranscript],
    worst: Sequence[ScoredUtterance],
    interval: tuple[float, float],
    translations: Mapping[str, TranslationScore],
) -> Html:
    """Return the complete page; ``worst`` are the utterances to show, ``transcripts`` all that were scored."""
    total = result.total
    left_out = f", {result.left_out:,} left out" if result.left_out else ""
    low, high = interval
    translated = [
        (lang, f"{one.utterances:,}", f"{one.bleu:.2f}", f"{one.chrf:.2f}", one.bleu_signature)
        for lang, one in translations.items()
    ]
    bleu_header = ("language", "utterances", "BLEU", "chrF", "sacrebleu's signature of BLEU")
    frequent = _frequent(result)
    shown = [
        html.scored(f"{transcripts[item.index].name}, line {transcripts[item.index].line}", item) for item in worst
    ]
    return html.page(
        name,
        "Word and character error rates.",
        html.cards(
            [
                (percent(total.wer), "WER", f"95 % interval {percent(low)} to {percent(high)}"),
                (percent(total.cer), "CER", "spaces included"),
                (f"{total.utterances:,}", "utterances", f"{total.words:,} words{left_out}"),
            ]
        ),
        html.section("Error rates", "", _rates(result)),
        html.section(
            "Translation",
            "Texts are compared without normalisation.",
            html.table(bleu_header, translated) if translated else Html(),
        ),
        html.section(
            "Frequent errors",
            f"The most frequent word errors; {NO_WORD}: no word.",
            html.table(("reference", "transcript", "times"), frequent, text_columns=2) if frequent else Html(),
        ),
        html.section(
            "Worst utterances",
            f"The {len(worst)} utterances with most word errors, normalised: reference above, transcript below.",
            *((html.error_key(), html.transcripts(*shown)) if shown else (Html(),)),
        ),
        eyebrow="canter score",
    )


def _rates(result: Score) -> Html:
    header = ("language", "utterances", "words", "WER", "CER", "substituted", "deleted", "inserted")
    rows = [*result.languages.items()] if len(result.languages) > 1 else []
    rows.append(("all", result.total))
    return html.table(header, [_rate(name, counts) for name, counts in rows], best=len(rows) - 1)


def _rate(name: str, counts: ErrorCounts) -> tuple[str, ...]:
    numbers = (counts.substitutions, counts.deletions, counts.insertions)
    sizes = (f"{counts.utterances:,}", f"{counts.words:,}", percent(counts.wer), percent(counts.cer))
    return name, *sizes, *(f"{number:,}" for number in numbers)


def _frequent(result: Score) -> list[tuple[str, str, str]]:
    """Return (reference word, transcribed word, count) of the most frequent errors."""
    errors = Counter(
        (word or NO_WORD, guess or NO_WORD)
        for item in result.utterances
        for operation, word, guess in item.alignment
        if operation != "equal"
    )
    return [(word, guess, f"{count:,}") for (word, guess), count in errors.most_common(FREQUENT)]
