"""Align given texts with their audio: times and probabilities of words, for subtitles and for cleaning data."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from canter.errors import AudioError, ConfigError

if TYPE_CHECKING:
    from canter.inference.align import Aligner
    from canter.inference.inputs import Item
    from canter.inference.recording import Transcription

MOST_TEXT_BYTES = 64 << 20
IMPROBABLE = 0.01  # probability of a word below which it is counted
UNSAID = -2.5  # mean log probability of a token of a segment that is probably not said
SHOWN = 20  # failures that are printed
SHOWN_TEXT = 60  # characters of a text that are printed
_FILE_NAME = re.compile(r"\S*(/\S*|\.(txt|text|md|srt|vtt|json|jsonl|tsv|csv|docx?|pdf))")


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run folder (its best checkpoint), a model folder, a .nemo file, or a Hugging Face hub name such as
    openai/whisper-tiny.en."""
    audio: tyro.conf.Positional[str]
    """An audio or video file of any length, `-` for one on standard input, or a manifest whose rows have their own
    texts."""
    text: tyro.conf.Positional[str | None] = None
    """What is said: a text file in UTF-8, or the text itself in quotes. Each line is a segment of the output. Leave it
    out for a manifest."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Output file: .srt, .vtt, .json, .tsv, .txt as `canter transcribe` writes them, or .jsonl, a manifest with the
    times and probabilities of words (default: print a line for each word; the rows of a manifest)."""
    language: str | None = None
    """Language spoken in recordings that name none, as a code or in English (default: detected by a multilingual
    Whisper or OWSM)."""
    method: Literal["auto", "ctc", "attention"] = "auto"
    """Source of the times: the model's CTC head or its cross-attention (default: auto, CTC where the model has a
    head)."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` uses a GPU if there is one."""


def run(options: Options) -> int:
    from canter.inference.align import Aligner, check_text
    from canter.inference.inputs import read_items
    from canter.inference.languages import Defaults
    from canter.inference.loading import load_engine
    from canter.models.hub import checkpoint_of

    text = None if options.text is None else given_text(options.text)
    kind = output_format(options, several=text is None)
    if text is not None:
        check_text(text)
    checkpoint = checkpoint_of(options.model)
    engine = load_engine(checkpoint, device=options.device)
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None
    aligner = Aligner(engine, tokenizer, options.method, name=str(checkpoint))
    report_inexact_times(aligner, checkpoint)
    items = with_text(read_items([options.audio], defaults=Defaults.of(tokenizer, options.language)), options, text)
    results = align_items(aligner, items)
    if text is not None and results[0].error is not None:
        raise AudioError(results[0].error)
    write(options, items, results, kind)
    report(items, results)
    return 1 if any(result.error is not None for result in results) else 0


