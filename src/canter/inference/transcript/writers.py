"""Transcripts to disk, whole or not at all, in the formats of the Whisper command line and of NeMo.

Whisper's (`canter.inference.transcript.formats`) are one file an utterance; ``nemo`` is the manifest, in its order,
with ``pred_text`` added to every row, or ``error`` to one that could not be transcribed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from canter.corpus.audio import STANDARD_INPUT
from canter.errors import ConfigError
from canter.files import write_text
from canter.inference.inputs import Item
from canter.inference.transcribe import Transcription
from canter.inference.transcript.formats import (
    ONE_RECORDING,
    SUBTITLES,
    SUFFIXES,
    json_text,
    render_segments,
    whisper_json,
)
from canter.inference.transcript.segments import Segment
from canter.inference.transcript.subtitles import SENTENCES, SubtitleStyle
from canter.redaction import redacted


class Transcribed(Protocol):
    """The transcript of one recording."""

    @property
    def text(self) -> str: ...
    @property
    def segments(self) -> Sequence[Segment]:
        """Segments in order, their times in seconds; of none, one from start to end is made."""
        ...

    @property
    def language(self) -> str | None: ...
    @property
    def duration(self) -> float | None:
        """Seconds of audio."""
        ...


def write(transcript: Transcribed, path: str | Path, kind: str | None = None, style: SubtitleStyle = SENTENCES) -> None:
    """Write the transcript of one recording as `txt`, `srt`, `vtt`, `tsv` or `json`; by default the suffix decides.

    ``style`` lays out the cues of srt and vtt. Raises ConfigError for a format that is none of these, for a style that
    needs times of words where there are none, and where the file cannot be written.
    """
    path = Path(path)
    kind = kind or next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix.lower()), None)
    if kind not in ONE_RECORDING:
        asked = f"{kind} is no such format" if kind else f"the suffix is {path.suffix or 'missing'}"
        raise ConfigError(f"{path}: {asked}; a transcript is written as {', '.join(ONE_RECORDING)}")
    segments = _whole(transcript.text, transcript.segments, transcript.duration or 0.0)
    if kind in SUBTITLES and style.needs_words and any(not segment.words for segment in segments):
        raise ConfigError(f"{path}: these subtitles need the times of words: transcribe with timestamps='word'")
    segments = [_to_milliseconds(segment) for segment in segments]
    write_output(path, [render_segments(kind, transcript.text, segments, transcript.language, style)])


def _whole(text: str, segments: Sequence[Segment], duration: float, tokens: tuple[int, ...] = ()) -> Sequence[Segment]:
    """Return the segments; where there are none, one from start to end."""
    return segments if segments or not text else [Segment(0.0, duration, text, tokens)]


def segments_of(item: Item, transcription: Transcription) -> list[Segment]:
    """Return the transcription's segments, in seconds of the audio file, to the millisecond; without any, one from
    start to end."""
    utterance = item.utterance
    offset, duration = (utterance.offset or 0.0, utterance.duration) if utterance else (0.0, 0.0)
    segments = _whole(transcription.text, transcription.segments, duration, transcription.tokens)
    return [_to_milliseconds(segment.shifted(offset)) for segment in segments]


def _to_milliseconds(segment: Segment) -> Segment:
    words = tuple(replace(word, start=round(word.start, 3), end=round(word.end, 3)) for word in segment.words)
    return replace(segment, start=round(segment.start, 3), end=round(segment.end, 3), words=words)


def result_row(item: Item, transcription: Transcription, timed: bool = False) -> dict[str, Any]:
    """Return the item's own fields, then ``pred_text`` and, where it is to be ``timed``, ``segments`` in seconds of
    the audio file; or ``error``. ``lost_seconds`` and ``warnings`` are there where something is wrong with the audio.
    URLs are without their secrets."""
    ours = ("pred_text", "error", "segments", "lost_seconds", "warnings", "language_probability")
    row = {
        key: redacted(value) if isinstance(value, str) and key not in ("text", "answer") else value
        for key, value in item.row.items()
        if key not in ours
    }
    if transcription.error is not None:
        return row | {"error": transcription.error}
    row |= {"pred_text": transcription.text}
    row |= detected_language(transcription)
    if timed:
        row["segments"] = [_nemo_segment(segment) for segment in segments_of(item, transcription)]
    if transcription.lost_seconds:
        row["lost_seconds"] = transcription.lost_seconds
    if transcription.warnings:
        row["warnings"] = list(transcription.warnings)
    return row


def detected_language(transcription: Transcription) -> dict[str, Any]:
    """Return the language and its probability, where it was detected."""
    if transcription.language_probability is None:
        return {}
    return {
        "language": transcription.language,
        "language_probability": round(transcription.language_probability, 4),
    }


def _nemo_segment(segment: Segment) -> dict[str, Any]:
    value: dict[str, Any] = {"start": segment.start, "end": segment.end, "text": segment.text}
    if segment.words:
        value["words"] = [{"start": word.start, "end": word.end, "text": word.text.strip()} for word in segment.words]
    return value


def render_one(item: Item, transcription: Transcription, kind: str, style: SubtitleStyle = SENTENCES) -> str:
    """Return one utterance's file in any format but ``nemo``; ``style`` is that of srt and vtt."""
    segments = segments_of(item, transcription)
    language, probability = _language(item, transcription), transcription.language_probability
    return render_segments(kind, transcription.text, segments, language, style, probability)


