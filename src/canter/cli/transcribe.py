"""Transcribe audio and video files, folders and manifests, in the order given."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from canter.cli.telling import (
    into_folder,
    say,
    shown_path,
    some_of,
    tell_what_is_not_taken,
    warn_of_other_languages,
    without_words,
)
from canter.errors import ConfigError
from canter.redaction import redacted

# Options that a transcript depends on, beside the model and what is in a row.
# fmt: off
DECIDING = ("precision", "max_repeats", "beam", "length_penalty", "ctc_weight", "vad", "window_seconds", "fallback",
            "initial_prompt", "audio_track")
# fmt: on

if TYPE_CHECKING:
    from canter.corpus.manifest import Utterance
    from canter.inference.engine.engine import Engine
    from canter.inference.inputs import Item
    from canter.inference.progress import Decoded
    from canter.inference.ranks import Ranks
    from canter.inference.transcribe import Transcription
    from canter.inference.transcript.subtitles import SubtitleStyle
    from canter.inference.transcript.writers import FolderOutput


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run folder (its best checkpoint), a model folder, a .nemo file, or a Hugging Face hub name such as
    openai/whisper-tiny.en."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Audio or video files, recognised by their content, folders of them, `-` for a recording on standard input, or
    manifests (NeMo JSONL, and whatever `canter index` reads)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Output file or folder (default: print to standard output). A name without suffix is a folder. The same command
    resumes a transcription that was stopped."""
    format: Literal["txt", "srt", "vtt", "tsv", "json", "nemo", "all"] | None = None
    """`txt`, `srt`, `vtt`, `tsv`, `json`: one file for each recording, as Whisper's command writes them; `nemo`: the
    manifest with `pred_text` in every row; `all` needs a folder (default: by the output's suffix, else nemo; txt on
    standard output)."""
    batch_size: int | None = None
    """Maximum number of utterances decoded together; it changes the speed, not the text (default: 8 to 128 by model and
    device)."""
    language: Annotated[str | None, tyro.conf.arg(aliases=["--lang"])] = None
    """Language spoken in recordings that name none, as a code or in English: `de`, `de-AT`, `German` (default: detected
    by a multilingual Whisper)."""
    task: Literal["transcribe", "translate"] | None = None
    """Task of rows that name none (default: translate rows whose source and target languages differ)."""
    target_language: str = "en"
    """Target language of `--task translate` for rows that name none."""
    initial_prompt: str = ""
    """Text that precedes every recording: names and words to expect, a style of writing. For Whisper and Canary-flash.
    """
    timestamps: Literal["auto", "none", "segment", "word"] = "auto"
    """`segment`: times of segments, from the model's timestamp tokens where it has them; `word`: times of words too,
    from cross-attention; `auto`: `word` for srt and vtt, `segment` for tsv and json, else `none`."""
    cues: Literal["auto", "sentence", "whisper"] = "auto"
    """Rule that divides srt and vtt into cues. `sentence`: at sentence ends, at most 7 s and 2 lines of 42 characters;
    `whisper`: one cue a segment, as Whisper's command; `auto`: `whisper` with one of the four options below, else
    `sentence`."""
    max_line_width: int | None = None
    """Maximum number of characters in a subtitle line."""
    max_line_count: int | None = None
    """Maximum number of lines in a cue; with `--cues whisper` it needs --max-line-width."""
    max_words_per_line: int | None = None
    """Maximum number of words in a subtitle line."""
    highlight_words: bool = False
    """Underline each word in srt and vtt while it is spoken."""
    beam: int = 1
    """Beam size; 1 is greedy search."""
    length_penalty: float | None = None
    """Divide the score of a beam by its length to this power (default: 1 for Whisper, 0 for others)."""
    ctc_weight: float = 0.0
    """Weight of the CTC head in joint CTC/attention decoding, 0 to 1, such as 0.3 (default: 0, attention only)."""
    vad: Literal["energy", "silero", "none"] = "energy"
    """Voice activity detector: silence of 2 s and more at the ends of a recording, and of 5 s in it, is left out, and
    long audio is cut in pauses. `silero` needs the extra `vad`; `none` keeps all and cuts overlapping windows."""
    window_seconds: float | None = None
    """Maximum length in seconds of the chunks that long audio is cut into (default: the model's training length where
    known, else 30 for Whisper and 40 for others)."""
    fallback: bool = True
    """Decode repetitive or unlikely text again at higher temperatures (Whisper only)."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU if there is one."""
    precision: Literal["float32", "bf16", "int8"] = "float32"
    """bf16 is for GPUs and may make transcripts depend on the batch; int8 is for CPUs."""
    max_repeats: int = 3
    """Number of repeats to keep where greedy search writes the same words for longer than the audio lasts; 0 is no
    limit. Nothing else is changed; with --fallback a Whisper has its own rule."""
    audio_track: int | None = None
    """Audio track to transcribe of files with several, from 0 (default: the one marked as default, else the first)."""
    longest_seconds: float | None = None
    """Refuse recordings longer than this (default: no limit)."""
    skip_existing: bool = False
    """Skip recordings whose files exist in the output folder."""
    json: bool = False
    """Print a summary as one JSON object on stdout; needs --output."""