def given_text(argument: str) -> str:
    """Return the text of a file, or the argument itself. Raises ConfigError for a file that is missing or no text."""
    try:
        is_file = Path(argument).is_file()
    except (OSError, ValueError):  # a text may be longer than a name
        is_file = False
    if not is_file:
        if _FILE_NAME.fullmatch(argument):
            raise ConfigError(f"{argument} does not exist; give a text file, or the text itself in quotes")
        return argument
    from canter.untrusted import read_limited

    try:
        return read_limited(Path(argument), MOST_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{argument} is not text in UTF-8: byte {error.start + 1} is 0x{byte:02x}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{argument} cannot be read: {error}") from None


def output_format(options: Options, several: bool) -> str | None:
    """Return the format of the output; None to print words. Raises ConfigError for one that cannot hold the result."""
    from canter.inference.transcript.formats import SUFFIXES

    output = options.output
    if output is None:
        return "nemo" if several else None
    kind = next((kind for kind, suffix in SUFFIXES.items() if suffix == output.suffix.lower()), None)
    if kind is None or output.is_dir():
        raise ConfigError(f"--output {output}: name a file that ends in one of {', '.join(SUFFIXES.values())}")
    if several and kind != "nemo":
        raise ConfigError(f"--output {output}: a manifest is aligned into a manifest; name a file that ends in .jsonl")
    return kind


def with_text(items: "list[Item]", options: Options, text: str | None) -> "list[Item]":
    """Return the items, of which a single one gets the ``text``. Raises ConfigError where the number does not fit, and
    AudioError for a recording that cannot be read."""
    from dataclasses import replace

    from canter.corpus.audio import STANDARD_INPUT
    from canter.corpus.media import is_media

    single = options.audio == STANDARD_INPUT or is_media(options.audio)
    if text is None:
        if single:
            raise ConfigError(f"{options.audio} is one recording: give its text too, as a file or in quotes")
        return items
    if len(items) != 1 or not single:
        raise ConfigError(
            f"{options.audio} is a manifest or a folder, and a text belongs to one recording: name an audio file, or "
            "leave the text out for a manifest with its own texts"
        )
    item = items[0]
    if item.utterance is None:
        raise AudioError(item.problem or f"{options.audio} cannot be read")
    return [replace(item, row=item.row | {"text": text}, utterance=replace(item.utterance, text=text))]


def align_items(aligner: "Aligner", items: "Sequence[Item]") -> "list[Transcription]":
    """Return the aligned text of each item, or an error, under a progress bar."""
    from canter.cli.progress import counting, say
    from canter.inference.recording import Transcription

    results = [Transcription("", error=item.problem) for item in items]
    wanted = [(place, item.utterance) for place, item in enumerate(items) if item.utterance is not None]
    utterances = [utterance for _, utterance in wanted]
    long = sum(utterance.duration > aligner.plain.window for utterance in utterances)
    if long:
        what = "1 recording is" if long == 1 else f"{long:,} recordings are"
        say(f"{what} longer than the model's window of {aligner.plain.window:g} s, and transcribed first")
    with counting("aligning", len(wanted)) as advance:
        for done, (number, result) in enumerate(aligner.align(utterances), 1):
            results[wanted[number][0]] = result
            advance(done, len(wanted))
    return results


def write(options: Options, items: "Sequence[Item]", results: "Sequence[Transcription]", kind: str | None) -> None:
    """Write or print the result."""
    from canter.inference.transcript.formats import file_segments, render, write_output

    if kind is None:
        print(f"{'start':>9}  {'end':>9}  {'prob.':>5}  word")
        for segment in file_segments(items[0], results[0]):
            for word in segment.words:
                print(f"{word.start:9.3f}  {word.end:9.3f}  {word.probability:5.3f}  {word.text}")
    elif options.output is None:
        sys.stdout.writelines(render(items, results, kind, timed=True))
    else:
        write_output(options.output, render(items, results, kind, timed=True))


def report(items: "Sequence[Item]", results: "Sequence[Transcription]") -> None:
    """Print failures, scores, the number of improbable words and the least probable segment on standard error."""
    from canter.inference.transcript.formats import timestamp

    failed = [result.error for result in results if result.error is not None]
    for error in failed[:SHOWN]:
        print(f"canter: {error}", file=sys.stderr)
    if len(failed) > SHOWN:
        print(f"canter: ... and {len(failed) - SHOWN:,} more", file=sys.stderr)
    scores = [result.score for result in results if result.score is not None]
    if not scores:
        return
    segments = [segment for result in results for segment in result.segments]
    words = [word for segment in segments for word in segment.words]
    improbable = sum(word.probability < IMPROBABLE for word in words)
    what = "score" if len(results) == 1 else f"{len(scores):,} of {len(results):,} rows aligned, mean score"
    text = f"{what} {sum(scores) / len(scores):.2f} (mean log probability of a token)"
    if improbable:
        text += f"; {improbable:,} of {len(words):,} words have a probability below {IMPROBABLE:g}"
    worst = min(segments, key=lambda segment: segment.avg_logprob)
    if len(results) == 1 and worst.avg_logprob < UNSAID:
        said = worst.text if len(worst.text) <= SHOWN_TEXT else worst.text[: SHOWN_TEXT - 1] + "…"
        text += f"; probably not said ({worst.avg_logprob:.2f}), at {timestamp(worst.start, hours=False)}: {said}"
    print(text, file=sys.stderr)


def report_inexact_times(aligner: "Aligner", checkpoint: Path) -> None:
    """Print why times of words are less exact, if they come from the cross-attention of unknown heads."""
    from canter.inference.engine.alignment import word_times_warning

    if aligner.spelling is None and (warning := word_times_warning(aligner.engine.model)):
        print(f"canter: {checkpoint} {warning}", file=sys.stderr)
