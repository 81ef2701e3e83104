"""Transcribe audio and video files, folders and manifests, in the order given."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from canter.errors import ConfigError, ManifestError
from canter.events import Events
from canter.redaction import redacted

if TYPE_CHECKING:
    from canter.cli.progress import TranscriptionProgress
    from canter.inference.bulk import BulkResult, Report
    from canter.inference.engine.engine import Engine
    from canter.inference.hotwords import Phrases
    from canter.inference.inputs import Item
    from canter.inference.recording import Timestamps
    from canter.inference.transcript.formats import FolderOutput
    from canter.inference.transcript.subtitles import SubtitleStyle
    from canter.ranks import Ranks

# Options that a transcript depends on beside the model and its row, by their names in files of partial results.
# fmt: off
IDENTITY = {"precision": "precision", "max_repeats": "max_repeats", "beam": "beam_size",
            "length_penalty": "length_penalty", "ctc_weight": "ctc_weight", "vad": "vad",
            "window_seconds": "chunk_seconds", "fallback": "fallback", "initial_prompt": "prompt",
            "audio_track": "audio_track", "vad_threshold": "vad_threshold",
            "vad_min_speech": "vad_min_speech", "vad_min_silence": "vad_min_silence",
            "vad_padding": "vad_padding", "channel": "channel",
            "detect_language": "detect_language",
            "condition_on_previous_text": "condition_on_previous_text", "clip_timestamps": "clip_timestamps",
            "suppress_tokens": "suppress_tokens",
            "hallucination_silence_threshold": "hallucination_silence_threshold",
            "hotwords": "hotword_list", "nbest": "nbest", "logprobs": "logprobs"}
# fmt: on
Number = TypeVar("Number", int, float)
SHOWN = 20  # failures and warnings that are printed


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run folder (its best checkpoint), a model folder, a .nemo file, or a Hugging Face hub name such as
    openai/whisper-tiny.en."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Audio or video files (recognised by their content), folders of them, `-` for a recording on standard input, or
    manifests (NeMo JSONL, and every kind that `canter index` reads)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Output file or folder (default: print to standard output). A name without suffix is a folder. The same command
    resumes a transcription that was stopped."""
    format: Literal["txt", "srt", "vtt", "tsv", "json", "nemo", "all"] | None = None
    """`txt`, `srt`, `vtt`, `tsv`, `json`: one file per recording, as Whisper's command writes them; `nemo`: the
    manifest with `pred_text` in every row; `all`: all of them, in a folder (default: by the output's suffix, else nemo;
    txt on standard output)."""
    adapter: Path | None = None
    """LoRA adapter to merge into the model: a folder of Canter or peft, or a run (default: none)."""
    batch_size: int | None = None
    """Maximum number of utterances decoded together; it changes the speed, not the text (default: 8 to 128 by model and
    device)."""
    language: str | None = None
    """Language spoken in recordings that name none, as a code or in English: `de`, `de-AT`, `German`; several, such as
    `de,fr,pl`, are those among which it is detected (default: detected by a multilingual Whisper or OWSM)."""
    detect_language: bool = False
    """Print the languages of each recording with their probabilities, and no text; formats txt, json and nemo."""
    task: Literal["transcribe", "translate"] | None = None
    """Task of rows that name none (default: translate rows whose source and target languages differ)."""
    target_language: str = "en"
    """Target language of `--task translate` for rows that name none."""
    prompt: str = ""
    """Text that precedes every recording: names and words to expect, a style of writing. For Whisper, OWSM and
    Canary-flash."""
    hotwords: str | None = None
    """Words and phrases to prefer, separated by commas, or a text file with one a line. Those that are not said change
    nothing (default: none)."""
    hotword_weight: float = 4.0
    """Nats (natural logarithms) by which a hot word may be less probable than the model's own text."""
    condition_on_previous_text: bool = False
    """Decode the chunks of long recordings one after another, each with the text before it in its prompt; recordings
    still share batches. For Whisper, OWSM and Canary-flash."""
    clip_timestamps: str = ""
    """Spans to transcribe, as starts and ends in seconds: `0,10.5,20` is 0 to 10.5 s, and from 20 s on (default: all).
    Times stay those of the recording."""
    suppress_tokens: str = "-1"
    """Ids of tokens that are never written, separated by commas; -1 is the model's own set, and an empty text none."""
    hallucination_silence_threshold: float | None = None
    """Leave out segments whose words look invented, between pauses of more than this many seconds; asks for the times
    of words (default: leave out none)."""
    timestamps: Literal["auto", "none", "segment", "word"] = "auto"
    """`segment`: times of segments, from the model's timestamp tokens where it has them; `word`: times of words too,
    from cross-attention; `auto`: `word` for srt and vtt, `segment` for tsv and json, else `none`."""
    cues: Literal["auto", "sentence", "whisper"] = "auto"
    """Rule that divides srt and vtt into cues. `sentence`: at sentence ends, at most 7 s and 2 lines of 42 characters;
    `whisper`: one cue per segment, as in Whisper's command; `auto`: `whisper` with one of the four options below, else
    `sentence`."""
    max_line_width: int | None = None
    """Maximum number of characters in a subtitle line."""
    max_line_count: int | None = None
    """Maximum number of lines in a cue; with `--cues whisper` it needs --max-line-width."""
    max_words_per_line: int | None = None
    """Maximum number of words in a subtitle line."""
    highlight_words: bool = False
    """Underline each word in srt and vtt while it is spoken."""
    beam_size: int = 1
    """Beam size; 1 is greedy search."""
    nbest: int = 1
    """Number of texts of each chunk to write to json and nemo, best first, with their log probabilities; at most
    --beam-size."""
    logprobs: bool = False
    """Write the log probability of every token to json and nemo."""
    length_penalty: float | None = None
    """Exponent of the length by which the score of a beam is divided (default: 0 for Canary and runs, 1 for other
    models of Hugging Face). For OWSM it is added to the score for every token (default: 0)."""
    ctc_weight: float = 0.0
    """Weight of the CTC head in joint CTC/attention decoding, 0 to 1, such as 0.3 (default: 0, attention only)."""
    vad: Literal["energy", "silero", "none"] = "energy"
    """Voice activity detector. Silence of at least 2 s at the ends of a recording, and of 5 s within, is left out, and
    long audio is divided in pauses. `silero` needs the extra `vad`; `none` keeps all audio in overlapping chunks."""
    vad_threshold: float = 0.5
    """Probability above which `silero` finds speech, between 0 and 1. `energy` finds it above the noise floor by 16 dB
    times this, or by half the contrast times this where that is less."""
    vad_min_speech: float = 0.0
    """Minimum length of speech in seconds; shorter spans count as silence."""
    vad_min_silence: float | None = None
    """Minimum length in seconds of silence that is left out, padding included; smaller values make more and shorter
    chunks (default: 2.3 at the ends of a short recording, 5.6 within one)."""
    vad_padding: float = 0.3
    """Seconds kept before and after speech."""
    chunk_seconds: float | None = None
    """Maximum length in seconds of the chunks that long audio is divided into (default: the model's training length
    where known, else 30 for Whisper and 40 for others)."""
    draft: str = "auto"
    """Source of drafts, which let greedy search check several tokens in a step of the decoder; the text stays the same.
    `ctc`: the model's CTC head; `off`: none; `auto`: `ctc` where it pays, which is on a CPU with a head over
    characters; anything else: a smaller model with the same tokenizer."""
    fallback: bool = True
    """Decode repetitive or unlikely text again at higher temperatures (Whisper only)."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` uses a GPU if there is one."""
    precision: Literal["float32", "bf16", "int8"] = "float32"
    """bf16 is for GPUs and may make transcripts depend on the batch; int8 is for CPUs."""
    max_repeats: int = 3
    """Number of repeats to keep where greedy search repeats the same words for longer than the audio lasts; 0: no
    limit. No other text is changed. With --fallback a Whisper has its own rule."""
    audio_track: int | None = None
    """Audio track of files with several, from 0 (default: the one marked as default, else the first)."""
    channel: str = "mix"
    """Channel of recordings that name none. `mix`: the average of all; a number from 0: that one; `each`: every one by
    itself, merged in order of time, with the channel of each segment (for calls recorded on two channels)."""
    max_seconds: float | None = None
    """Maximum length of a recording in seconds; longer ones are refused (default: no limit)."""
    skip_existing: bool = False
    """Skip recordings whose files exist in the output folder."""
    json: bool = False
    """Print one JSON object on stdout instead of a table; needs --output."""

    @cached_property
    def phrases(self) -> "Phrases | None":
        from canter.inference.hotwords import Phrases

        return Phrases.read(self.hotwords, self.hotword_weight) if self.hotwords is not None else None

    @property
    def hotword_list(self) -> list[object] | None:
        return [*self.phrases.phrases, self.phrases.weight] if self.phrases else None