def run(options: Options) -> int:
    if not options.inputs:
        raise ConfigError("nothing to transcribe: name audio files, folders or manifests")
    folder, kinds = destination(options)
    style = style_of(options, kinds)

    from canter.inference.ranks import Ranks

    ranks = Ranks()
    try:
        return transcribe_inputs(options, folder, kinds, style, ranks)
    finally:
        ranks.close()


def transcribe_inputs(options: Options, folder: bool, kinds: list[str], style: "SubtitleStyle", ranks: "Ranks") -> int:
    from canter.files import remove_stale
    from canter.inference.inputs import Defaults, read_items, require_language
    from canter.inference.resume import partial_files, remove
    from canter.inference.transcribe import Transcription, checkpoint_of
    from canter.inference.transcript.writers import check_renderable, json_text, render, write_results
    from canter.text.whisper import WhisperTokenizer

    checkpoint = checkpoint_of(options.model)
    engine = load_engine(options, checkpoint, ranks)
    timestamps = timestamps_of(options, kinds, style)
    if timestamps == "word" and not engine.aligns:
        timestamps = without_words(checkpoint, style, kinds, quiet=ranks.rank > 0)
    languages = engine.model.tokenizer.languages
    if ranks.rank == 0:
        tell_what_is_not_taken(options.inputs)
    asked = Defaults.of(engine.model.tokenizer, options.language, options.task, options.target_language)
    items = read_items(options.inputs, defaults=asked, track=options.audio_track)
    if asked.language and options.language and ranks.rank == 0:
        warn_of_other_languages(items, asked.language)
    if len(languages) > 1 and not isinstance(engine.model.tokenizer, WhisperTokenizer):  # which detects it
        items = require_language(items, languages)
    files = None
    if folder:
        assert options.output
        roots = [os.path.abspath(path) for path in options.inputs if os.path.isdir(path)]
        items, files = into_folder(
            options.output, items, roots, kinds, style, options.skip_existing, quiet=ranks.rank > 0
        )
    else:
        check_renderable(len(items), kinds[0])
    results = [Transcription("", error=item.problem) for item in items]
    if options.output and ranks.rank == 0:
        names = files.names if files else ["."]
        remove_stale((options.output / name).parent for name in names)
    first = partial_files(options.output, folder) if options.output else None
    made_by = identity(checkpoint, options, timestamps)
    begun = time.perf_counter()
    resumed, audio_seconds = work_through(engine, items, results, options, made_by, first, files, ranks)
    shares = ranks.gather((asdict(engine.counters), audio_seconds))
    seconds = time.perf_counter() - begun

    failed = [(item, result) for item, result in zip(items, results) if result.error is not None]
    timed = options.timestamps in ("segment", "word")
    if ranks.rank == 0:
        written: list[Path] = []
        if options.output:
            names = files.names if files else None
            written = write_results(items, results, options.output, kinds, folder, timed, style, names)
        else:
            sys.stdout.writelines(render(items, results, kinds[0], timed, style))
        counters = {name: sum(share[0][name] for share in shares) for name in shares[0][0]}
        audio_seconds = sum(share[1] for share in shares)
        summary = {
            "model": str(checkpoint),
            "ranks": ranks.size,
            "utterances": len(items),
            "transcribed": len(items) - len(failed),
            "resumed": resumed,
            "failed": [{"audio_filepath": shown_path(i.row), "error": r.error} for i, r in failed],
            "warnings": [
                {
                    "audio_filepath": shown_path(i.row),
                    "lost_seconds": r.lost_seconds,
                    "warning": redacted(warning),
                }
                for i, r in zip(items, results)
                for warning in r.warnings
            ],
            "audio_seconds": audio_seconds,
            "seconds": seconds,
            "rtfx": audio_seconds / seconds,
            "useful_rows": counters["useful_row_steps"] / max(1, counters["row_steps"]),
            "mean_rows": counters["useful_row_steps"] / max(1, counters["steps"]),
            "counters": counters,
            "output": [str(path) for path in written],
        }
        if options.json:
            print(json_text(summary, indent=2))
        say(summary)
    problems = ranks.all_gather(len(failed))[0]  # once rank 0, which knows all of them, has written
    if first and 0 < problems < len(items):  # the others need not be decoded again
        if ranks.rank == 0:
            print(f"what was transcribed is kept in {first} for when the rest is mended", file=sys.stderr)
    elif first:
        remove(first)  # every rank does: their disks may differ
    return 1 if problems else 0


