"""Compute WER, CER, BLEU and chrF of a manifest with `text` and `pred_text`, as `canter transcribe` writes it."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import tyro

from canter.corpus.manifest import Problem
from canter.errors import ConfigError, ManifestError
from canter.evaluation.confidence import Calibration, calibration, word_outcomes
from canter.evaluation.hub_results import Benchmark, write_result
from canter.evaluation.normalize import Normalization
from canter.evaluation.transcripts import ScoredTranscript, read_transcripts
from canter.evaluation.translation import TranslationScore, score_translations
from canter.evaluation.wer import (
    Difference,
    ErrorCounts,
    Score,
    ScoredUtterance,
    paired_difference,
    percent,
    score_texts,
    wer_interval,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class Options:
    result: tyro.conf.Positional[str]
    """Manifest with `text` and `pred_text` in every row (.jsonl, or .jsonl.gz), or its URL."""
    against: str | None = None
    """Second result on the same manifest: also prints the WER difference with its bootstrap interval."""
    normalize: Normalization = "standard"
    """Normalisation before scoring. `standard`: no case or punctuation, Whisper's rules for English. `leaderboard`: as
    the Open ASR leaderboard, which ignores combining marks (the vowels of Hindi, Thai, Tamil ...) and utterances with
    an empty reference. `basic`: Whisper's basic rules for every language. `none`: no normalisation."""
    worst: int = 5
    """Number of the worst utterances to show, aligned word by word."""
    bleu: bool = False
    """Also compute BLEU and chrF of translations with sacrebleu, without normalisation, by target language."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """HTML page to write, with the figures, the most frequent errors and the worst utterances."""
    eval_results: Path | None = None
    """Model folder in which to write the WER as the Hugging Face hub reads it, in .eval_results/; needs --dataset."""
    dataset: str | None = None
    """Benchmark that was transcribed, as DATASET:TASK of the hub, such as hf-audio/open-asr-leaderboard:ami."""
    skip_bad: bool = False
    """Score the other rows where some lack a field, instead of stopping."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


@dataclass(frozen=True)
class Result:
    """A scored manifest."""

    transcripts: list[ScoredTranscript]
    problems: list[Problem]
    """Rows that were left out by --skip-bad."""
    score: Score
    worst: list[ScoredUtterance]
    interval: tuple[float, float]
    """95 % interval of the WER."""
    difference: Difference | None
    """WER minus that of --against."""
    translations: dict[str, TranslationScore]
    confidence: Calibration | None
    """Quality of the confidence of words; None for transcripts without it."""


def run(options: Options) -> None:
    if options.worst < 0:
        raise ConfigError(f"--worst is {options.worst}; it must be 0 or more")
    benchmark = _benchmark(options)
    transcripts, problems = _read(options.result, options.skip_bad)
    score = _score(transcripts, options.normalize)
    interval = wer_interval(score)
    difference = None
    if options.against:
        others, _ = _read(options.against, options.skip_bad)
        if [(row.name, row.text) for row in transcripts] != [(row.name, row.text) for row in others]:
            raise ManifestError(
                f"{options.result} and {options.against} do not hold the same utterances in the same order; "
                "transcribe one manifest with both models"
            )
        difference = paired_difference(score, _score(others, options.normalize))
    translations = score_translations(*_columns(transcripts)) if options.bleu else {}
    worst = score.worst(options.worst)
    confidence = calibration(word_outcomes(transcripts, score.utterances, options.normalize))
    result = Result(transcripts, problems, score, worst, interval, difference, translations, confidence)
    if benchmark and options.eval_results:
        entry = benchmark.result(score, options.normalize, datetime.now(UTC).date())
        print(f"written: {write_result(options.eval_results, entry)}", file=sys.stderr)
    if options.output:
        from canter.reporting.html import write_page
        from canter.reporting.score_report import score_page

        name = PurePath(options.result).name
        write_page(score_page(name, score, transcripts, worst, interval, translations), options.output)
        print(f"written: {options.output}", file=sys.stderr)
    if options.json:
        from canter.inference.transcript.formats import json_text

        print(json_text(_summary(result, options.normalize), indent=2))
    else:
        print_score(result, options.against)


def _benchmark(options: Options) -> Benchmark | None:
    """Return the benchmark of --dataset. Raises ConfigError without one of the two options, or for another form."""
    if (options.eval_results is None) != (options.dataset is None):
        raise ConfigError("--eval-results FOLDER and --dataset DATASET:TASK go together; give both or none")
    if options.eval_results is not None and not options.eval_results.is_dir():
        raise ConfigError(f"--eval-results {options.eval_results} is not a folder; name the model's")
    return Benchmark.of(options.dataset) if options.dataset else None


def _read(path: str, skip_bad: bool) -> tuple[list[ScoredTranscript], list[Problem]]:
    """Read a result. Raises ManifestError for rows without both texts, unless they may be skipped."""
    transcripts, problems = read_transcripts(path)
    if problems and not (skip_bad and transcripts):
        more = f", and {len(problems) - 1} more such rows" if len(problems) > 1 else ""
        remedy = "score the others with --skip-bad" if transcripts else "canter transcribe writes such rows"
        raise ManifestError(f"{problems[0]}{more}; a result needs text and pred_text in every row; {remedy}")
    if not transcripts:
        raise ManifestError(f"{path} holds no rows")
    return transcripts, problems