def run(options: Options) -> int:
    if not options.inputs:
        raise ConfigError("nothing to transcribe: name audio files, folders or manifests")
    folder, kinds = destination(options)
    style = style_of(options, kinds)
    if (options.nbest > 1 or options.logprobs) and not {"json", "nemo"} & {*kinds}:
        raise ConfigError(f"--nbest and --logprobs are for json and nemo, not {kinds[0]}: add --format json, or nemo")

    from canter.inference.bulk import LONGEST_WAIT
    from canter.ranks import process_group

    with process_group("cpu", longest_wait=LONGEST_WAIT) as ranks:
        return transcribe_inputs(options, folder, kinds, style, ranks)


def transcribe_inputs(options: Options, folder: bool, kinds: list[str], style: "SubtitleStyle", ranks: "Ranks") -> int:
    """Load the engine, read the inputs, transcribe them, and write the transcripts and a summary."""
    from canter.files import remove_stale
    from canter.inference.bulk import PartialFiles, transcribe_items
    from canter.inference.engine.alignment import word_times_warning
    from canter.inference.inputs import read_channel, read_items
    from canter.inference.languages import Defaults, read_languages
    from canter.inference.recording import TranscribeConfig
    from canter.inference.resume import partial_files, remove
    from canter.inference.transcript.formats import check_renderable, json_text, render, render_languages, write_output
    from canter.inference.transcript.vad import VadOptions
    from canter.models.hub import checkpoint_of

    display, timed = Display(ranks), options.timestamps in ("segment", "word")
    checkpoint = checkpoint_of(options.model)
    channel = read_channel(options.channel)
    config = TranscribeConfig(
        chunk_seconds=options.chunk_seconds,
        vad=options.vad,
        vad_options=VadOptions(
            options.vad_threshold, options.vad_min_speech, options.vad_min_silence, options.vad_padding
        ),
        prompt=options.prompt,
        audio_track=options.audio_track,
        each_channel=channel == "each",
        hotwords=options.phrases,
        nbest=options.nbest,
        logprobs=options.logprobs,
    )
    if not options.fallback:
        config = replace(config, fallback=None)
    config = replace(
        config,
        detect_only=options.detect_language,
        condition_on_previous_text=options.condition_on_previous_text,
        clip_timestamps=numbers_of("--clip-timestamps", options.clip_timestamps, float),
        hallucination_silence_threshold=options.hallucination_silence_threshold,
    )
    engine = engine_of(options, checkpoint, ranks)
    timestamps = timestamps_of(options, kinds, style)
    if timestamps == "word" and not engine.aligns:
        timestamps = without_words(checkpoint, style, display)
    if timestamps == "word" and (warning := word_times_warning(engine.model)):
        display.message(f"{checkpoint} {warning}")
    config = replace(config, timestamps=timestamps)
    report_ignored_files(options.inputs, display)

    tokenizer = engine.model.tokenizer
    assert tokenizer is not None
    language, among = read_languages(tokenizer, options.language)
    config = replace(config, languages=among)
    defaults = Defaults.of(tokenizer, language, options.task, options.target_language)
    items = read_items(options.inputs, defaults=defaults, track=options.audio_track, channel=channel)
    if defaults.language and options.language:
        report_other_languages(items, defaults.language, display)
    partial = None
    if folder:
        items, display.files = into_folder(options, items, kinds, style, display)
    else:
        check_renderable(len(items), kinds[0])
    names = display.files.names if display.files else None
    if options.output:
        if ranks.first:
            remove_stale((options.output / name).parent for name in names or ["."])
        partial = PartialFiles(partial_files(options.output, folder), identity(checkpoint, options, timestamps))

    longest = math.inf if options.max_seconds is None else options.max_seconds
    begun = time.perf_counter()
    with display:
        found = transcribe_items(engine, items, config, ranks, display, partial, longest)
    seconds = time.perf_counter() - begun

    text = (
        render_languages(items, found.transcriptions, kinds[0])
        if options.detect_language
        else render(items, found.transcriptions, kinds[0], timed, style)
    )
    failed = sum(result.error is not None for result in found.transcriptions)
    if ranks.first:
        written: list[Path] = []
        if display.files:
            written = [display.files.write_all(items, found.transcriptions)]
        elif options.output:
            if kinds[0] == "nemo" or any(result.error is None for result in found.transcriptions):
                write_output(options.output, text)
                written = [options.output]
        else:
            sys.stdout.writelines(text)
        summary = TranscriptionSummary.of(checkpoint, ranks.size, items, found, seconds, written)
        if options.json:
            print(json_text(asdict(summary), indent=2))
        summary.show(display)
    failed = ranks.broadcast_object(failed)  # rank 0, which has all results, has written them
    if partial and 0 < failed < len(items):  # the others need not be decoded again
        display.message(f"finished transcriptions are kept in {partial.first}; fix the failures and run again")
    elif partial:
        remove(partial.first)  # on every rank, whose disks may differ
    return 1 if failed else 0