def style_of(options: Options, kinds: list[str]) -> "SubtitleStyle":
    """Return how subtitles are laid out. Raises ConfigError for options that do not go with the others."""
    from canter.inference.transcript.formats import SUBTITLES
    from canter.inference.transcript.subtitles import SubtitleStyle

    style = SubtitleStyle(
        options.cues,
        options.max_line_width,
        options.max_line_count,
        options.max_words_per_line,
        options.highlight_words,
    )
    if (style.shaped or style.cues != "auto") and not {*SUBTITLES} & {*kinds}:
        raise ConfigError(f"{told_of(options)}: for subtitles, and the format is {kinds[0]}; add --format srt or vtt")
    if style.needs_words and options.timestamps in ("none", "segment"):
        raise ConfigError(f"{told_of(options)}: needs times of words; leave out --timestamps {options.timestamps}")
    if style.ignored:
        print(f"canter: {style.ignored}", file=sys.stderr)
    return style


def told_of(options: Options) -> str:
    """Return the options of subtitles that were given, as they were typed."""
    names = ("cues", "max_line_width", "max_line_count", "max_words_per_line", "highlight_words")
    return ", ".join(
        f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != getattr(Options, name)
    )


def load_engine(options: Options, checkpoint: Path, ranks: "Ranks") -> "Engine":
    import torch

    from canter.inference.engine.engine import engine_for
    from canter.inference.engine.requests import EngineConfig
    from canter.loading import load_module, model_format
    from canter.models.device import choose_device
    from canter.runtime import lasting_heap

    device = str(choose_device(options.device))
    if device == "cpu":
        lasting_heap()
    if device == "cuda" and ranks.size > 1:
        device = f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
    if not model_format(checkpoint).native:
        refuse_ours(options, checkpoint)
    model = load_module(checkpoint, device, options.precision)
    if model.tokenizer is None:
        raise ConfigError(f"{checkpoint} has no tokenizer, so its tokens cannot be read as text")
    config = EngineConfig(
        rows=options.batch_size,
        max_repeats=options.max_repeats,
        beams=options.beam,
        length_penalty=options.length_penalty,
        ctc_weight=options.ctc_weight,
    )
    return engine_for(model, model.tokenizer.end, config)


