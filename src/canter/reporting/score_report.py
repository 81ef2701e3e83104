"""A result's error rates and its worst utterances, word by word, as one page."""

from collections import Counter
from collections.abc import Sequence

from canter.evaluation.transcripts import ScoredTranscript
from canter.evaluation.translation import TranslationScore
from canter.evaluation.wer import ErrorCounts, Score, ScoredUtterance, percent
from canter.reporting import html
from canter.reporting.html import Html

FREQUENT = 20  # errors listed
NOTHING = "∅"


def score_page(
    name: str,
    result: Score,
    transcripts: Sequence[ScoredTranscript],
    worst: Sequence[ScoredUtterance],
    interval: tuple[float, float],
    translations: dict[str, TranslationScore],
) -> Html:
    """The whole document; ``transcripts`` are what was scored, ``worst`` those of it to show."""
    total = result.total
    left_out = f", {result.left_out:,} left out" if result.left_out else ""
    low, high = interval
    blocks = [
        html.cards(
            [
                (percent(total.wer), "WER", f"95 % interval {percent(low)} to {percent(high)}"),
                (percent(total.cer), "CER", "spaces included"),
                (f"{total.utterances:,}", "utterances", f"{total.words:,} words{left_out}"),
            ]
        ),
        html.section("Error rates", "", _rates(result)),
    ]
    if translations:
        header = ("language", "utterances", "BLEU", "chrF", "sacrebleu's signature of BLEU")
        rows = [
            (lang, f"{one.utterances:,}", f"{one.bleu:.2f}", f"{one.chrf:.2f}", one.bleu_signature)
            for lang, one in translations.items()
        ]
        blocks.append(html.section("Translation", "Texts as they are.", html.table(header, rows)))
    frequent = _frequent(result)
    if frequent:
        header = ("in the reference", "heard", "times")
        lead = f"The word errors that occur most often; {NOTHING}: no word."
        blocks.append(html.section("Frequent errors", lead, html.table(header, frequent, text_columns=2)))
    if worst:
        lead = f"The {len(worst)} utterances with most word errors, normalised: reference above, transcript below."
        shown = [_utterance(item, transcripts[item.index]) for item in worst]
        listed = html.element("div", *shown, class_="transcripts")
        blocks.append(html.section("Worst utterances", lead, html.error_key(), listed))
    return html.page(name, "Word and character error rates.", *blocks, eyebrow="canter score")


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
    """Reference word, what was heard instead, how often."""
    errors = Counter(
        (word or NOTHING, guess or NOTHING)
        for item in result.utterances
        for operation, word, guess in item.alignment
        if operation != "equal"
    )
    return [(word, guess, f"{count:,}") for (word, guess), count in errors.most_common(FREQUENT)]


def _utterance(item: ScoredUtterance, transcript: ScoredTranscript) -> Html:
    reference = " ".join(word for _, word, _ in item.alignment if word)
    label = f"{transcript.name}, line {transcript.line}"
    return html.transcript(label, f"WER {percent(item.counts.wer, 0)}", reference, html.aligned(item.alignment))