class Display(Events["Report"]):
    """Messages and progress of rank 0 on standard error; a single rank also writes each file of an output folder as
    soon as it is transcribed."""

    def __init__(self, ranks: "Ranks"):
        self.ranks = ranks
        self.files: FolderOutput | None = None
        self.progress: TranscriptionProgress | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def message(self, text: str) -> None:
        if self.ranks.first:
            print(f"canter: {text}", file=sys.stderr)

    def step(self, report: "Report") -> None:
        from canter.cli.progress import TranscriptionProgress
        from canter.inference.bulk import Started
        from canter.inference.transcribe import Decoded

        if isinstance(report, Started):
            label = f"rank 0 of {self.ranks.size}" if self.ranks.size > 1 else "transcribing"
            bar = TranscriptionProgress(label, report.utterances, report.seconds, hidden=self.ranks.rank > 0)
            self.progress = self._open.enter_context(bar)
            return
        assert self.progress
        if isinstance(report, Decoded):
            self.progress.advance(report.seconds)
            return
        if self.files and self.ranks.size == 1:
            self.files.write(report.index, report.item, report.transcription)
        duration = report.item.utterance.duration if report.item.utterance else 0.0
        self.progress.finish(duration, report.transcription.error is not None)


def engine_of(options: Options, checkpoint: Path, ranks: "Ranks") -> "Engine":
    """Load the engine. Raises ConfigError for options that the model does not support."""
    import torch

    from canter.inference.engine.requests import EngineConfig
    from canter.inference.loading import load_engine
    from canter.models.protocol import Capability, check_support
    from canter.runtime import choose_device, keep_freed_memory

    device = str(choose_device(options.device))
    if device == "cpu":
        keep_freed_memory()
    if device == "cuda" and ranks.size > 1:
        device = f"cuda:{ranks.local % torch.cuda.device_count()}"
    config = EngineConfig(
        rows=options.batch_size,
        max_repeats=options.max_repeats,
        beams=options.beam_size,
        length_penalty=options.length_penalty,
        ctc_weight=options.ctc_weight,
        suppress_tokens=numbers_of("--suppress-tokens", options.suppress_tokens, int),
    )
    engine = load_engine(
        checkpoint, config, device=device, precision=options.precision, adapter=options.adapter, draft=options.draft
    )
    asked: dict[str, Capability] = {}
    if options.timestamps == "word":
        asked["--timestamps word"] = "word_timestamps"
    if options.hallucination_silence_threshold is not None:
        asked["--hallucination-silence-threshold"] = "word_timestamps"
    if options.detect_language:
        asked["--detect-language"] = "language_detection"
    if options.condition_on_previous_text:
        asked["--condition-on-previous-text"] = "previous_text"
    if options.max_repeats != Options.max_repeats:
        asked["--max-repeats"] = "repetition_guard"
    check_support(engine.model, asked, checkpoint)
    return engine