def refuse_ours(options: Options, checkpoint: Path) -> None:
    """ConfigError for options that transformers' ``generate`` has nothing for."""
    asked = {
        "--timestamps word": options.timestamps == "word",
        "--precision int8": options.precision == "int8",
        "--max-repeats": options.max_repeats != Options.max_repeats,
        "--ctc-weight": options.ctc_weight > 0,
    }
    told = [name for name, value in asked.items() if value]
    if told:
        raise ConfigError(f"{', '.join(told)}: {checkpoint} runs through transformers, which has no such thing")


def work_through(
    engine: "Engine",
    items: "Sequence[Item]",
    results: "list[Transcription]",
    options: Options,
    made_by: dict[str, Any],
    first: Path | None,
    files: "FolderOutput | None",
    ranks: "Ranks",
) -> tuple[int, float]:
    """Fill in the ``results`` of all items that an earlier start has not, each rank its share; in the end rank 0
    has them all. A single process writes the files of each item at once. Return how many were there, and the seconds
    of audio that this rank transcribed.

    ``made_by`` says what an earlier start must have asked for, see `identity`.
    """
    from canter.inference.ranks import share
    from canter.inference.resume import Partial, read_done, row_key
    from canter.inference.transcribe import TranscribeConfig, transcribe_events

    asked = TranscribeConfig(
        timestamps=made_by["timestamps"],
        window_seconds=options.window_seconds,
        vad=options.vad,
        context=options.initial_prompt,
        audio_track=options.audio_track,
    )
    if not options.fallback:
        asked = replace(asked, fallback=None)
    agree_on_items(items, ranks)
    known: set[int] = set()
    if first:
        done = read_done(first, made_by)
        for index, item in enumerate(items) if done else ():
            if item.utterance and (result := done.get(row_key(item.utterance))):
                results[index] = result
                known.add(index)
    others = ranks.all_gather(known)
    everywhere = set().union(*others)
    if everywhere and ranks.rank == 0:
        kept = some_of([shown_path(items[index].row) for index in sorted(everywhere)])
        print(f"canter: {len(everywhere):,} kept from an earlier start: {kept}", file=sys.stderr)
    wanted = [index for index, item in enumerate(items) if item.utterance and index not in everywhere]
    utterances = [utterance for index in wanted if (utterance := items[index].utterance)]
    mine = share(engine.model, utterances, ranks.size)[ranks.rank]
    if ranks.size > 1:
        wanted, utterances = [wanted[place] for place in mine], [utterances[place] for place in mine]

    partial = None
    if first:
        path = first.with_name(f"{first.name}-{ranks.rank}") if ranks.rank else first
        partial = Partial(path, made_by)
    keys = [row_key(utterance) for utterance in utterances] if partial else []
    audio_seconds = 0.0
    try:
        longest = math.inf if options.longest_seconds is None else options.longest_seconds
        events = transcribe_events(engine, engine.model.tokenizer, utterances, longest, asked)
        for number, result in watched(events, utterances, ranks):
            path = redacted(utterances[number].audio_filepath)
            if result.error is not None and path not in result.error:
                result = replace(result, error=f"{path}: {result.error}")
            results[wanted[number]] = result
            if result.error is None:
                audio_seconds += utterances[number].duration
            if partial:
                partial.add(utterances[number], result, keys[number])
            if files and ranks.size == 1:
                files.write(wanted[number], items[wanted[number]], result)
    finally:
        if partial:
            partial.close()
    for found in ranks.gather({index: results[index] for index in {*wanted, *(known - others[0])}}):
        for index, result in found.items():
            results[index] = result
    return len(everywhere), audio_seconds