def _columns(transcripts: list[ScoredTranscript]) -> tuple[list[str], list[str], list[str | None]]:
    return (
        [row.text for row in transcripts],
        [row.pred_text for row in transcripts],
        [row.lang for row in transcripts],
    )


def _score(transcripts: list[ScoredTranscript], normalize: Normalization) -> Score:
    return score_texts(*_columns(transcripts), normalize=normalize)


def _rates(counts: ErrorCounts) -> dict[str, float]:
    return {"wer": counts.wer, "cer": counts.cer, **asdict(counts)}


def _summary(result: Result, normalize: Normalization) -> dict[str, object]:
    """Return a result as JSON has it."""
    score = result.score
    summary: dict[str, object] = {
        **_rates(score.total),
        "wer_interval": result.interval,
        "languages": {name: _rates(counts) for name, counts in score.languages.items()},
        "normalize": normalize,
        "empty_references": score.empty_references,
        "left_out": score.left_out,
        "words_left_out": score.words_left_out,
        "skipped": [str(problem) for problem in result.problems],
        "worst": [
            {
                "utterance": row.name,
                "line": row.line,
                "wer": item.counts.wer,
                "text": row.text,
                "pred_text": row.pred_text,
            }
            for item, row in ((item, result.transcripts[item.index]) for item in result.worst)
        ],
    }
    if result.difference:
        summary["difference"] = asdict(result.difference)
    if result.confidence:
        summary["confidence"] = asdict(result.confidence)
    if result.translations:
        summary["translation"] = {name: asdict(one) for name, one in result.translations.items()}
    return summary


def print_score(result: Result, against: str | None) -> None:
    """Print error rates, their interval, the worst utterances, and the number of utterances left out."""
    from rich.console import Console

    console, score = Console(highlight=False), result.score
    console.print(_table(score))
    for lang, one in result.translations.items():
        console.print(f"into {lang}: BLEU {one.bleu:.2f}, chrF {one.chrf:.2f}  ({one.bleu_signature})")
    low, high = result.interval
    if score.total.words:
        console.print(f"95 % interval of the WER: {low:.2%} to {high:.2%} (bootstrap over utterances)\n")
    else:
        console.print("The references have no words, so there is no error rate; words transcribed are insertions.\n")
    if (difference := result.difference) and score.total.words:
        console.print(
            f"WER against {against}: {difference.wer:+.2%}, 95 % interval {difference.low:+.2%} to "
            f"{difference.high:+.2%}, better in {difference.p_improved:.1%} of resamples (paired bootstrap)"
        )
    if one := result.confidence:
        console.print(
            f"confidence of {one.words:,} words: {one.right:.1%} are right, mean confidence {one.mean:.1%}, "
            f"calibration error {one.error:.1%} ({one.fitted_error:.1%} after a logistic fit on other utterances: "
            f"slope {one.slope:.2f}, offset {one.offset:+.2f}), AUC {one.auc:.3f}, normalised cross-entropy "
            f"{one.cross_entropy:.3f}\n"
        )
    for item in result.worst:
        console.print(_alignment(item, result.transcripts[item.index], console.width))
    if inserted := sum(item.counts.insertions for item in score.utterances if not item.counts.words):
        console.print(f"{inserted} of the insertions are in utterances whose reference is empty")
    if score.left_out:
        console.print(
            f"{score.left_out} utterances left out: their references are empty after normalisation; "
            f"{score.words_left_out} words transcribed there are not counted"
        )
    if problems := result.problems:
        print(f"skipped {len(problems)} rows:", *problems[:10], sep="\n  ", file=sys.stderr)


def _table(result: Score) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("language")
    for name in ("utterances", "words", "WER", "CER", "sub", "del", "ins"):
        table.add_column(name, justify="right")
    rows = [("all", result.total)]
    if len(result.languages) > 1:
        rows = [*result.languages.items(), *rows]
    elif result.languages:
        rows = [(next(iter(result.languages)).replace("und", "all"), result.total)]
    for name, counts in rows:
        table.add_row(
            name,
            f"{counts.utterances:,}",
            f"{counts.words:,}",
            percent(counts.wer),
            percent(counts.cer),
            *(f"{number:,}" for number in (counts.substitutions, counts.deletions, counts.insertions)),
            style="bold" if counts is result.total else None,
        )
    return table


def _alignment(item: ScoredUtterance, transcript: ScoredTranscript, width: int) -> Text:
    """Return reference above hypothesis, word under word, errors coloured, wrapped at ``width`` columns."""
    from rich.text import Text

    styles = {"equal": "", "substitute": "yellow", "delete": "red", "insert": "cyan"}
    counts = item.counts
    text = Text()
    text.append(f"{transcript.name}", style="bold")
    text.append(f", line {transcript.line}\n  WER {percent(counts.wer, 0)}: {counts.substitutions} sub, ")
    text.append(f"{counts.deletions} del, {counts.insertions} ins\n")
    lines = (Text("  ref  "), Text("  hyp  "))
    for operation, word, guess in item.alignment:
        columns = max(len(word), len(guess))
        if len(lines[0]) + columns + 1 > width and len(lines[0]) > 7:
            text.append_text(lines[0]).append("\n").append_text(lines[1]).append("\n")
            lines = (Text("       "), Text("       "))
        for line, side in zip(lines, (word, guess)):
            line.append((side or "*" * columns).ljust(columns) + " ", style=styles[operation])
    return text.append_text(lines[0]).append("\n").append_text(lines[1]).append("\n")