def numbers_of(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Return the numbers of an option, separated by commas. Raises ConfigError for anything else."""
    try:
        return tuple(kind(part) for part in text.split(",") if text.strip())
    except ValueError:
        raise ConfigError(f"{option} {text[:60]!r}: give numbers, separated by commas") from None


def destination(options: Options) -> tuple[bool, list[str]]:
    """Return True for an output folder, and the formats. Raises ConfigError for options that contradict each other."""
    from canter.inference.transcript.formats import FORMATS, SUFFIXES

    kind, output = options.format, options.output
    counts = {"batch-size": options.batch_size, "beam-size": options.beam_size, "nbest": options.nbest}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: at least 1")
    if options.chunk_seconds is not None and options.chunk_seconds < 1:
        raise ConfigError(f"--chunk-seconds {options.chunk_seconds:g}: at least 1")
    if options.audio_track is not None and options.audio_track < 0:
        raise ConfigError(f"--audio-track {options.audio_track}: tracks are counted from 0")
    if options.max_repeats < 0:
        raise ConfigError(f"--max-repeats {options.max_repeats}: 0, no limit, or more")
    if options.skip_existing and not (output and (output.is_dir() or not output.suffix)):
        raise ConfigError("--skip-existing: name a folder as --output")
    if options.skip_existing and kind in (None, "nemo", "all"):
        raise ConfigError("--skip-existing is for formats with one file per utterance: add --format srt, vtt, txt, ...")
    if output and output.suffix == ".gz":
        raise ConfigError(f"{output}: transcripts are not compressed; name it without .gz")
    if options.detect_language:
        if output and (output.is_dir() or not output.suffix):
            raise ConfigError(f"--detect-language writes one file, and {output} is a folder: name one, such as a .txt")
        if kind not in (None, "txt", "json", "nemo") or (output and output.suffix in (".srt", ".vtt", ".tsv")):
            raise ConfigError("--detect-language writes no text to put in subtitles: use --format txt, json or nemo")
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


def style_of(options: Options, kinds: list[str]) -> "SubtitleStyle":
    """Return the layout of subtitles. Raises ConfigError for options that contradict each other."""
    from canter.inference.transcript.formats import SUBTITLES
    from canter.inference.transcript.subtitles import SubtitleStyle

    names = ("cues", "max_line_width", "max_line_count", "max_words_per_line", "highlight_words")
    style = SubtitleStyle(*(getattr(options, name) for name in names))
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != getattr(Options, name)]
    if (style.shaped or style.cues != "auto") and not {*SUBTITLES} & {*kinds}:
        raise ConfigError(f"{', '.join(given)}: for subtitles, and the format is {kinds[0]}; add --format srt or vtt")
    if style.needs_words and options.timestamps in ("none", "segment"):
        raise ConfigError(f"{', '.join(given)}: needs times of words; leave out --timestamps {options.timestamps}")
    if style.ignored:
        print(f"canter: {style.ignored}", file=sys.stderr)
    return style


def timestamps_of(options: Options, kinds: Sequence[str], style: "SubtitleStyle") -> "Timestamps":
    """Return the times to ask the model for."""
    from canter.inference.transcript.formats import SUBTITLES

    if options.timestamps != "auto":
        return options.timestamps
    if options.hallucination_silence_threshold is not None:
        return "word"
    if {*SUBTITLES} & {*kinds} and (style.by_sentence or style.needs_words):
        return "word"
    return "segment" if {*SUBTITLES, "tsv", "json"} & {*kinds} else "none"


def without_words(checkpoint: Path, style: "SubtitleStyle", events: Events["Report"]) -> Literal["segment"]:
    """Return the times for subtitles of a model that cannot compute those of words. Raises ConfigError where the layout
    needs these."""
    if style.needs_words:
        raise ConfigError(
            f"{checkpoint} cannot compute times of words, which these subtitles need; for lines of a given width "
            "without them add --cues sentence, and leave out --highlight-words"
        )
    events.message(
        f"{checkpoint} cannot compute times of words: cues that divide a segment share its time in proportion to their "
        "characters"
    )
    return "segment"


def identity(checkpoint: Path, options: Options, timestamps: str) -> dict[str, object]:
    """Return the model and the options that partial results must have been made with."""
    from canter.models.hub import ADAPTER, WEIGHT_FILES, adapter_folder

    files = [checkpoint / name for name in (*WEIGHT_FILES, ADAPTER)] if checkpoint.is_dir() else [checkpoint]
    weights = next((path for path in files if path.exists()), None)
    adapter = options.adapter and adapter_folder(options.adapter).resolve()
    return {
        "model": str(checkpoint.resolve()),
        "weights": None if weights is None else int(weights.stat().st_mtime),
        **({} if adapter is None else {"adapter": str(adapter), "matrices": int((adapter / ADAPTER).stat().st_mtime)}),
        "timestamps": timestamps,
        "languages": options.language if "," in (options.language or "") else None,
        **{name: getattr(options, option) for name, option in IDENTITY.items()},
    }


def into_folder(
    options: Options, items: "list[Item]", kinds: list[str], style: "SubtitleStyle", events: Events["Report"]
) -> "tuple[list[Item], FolderOutput]":
    """Return the items to transcribe, and the files of each in the output folder."""
    from canter.inference.inputs import names_of
    from canter.inference.transcript.formats import FolderOutput, file_names

    assert options.output
    roots = [os.path.abspath(path) for path in options.inputs if os.path.isdir(path)]
    timed = options.timestamps in ("segment", "word")
    files = FolderOutput(options.output, file_names(items, roots), kinds, style, timed)
    if not options.skip_existing:
        return items, files
    done = [all(path.exists() for _, path in files.files(index)) for index in range(len(items))]
    if any(done):
        skipped = [item for item, is_done in zip(items, done) if is_done]
        events.message(f"{len(skipped):,} left out, whose files exist: {names_of(skipped)}")
    wanted = [index for index, is_done in enumerate(done) if not is_done]
    return [items[index] for index in wanted], replace(files, names=[files.names[index] for index in wanted])


def report_ignored_files(inputs: Sequence[str], events: Events["Report"]) -> None:
    """Report the number of files in each folder that are not audio or video, and the first of them."""
    from canter.corpus.media import media_in
    from canter.corpus.sources import units_of
    from canter.inference.transcript.formats import SUFFIXES

    ours = {*SUFFIXES.values(), ".partial"}
    for path in inputs:
        if not os.path.isdir(path):
            continue
        with contextlib.suppress(ManifestError):  # raised again when the inputs are read
            if [unit.kind for unit in units_of(path)] != ["folder"]:
                continue
        others = [file for file in media_in(os.path.abspath(path))[1] if os.path.splitext(file)[1].lower() not in ours]
        if others:
            number = f"{len(others):,} files are" if len(others) > 1 else "1 file is"
            events.message(f"{path}: {number} not taken, no audio or video (the first: {others[0]})")


def report_other_languages(items: "Sequence[Item]", asked: str, events: Events["Report"]) -> None:
    """Report the number of rows that name another language than --language, which is for rows that name none."""
    from canter.text.languages import is_said, same

    stated = [one.source_lang or one.lang for item in items if (one := item.utterance)]
    others = sorted({language for language in stated if is_said(language) and not same(language, asked)})
    if others:
        count = sum(language in others for language in stated)
        events.message(
            f"--language {asked} is for rows that name none; {count:,} name another language ({', '.join(others)})"
        )


@dataclass(frozen=True)
class TranscriptionSummary:
    """TranscriptionSummary of a transcription, which --json prints as an object."""

    model: str
    ranks: int
    utterances: int
    transcribed: int
    resumed: int
    failed: list[dict[str, str | None]]
    warnings: list[dict[str, str | float | None]]
    audio_seconds: float
    seconds: float
    rtfx: float
    useful_rows: float
    mean_rows: float
    counters: Mapping[str, float]
    output: list[str]

    @classmethod
    def of(
        cls, model: Path, ranks: int, items: "Sequence[Item]", found: "BulkResult", seconds: float, written: list[Path]
    ) -> "TranscriptionSummary":
        pairs, counters = list(zip(items, found.transcriptions)), found.counters
        failed = [{"audio_filepath": item.path, "error": result.error} for item, result in pairs if result.error]
        return cls(
            str(model),
            ranks,
            len(items),
            len(items) - len(failed),
            len(found.resumed),
            failed,
            [
                {"audio_filepath": item.path, "lost_seconds": result.lost_seconds, "warning": redacted(warning)}
                for item, result in pairs
                for warning in result.warnings
            ],
            found.audio_seconds,
            seconds,
            found.audio_seconds / seconds,
            counters["useful_row_steps"] / max(1, counters["row_steps"]),
            counters["useful_row_steps"] / max(1, counters["steps"]),
            counters,
            [str(path) for path in written],
        )

    def show(self, events: Events["Report"]) -> None:
        """Print failures, warnings, speed and output files to standard error."""
        for entry in self.failed[:SHOWN]:
            events.message(f"{entry['error']}")
        if len(self.failed) > SHOWN:
            events.message(f"... and {len(self.failed) - SHOWN} more")
        for entry in self.warnings[:SHOWN]:
            events.message(f"{entry['audio_filepath']}: {entry['warning']}")
        if len(self.warnings) > SHOWN:
            events.message(f"... and {len(self.warnings) - SHOWN} more warnings")
        resumed = f", {self.resumed} of them from an earlier start" if self.resumed else ""
        failed = f"; {len(self.failed)} failed" if self.failed else ""
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        counters = self.counters
        print(
            f"{self.transcribed} of {self.utterances} transcribed{resumed}{failed}; "
            f"{self.audio_seconds:,.0f} s of audio in {self.seconds:.1f} s{ranks}, RTFx {self.rtfx:,.1f} "
            f"(features {counters['feature_seconds']:.1f} s, encoder {counters['encoder_seconds']:.1f} s, "
            f"decoder {counters['decoder_seconds']:.1f} s at {self.mean_rows:.0f} rows)",
            *(f"written: {path}" for path in self.output),
            sep="\n",
            file=sys.stderr,
        )