def destination(options: Options) -> tuple[bool, list[str]]:
    """Whether the output is a folder, and the formats. Raises ConfigError for what does not go together."""
    from canter.inference.transcript.formats import FORMATS, SUFFIXES

    kind, output = options.format, options.output
    for name, value in (("batch-size", options.batch_size), ("beam", options.beam)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: at least 1")
    if options.window_seconds is not None and options.window_seconds < 1:
        raise ConfigError(f"--window-seconds {options.window_seconds:g}: at least 1")
    if options.audio_track is not None and options.audio_track < 0:
        raise ConfigError(f"--audio-track {options.audio_track}: tracks are counted from 0")
    if options.max_repeats < 0:
        raise ConfigError(f"--max-repeats {options.max_repeats}: 0, no limit, or more")
    if options.skip_existing and not (output and (output.is_dir() or not output.suffix)):
        raise ConfigError("--skip-existing: name a folder as --output")
    if options.skip_existing and kind in (None, "nemo", "all"):
        raise ConfigError("--skip-existing is for formats with a file an utterance: add --format srt, vtt, txt, ...")
    if output and output.suffix == ".gz":
        raise ConfigError(f"{output}: transcripts are not compressed; name it without .gz")
    if output is None:
        if options.json:
            raise ConfigError("--json prints the summary where the transcripts would go: name an --output")
        if kind == "all":
            raise ConfigError("--format all writes several files: name a folder as --output")
        return False, [kind or "txt"]
    folder = output.is_dir() or not output.suffix
    if kind == "all":
        if not folder:
            raise ConfigError(f"--format all writes several files, but {output} is one: name a folder")
        return True, [*FORMATS]
    suffixes = {suffix: name for name, suffix in SUFFIXES.items()}
    return folder, [kind or suffixes.get(output.suffix, "nemo")]


def timestamps_of(options: Options, kinds: Sequence[str], style: "SubtitleStyle") -> Literal["none", "segment", "word"]:
    """Return the times to ask the model for."""
    from canter.inference.transcript.formats import SUBTITLES

    if options.timestamps != "auto":
        return options.timestamps
    if {*SUBTITLES} & {*kinds} and (style.by_sentence or style.needs_words):
        return "word"
    return "segment" if {*SUBTITLES, "tsv", "json"} & {*kinds} else "none"


def identity(checkpoint: Path, options: Options, timestamps: str) -> dict[str, Any]:
    """Return what an unfinished result must have been made by, to go on with it."""
    weights = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    return {
        "model": str(checkpoint.resolve()),
        "weights": int(weights.stat().st_mtime) if weights.exists() else None,
        "timestamps": timestamps,
        **{name: getattr(options, name) for name in DECIDING},
    }


def agree_on_items(items: "Sequence[Item]", ranks: "Ranks") -> None:
    """ConfigError where the ranks were not given the same rows."""
    from hashlib import blake2b

    if ranks.size == 1:
        return
    rows = blake2b(digest_size=8)
    for item in items:
        rows.update(json.dumps(item.row, sort_keys=True).encode())
    if len(set(ranks.all_gather(rows.hexdigest()))) > 1:
        raise ConfigError("the ranks found different rows: every machine needs the same files at the same paths")


def watched(
    events: "Iterable[tuple[int, Transcription] | Decoded]", utterances: "Sequence[Utterance]", ranks: "Ranks"
) -> "Iterator[tuple[int, Transcription]]":
    """Yield the transcriptions among the events, and show how much audio is decoded."""
    from canter.cli.progress import TranscriptionProgress
    from canter.inference.progress import Decoded

    label = f"rank 0 of {ranks.size}" if ranks.size > 1 else "transcribing"
    total = sum(utterance.duration for utterance in utterances)
    with TranscriptionProgress(label, len(utterances), total, hidden=ranks.rank > 0) as progress:
        for event in events:
            if isinstance(event, Decoded):
                progress.advance(event.seconds)
                continue
            number, result = event
            yield number, result
            progress.finish(utterances[number].duration, result.error is not None)
