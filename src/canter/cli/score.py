"""WER and CER, BLEU and chrF of a result manifest: `text` and `pred_text`, as `canter transcribe` writes."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

import tyro

from canter.corpus.manifest import Problem
from canter.errors import ConfigError, ManifestError
from canter.evaluation.normalize import Normalization
from canter.evaluation.transcripts import ScoredTranscript, read_transcripts
from canter.evaluation.translation import TranslationScore, score_translations
from canter.evaluation.wer import (
    ErrorCounts,
    Score,
    ScoredUtterance,
    paired_difference,
    percent,
    score_texts,
    wer_interval,
)


@dataclass(frozen=True)
class Options:
    result: tyro.conf.Positional[str]
    """Manifest with `text` and `pred_text` in every row (.jsonl, or .jsonl.gz), or its URL."""
    against: str | None = None
    """A second result on the same manifest: prints the WER difference too, with its bootstrap interval."""
    normalize: Normalization = "standard"
    """Normalisation before scoring. `standard`: no case or punctuation, Whisper's rules for English. `leaderboard`: as
    the Open ASR leaderboard, which ignores combining marks (the vowels of Hindi, Thai, Tamil ...) and utterances with
    an empty reference. `basic`: Whisper's basic rules for every language. `none`: texts as they are."""
    worst: int = 5
    """How many of the worst utterances to show, aligned word by word."""
    bleu: bool = False
    """Also BLEU and chrF by sacrebleu, for translations: of the texts as they are, by target language."""
    html: Path | None = None
    """Write a page with the figures, the most frequent errors and the worst utterances."""
    skip_bad: bool = False
    """Score the other rows where some lack a field, instead of stopping."""
    json: bool = False
    """Print one JSON object on stdout instead of tables."""


def run(options: Options) -> None:
    if options.worst < 0:
        raise ConfigError(f"--worst is {options.worst}; it must be 0 or more")
    transcripts, problems = load(options.result, options.skip_bad)
    result = scored(transcripts, options)
    interval = wer_interval(result)
    difference = None
    if options.against:
        others, _ = load(options.against, options.skip_bad)
        if [(row.name, row.text) for row in transcripts] != [(row.name, row.text) for row in others]:
            raise ManifestError(
                f"{options.result} and {options.against} do not hold the same utterances in the same order; "
                "transcribe one manifest with both models"
            )
        difference = paired_difference(result, scored(others, options))

    translations: dict[str, TranslationScore] = {}
    if options.bleu:
        translations = score_translations(
            [row.text for row in transcripts],
            [row.pred_text for row in transcripts],
            [row.lang for row in transcripts],
        )
    worst = result.worst(options.worst)
    if options.html:
        from canter.reporting.html import write_page
        from canter.reporting.score_report import score_page

        write_page(
            score_page(PurePath(options.result).name, result, transcripts, worst, interval, translations),
            options.html,
        )
        print(f"written: {options.html}", file=sys.stderr)
    if options.json:
        summary = {
            **summarize(result.total),
            "wer_interval": interval,
            "languages": {name: summarize(counts) for name, counts in result.languages.items()},
            "normalize": options.normalize,
            "empty_references": result.empty_references,
            "left_out": result.left_out,
            "words_left_out": result.words_left_out,
            "skipped": [str(problem) for problem in problems],
            "worst": [
                {
                    "utterance": transcripts[item.index].name,
                    "line": transcripts[item.index].line,
                    "wer": item.counts.wer,
                    "text": transcripts[item.index].text,
                    "pred_text": transcripts[item.index].pred_text,
                }
                for item in worst
            ],
        }
        if difference:
            summary["difference"] = asdict(difference)
        if translations:
            summary["translation"] = {name: asdict(one) for name, one in translations.items()}
        from canter.inference.transcript.formats import json_text

        print(json_text(summary, indent=2))
        return

    from rich.console import Console

    console = Console(highlight=False)
    console.print(table(result))
    low, high = interval
    for lang, one in translations.items():
        console.print(f"into {lang}: BLEU {one.bleu:.2f}, chrF {one.chrf:.2f}  ({one.bleu_signature})")
    if result.total.words:
        console.print(f"95 % interval of the WER: {low:.2%} to {high:.2%} (bootstrap over utterances)\n")
    else:
        console.print("The references have no words, so there is no error rate; words transcribed are insertions.\n")
    if difference and result.total.words:
        console.print(
            f"WER against {options.against}: {difference.wer:+.2%}, 95 % interval {difference.low:+.2%} to "
            f"{difference.high:+.2%}, better in {difference.p_improved:.1%} of resamples (paired bootstrap)"
        )
    for item in worst:
        console.print(aligned(item, transcripts[item.index], console.width))
    if inserted := sum(item.counts.insertions for item in result.utterances if not item.counts.words):
        console.print(f"{inserted} of the insertions are in utterances whose reference is empty")
    if result.left_out:
        console.print(
            f"{result.left_out} utterances left out: their references normalise to nothing to score; "
            f"{result.words_left_out} words transcribed there are not counted"
        )
    if problems:
        print(f"skipped {len(problems)} rows:", *problems[:10], sep="\n  ", file=sys.stderr)


def load(path: str, skip_bad: bool) -> tuple[list[ScoredTranscript], list[Problem]]:
    """The transcripts of a result; `ManifestError` for rows without them, unless those may be skipped."""
    transcripts, problems = read_transcripts(path)
    if problems and not (skip_bad and transcripts):
        more = f", and {len(problems) - 1} more such rows" if len(problems) > 1 else ""
        way_out = "score the others with --skip-bad" if transcripts else "canter transcribe writes such rows"
        raise ManifestError(f"{problems[0]}{more}; a result needs text and pred_text in every row; {way_out}")
    if not transcripts:
        raise ManifestError(f"{path} holds no rows")
    return transcripts, problems


def scored(transcripts: list[ScoredTranscript], options: Options) -> Score:
    return score_texts(
        [row.text for row in transcripts],
        [row.pred_text for row in transcripts],
        [row.lang for row in transcripts],
        normalize=options.normalize,
    )


def summarize(counts: ErrorCounts) -> dict[str, float]:
    return {"wer": counts.wer, "cer": counts.cer, **asdict(counts)}


def table(result: Score):
    """One line a language and one for all, as a rich table."""
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


def aligned(item: ScoredUtterance, transcript: ScoredTranscript, width: int):
    """Reference over hypothesis, word under word, errors coloured, wrapped at the terminal's width."""
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