def render(
    items: Sequence[Item],
    transcriptions: Sequence[Transcription],
    kind: str,
    timed: bool = False,
    style: SubtitleStyle = SENTENCES,
) -> Iterator[str]:
    """Yield all transcripts as one file, in parts: of several utterances ``txt`` has a line and ``json`` a list entry
    each, ``nemo`` has ``segments`` where it is to be ``timed``. Raises ConfigError for several in a format of one
    utterance alone."""
    pairs = list(zip(items, transcriptions))
    if kind == "nemo":
        yield from (_line(result_row(*pair, timed)) for pair in pairs)
    elif len(pairs) == 1:
        if pairs[0][1].error is None:
            yield render_one(*pairs[0], kind, style)
    elif kind == "txt":
        yield from (" ".join(transcription.text.split()) + "\n" for transcription in transcriptions)
    elif kind == "json":
        yield "["
        yield from (f"{',' if number else ''}\n{_entry(*pair)}" for number, pair in enumerate(pairs))
        yield "\n]\n"
    else:
        check_renderable(len(pairs), kind)


def check_renderable(utterances: int, kind: str) -> None:
    """ConfigError for more utterances than a file of that format can hold."""
    if utterances > 1 and kind not in ("nemo", "txt", "json"):
        raise ConfigError(
            f"--format {kind} holds one utterance a file, and there are {utterances}: name a folder as --output"
        )


def _entry(item: Item, transcription: Transcription) -> str:
    """An utterance among others in one JSON file: as Whisper's, and whose it is."""
    path = item.row.get("audio_filepath")
    value: dict[str, Any] = {"audio_filepath": redacted(path) if isinstance(path, str) else path}
    if transcription.error is not None:
        return json_text(value | {"error": transcription.error})
    segments = segments_of(item, transcription)
    value |= whisper_json(transcription.text, segments, _language(item, transcription))
    value |= detected_language(transcription) | {"language": value["language"]}
    return json_text(value)


def _language(item: Item, transcription: Transcription) -> str | None:
    utterance = item.utterance
    stated = (utterance.target_lang or utterance.lang) if utterance else None
    return transcription.language or stated


@dataclass(frozen=True)
class FolderOutput:
    """A folder with one file for each utterance and format."""

    path: Path
    names: Sequence[str]
    """File name of each utterance without the format's suffix; see `file_names`."""
    kinds: Sequence[str]
    style: SubtitleStyle = SENTENCES

    def files(self, index: int) -> list[tuple[str, Path]]:
        """Return formats and files of an utterance."""
        return [(kind, self.path / f"{self.names[index]}{SUFFIXES[kind]}") for kind in self.kinds]

    def write(self, index: int, item: Item, transcription: Transcription) -> None:
        """Write the files of an utterance; of one that failed none."""
        if transcription.error is None:
            for kind, path in self.files(index):
                write_output(path, [render_one(item, transcription, kind, self.style)])


def write_results(
    items: Sequence[Item],
    transcriptions: Sequence[Transcription],
    target: Path,
    kinds: Iterable[str],
    folder: bool,
    timed: bool = False,
    style: SubtitleStyle = SENTENCES,
    names: Sequence[str] | None = None,
) -> list[Path]:
    """Write to the file ``target``, or into the folder: ``transcripts.jsonl`` for ``nemo``, for the other formats one
    file an utterance, by its name in ``names`` or else after its audio. Return what was written, of the many files
    of a folder the folder.
    """
    kinds = list(kinds)
    if not folder:
        (kind,) = kinds
        if kind != "nemo" and all(transcription.error is not None for transcription in transcriptions):
            return []
        write_output(target, render(items, transcriptions, kind, timed, style))
        return [target]
    written: list[Path] = []
    if "nemo" in kinds:
        written.append(target / "transcripts.jsonl")
        write_output(written[-1], render(items, transcriptions, "nemo", timed))
    files = FolderOutput(target, names or file_names(items), [kind for kind in kinds if kind != "nemo"], style)
    for index, (item, transcription) in enumerate(zip(items, transcriptions)):
        files.write(index, item, transcription)
    return written or [target]


def file_names(items: Sequence[Item], roots: Sequence[str | Path] = ()) -> list[str]:
    """Return a file name for each item: its audio's without the suffix, below the folder that it has among ``roots``.

    Audio files that differ in the suffix alone keep it (``a.mp4.srt`` and ``a.mkv.srt``); of several items with the
    same audio, all but the first get numbers.
    """
    paths = [_below(_name_of(item), roots) for item in items]
    files: dict[Path, set[Path]] = {}
    for path in paths:
        files.setdefault(path.with_suffix(""), set()).add(path)
    stems = [str(path if len(files[path.with_suffix("")]) > 1 else path.with_suffix("")) for path in paths]
    taken, seen = set(stems), Counter[str]()
    names: list[str] = []
    for stem in stems:
        seen[stem] += 1
        name = stem
        while name != stem or seen[stem] > 1:
            name = f"{stem}-{seen[stem]}"
            if name not in taken:
                break
            seen[stem] += 1
        taken.add(name)
        names.append(name)
    return names


def _name_of(item: Item) -> str:
    """Return the path of a file on disk, the path of a URL without its query, or the name of a member."""
    path = str(item.row.get("audio_filepath") or "row").rpartition("::")[2]
    if path == STANDARD_INPUT:
        return "stdin"
    return urlsplit(redacted(path)).path if "://" in path else path


def _below(path: str, roots: Sequence[str | Path]) -> Path:
    """Return the path from the first root that holds it, else the name alone."""
    root = next((root for root in roots if Path(path).is_relative_to(root)), None)
    return Path(path).relative_to(root) if root else Path(Path(path).name or "row")


def _line(row: Mapping[str, Any]) -> str:
    return json_text(row) + "\n"


def write_output(path: Path, pieces: Iterable[str]) -> None:
    """Write a file, whole or not at all. Raises ConfigError where it cannot be written."""
    try:
        write_text(path, pieces)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --output") from None
