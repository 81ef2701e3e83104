"""Transcripts as text and as files, in the formats of the Whisper command line and of NeMo.

Whisper's formats hold one recording a file, byte for byte as openai-whisper writes them. ``nemo`` is the manifest, in
its order, with ``pred_text`` added to every row, or ``error`` to one that could not be transcribed.
"""

import html
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from canter.corpus.audio import STANDARD_INPUT
from canter.errors import ConfigError
from canter.files import write_text
from canter.inference.inputs import Item
from canter.inference.recording import Transcription
from canter.inference.transcript.reading import compression_ratio
from canter.inference.transcript.segments import Alternatives, Segment, TokenScore, spaced
from canter.inference.transcript.subtitles import SENTENCES, WHISPER, Cue, SubtitleStyle, cues_of
from canter.redaction import redacted

SUFFIXES = {"nemo": ".jsonl", "txt": ".txt", "srt": ".srt", "vtt": ".vtt", "tsv": ".tsv", "json": ".json"}
FORMATS = tuple(SUFFIXES)
SUBTITLES = ("srt", "vtt")
SHOWN_LANGUAGES = 3  # most probable languages in a line of text


def timestamp(seconds: float, *, hours: bool, comma: bool = False) -> str:
    """Return ``01:02:03.045``; without ``hours``, zero hours are omitted."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    full_hours, minutes = divmod(minutes, 60)
    front = f"{full_hours:02d}:" if hours or full_hours else ""
    mark = "," if comma else "."
    return f"{front}{minutes:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def labelled(segment: Segment) -> str:
    """Return the text of a segment, after its channel if it has one, as in ``[channel 0] Hello``."""
    return f"{_label(segment.channel)}{segment.text.strip()}"


def _label(channel: int | None) -> str:
    return "" if channel is None else f"[channel {channel}] "


def txt(segments: Iterable[Segment]) -> str:
    return "".join(f"{labelled(segment)}\n" for segment in segments)


def srt(segments: Sequence[Segment], style: SubtitleStyle = WHISPER) -> str:
    return "".join(
        f"{number}\n{timestamp(cue.start, hours=True, comma=True)} --> "
        f"{timestamp(cue.end, hours=True, comma=True)}\n{_label(cue.channel)}{_text(cue, _without_arrow)}\n\n"
        for number, cue in enumerate(cues_of(segments, style), 1)
    )


def vtt(segments: Sequence[Segment], style: SubtitleStyle = WHISPER) -> str:
    """Return WebVTT; ``&``, ``<`` and ``>`` of the text are escaped. A channel is a voice, as in
    ``<v Channel 0>Hello``."""
    return "WEBVTT\n\n" + "".join(
        f"{timestamp(cue.start, hours=False)} --> {timestamp(cue.end, hours=False)}\n"
        f"{_voice(cue.channel)}{_text(cue, partial(html.escape, quote=False))}\n\n"
        for cue in cues_of(segments, style)
    )


def _voice(channel: int | None) -> str:
    return "" if channel is None else f"<v Channel {channel}>"


def _text(cue: Cue, escape: Callable[[str], str]) -> str:
    """Return the lines of a cue, without blank lines, which would end it."""
    if cue.underlined is None:
        text = escape("".join(cue.words))
    else:
        words = [escape(word) for word in cue.words]
        marked = words[cue.underlined].lstrip()
        before = words[cue.underlined].removesuffix(marked)
        words[cue.underlined] = f"{before}<u>{marked}</u>"
        text = "".join(words)
    return "\n".join(line for line in text.strip().splitlines() if line.strip())


def _without_arrow(text: str) -> str:
    return text.replace("-->", "->")


def tsv(segments: Iterable[Segment]) -> str:
    return "start\tend\ttext\n" + "".join(
        f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t" + labelled(segment).replace("\t", " ") + "\n"
        for segment in segments
    )


def whisper_json(text: str, segments: Sequence[Segment], language: str | None) -> dict[str, object]:
    """Return the object of Whisper's JSON files, and of ``verbose_json`` in the OpenAI API.

    The texts of the segments join to ``text``. As in Whisper's files, every word begins with a space where its script
    has spaces, and ``seek`` is the start of the segment in frames of 10 ms. Where each channel is transcribed by
    itself, segments have a ``channel``.
    """
    return {"text": text, "segments": [*_whisper_segments(text, segments)], "language": language}


def _whisper_segments(text: str, segments: Sequence[Segment]) -> Iterator[dict[str, object]]:
    texts = spaced(text, [segment.text for segment in segments])
    texts[:1] = [one if text[:1].isspace() else one.lstrip() for one in texts[:1]]
    for number, (segment, shown) in enumerate(zip(segments, texts)):
        value: dict[str, object] = {
            "id": number,
            "seek": round(segment.start * 100),
            "start": segment.start,
            "end": segment.end,
            "text": shown,
            "tokens": [*segment.tokens],
            "temperature": segment.temperature,
            "avg_logprob": segment.avg_logprob,
            "compression_ratio": compression_ratio(segment.text),
            "no_speech_prob": segment.no_speech_prob,
        }
        if segment.channel is not None:
            value["channel"] = segment.channel
        if segment.words:
            parts = spaced(shown, [word.text for word in segment.words])
            value["words"] = [
                {"word": part, "start": word.start, "end": word.end, "probability": word.probability}
                | ({"confidence": word.confidence} if segment.token_scores else {})
                for part, word in zip(parts, segment.words)
            ]
        if segment.token_scores:
            value["logprobs"] = logprobs_json(segment.token_scores)
        yield value


def logprobs_json(scores: Iterable[TokenScore]) -> list[dict[str, object]]:
    """Return tokens with their log probabilities as OpenAI's API writes them."""
    return [{"token": one.text, "logprob": round(one.logprob, 5), "bytes": [*one.text.encode()]} for one in scores]


def nbest_json(nbest: Iterable[Alternatives]) -> list[dict[str, object]]:
    """Return the most probable texts of each chunk, for JSON and NeMo's rows."""
    found: list[dict[str, object]] = []
    for one in nbest:
        hypotheses = [{"text": text, "logprob": round(logprob, 4)} for text, logprob in one.hypotheses]
        chunk: dict[str, object] = {"start": round(one.start, 3), "end": round(one.end, 3), "hypotheses": hypotheses}
        found.append(chunk if one.channel is None else chunk | {"channel": one.channel})
    return found


def finite(value: object) -> object:
    """Return a value for JSON, with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def json_text(value: object, indent: int | None = None) -> str:
    """Return the value as JSON in UTF-8, or in ASCII where it contains a file name that is not valid UTF-8. Numbers
    that are not finite become null."""
    value = finite(value)
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False)
    return text


def render_segments(
    kind: str,
    text: str,
    segments: Sequence[Segment],
    language: str | None,
    style: SubtitleStyle = WHISPER,
    more: Mapping[str, object] | None = None,
) -> str:
    """Return the contents of a file in any format but ``nemo``. ``style`` lays out srt and vtt; ``more`` is added to
    json."""
    if kind == "json":
        value = whisper_json(text, segments, language) | dict(more or {})
        return json.dumps(finite(value), allow_nan=False)
    if kind in ("srt", "vtt"):
        return {"srt": srt, "vtt": vtt}[kind](segments, style)
    return {"txt": txt, "tsv": tsv}[kind](segments)


# Items of the user and their transcriptions.


def file_segments(item: Item, transcription: Transcription) -> list[Segment]:
    """Return the transcription's segments in seconds of the audio file, rounded to milliseconds; without any, one from
    start to end."""
    utterance, segments = item.utterance, transcription.segments
    offset, duration = (utterance.offset or 0.0, utterance.duration) if utterance else (0.0, 0.0)
    if not segments and transcription.text:
        segments = (Segment(0.0, duration, transcription.text, transcription.tokens),)
    return [_to_milliseconds(segment.shifted(offset)) for segment in segments]


def _to_milliseconds(segment: Segment) -> Segment:
    words = tuple(replace(word, start=round(word.start, 3), end=round(word.end, 3)) for word in segment.words)
    return replace(segment, start=round(segment.start, 3), end=round(segment.end, 3), words=words)


def result_row(item: Item, transcription: Transcription, timed: bool = False) -> dict[str, object]:
    """Return the item's own fields, then ``pred_text`` and, if ``timed`` or of several
    channels, ``segments`` in seconds of the audio file; or
    ``error``. Faulty audio adds ``lost_seconds`` and ``warnings``. Secrets in URLs are removed.

    A given text that was aligned has a ``score`` in place of ``pred_text``, and probabilities of its words.
    """
    ours = ("error", "segments", "lost_seconds", "warnings", "language_probability", "logprobs", "nbest")
    ours += ("pred_text",) if transcription.score is None else ("score",)
    row = {
        key: redacted(value) if isinstance(value, str) and key not in ("text", "answer") else value
        for key, value in item.row.items()
        if key not in ours
    }
    if transcription.error is not None:
        return row | {"error": transcription.error}
    if transcription.score is None:
        row |= {"pred_text": transcription.text}
    row |= _language_fields(transcription)
    if timed or any(segment.channel is not None for segment in transcription.segments):
        given = transcription.score is not None
        row["segments"] = [_nemo_segment(segment, given) for segment in file_segments(item, transcription)]
    if transcription.score is not None:
        row["score"] = round(transcription.score, 4)
    scores = [score for segment in transcription.segments for score in segment.token_scores]
    if scores:
        row["logprobs"] = logprobs_json(scores)
    row |= _nbest_fields(item, transcription)
    if transcription.lost_seconds:
        row["lost_seconds"] = transcription.lost_seconds
    if transcription.warnings:
        row["warnings"] = list(transcription.warnings)
    return row


def _nbest_fields(item: Item, transcription: Transcription) -> dict[str, object]:
    offset = (item.utterance.offset or 0.0) if item.utterance else 0.0
    nbest = [replace(one, start=one.start + offset, end=one.end + offset) for one in transcription.nbest]
    return {"nbest": nbest_json(nbest)} if nbest else {}


def _language_fields(transcription: Transcription) -> dict[str, object]:
    if transcription.language_probability is None:
        return {}
    return {"language": transcription.language, "language_probability": round(transcription.language_probability, 4)}


def _nemo_segment(segment: Segment, given: bool) -> dict[str, object]:
    """Return a segment of a row; the words of a ``given`` text have probabilities, of a transcript confidences."""
    value: dict[str, object] = {"start": segment.start, "end": segment.end, "text": segment.text}
    if segment.channel is not None:
        value["channel"] = segment.channel
    words: list[dict[str, object]] = []
    for word in segment.words:
        one: dict[str, object] = {"start": word.start, "end": word.end, "text": word.text.strip()}
        if given:
            one["probability"] = round(word.probability, 4)
        elif word.confidence is not None:
            one["confidence"] = round(word.confidence, 4)
        words.append(one)
    return value | ({"words": words} if words else {})


def render_one(item: Item, transcription: Transcription, kind: str, style: SubtitleStyle = SENTENCES) -> str:
    """Return the contents of one utterance's file in any format but ``nemo``; ``style`` lays out srt and vtt."""
    segments = file_segments(item, transcription)
    probability = transcription.language_probability
    more = {} if probability is None else {"language_probability": round(probability, 4)}
    more |= _nbest_fields(item, transcription)
    return render_segments(kind, transcription.text, segments, _language(item, transcription), style, more)


def render(
    items: Sequence[Item],
    transcriptions: Sequence[Transcription],
    kind: str,
    timed: bool = False,
    style: SubtitleStyle = SENTENCES,
) -> Iterator[str]:
    """Yield the parts of a file with all transcripts. For several utterances, ``txt`` has a line and ``json`` a list
    entry each; ``nemo`` has ``segments`` if ``timed``.

    Raises ConfigError for several utterances in a format for one.
    """
    pairs = list(zip(items, transcriptions))
    if kind == "nemo":
        yield from (json_text(result_row(*pair, timed)) + "\n" for pair in pairs)
    elif len(pairs) == 1:
        if pairs[0][1].error is None:
            yield render_one(*pairs[0], kind, style)
    elif kind == "txt":
        yield from (_line(transcription) + "\n" for transcription in transcriptions)
    elif kind == "json":
        yield "["
        yield from (f"{',' if number else ''}\n{_entry(*pair)}" for number, pair in enumerate(pairs))
        yield "\n]\n"
    else:
        check_renderable(len(pairs), kind)


def _line(transcription: Transcription) -> str:
    """Return the text in one line, with the channel before each segment that has one."""
    if any(segment.channel is not None for segment in transcription.segments):
        return " ".join(" ".join(map(labelled, transcription.segments)).split())
    return " ".join(transcription.text.split())


def render_languages(items: Sequence[Item], transcriptions: Sequence[Transcription], kind: str) -> Iterator[str]:
    """Yield the parts of a file with the detected languages of all recordings: a line each for ``txt``, with the most
    probable ones, and for ``nemo``, or an object (of several recordings a list) for ``json``."""
    pairs = list(zip(items, transcriptions))
    if kind == "txt":
        for item, found in pairs:
            likely = found.language_probabilities[:SHOWN_LANGUAGES]
            shown = ", ".join(f"{code} {probability:.3f}" for code, probability in likely)
            yield f"{item.path}: {found.error or shown or 'no speech'}\n"
        return
    rows = [_languages_row(*pair) for pair in pairs]
    if kind == "nemo":
        yield from (json_text(row) + "\n" for row in rows)
    else:
        yield json_text(rows[0] if len(rows) == 1 else rows, indent=2) + "\n"


def _languages_row(item: Item, transcription: Transcription) -> dict[str, object]:
    row = result_row(item, transcription)
    row.pop("pred_text", None)
    if transcription.error is None:
        every = {code: round(probability, 6) for code, probability in transcription.language_probabilities}
        row |= {"language": transcription.language, "language_probability": None} | _language_fields(transcription)
        row["language_probabilities"] = every
    return row


def check_renderable(utterances: int, kind: str) -> None:
    """Raise ConfigError for more utterances than a file of that format can hold."""
    if utterances > 1 and kind not in ("nemo", "txt", "json"):
        raise ConfigError(
            f"--format {kind} holds one utterance a file, and there are {utterances}: name a folder as --output"
        )


def _entry(item: Item, transcription: Transcription) -> str:
    """Return the entry of an utterance in a JSON file with several: Whisper's object and the file's name."""
    value: dict[str, object] = {"audio_filepath": item.path}
    if transcription.error is not None:
        return json_text(value | {"error": transcription.error})
    segments = file_segments(item, transcription)
    value |= whisper_json(transcription.text, segments, _language(item, transcription))
    value |= _language_fields(transcription) | {"language": value["language"]} | _nbest_fields(item, transcription)
    return json_text(value)


def _language(item: Item, transcription: Transcription) -> str | None:
    utterance = item.utterance
    stated = (utterance.target_lang or utterance.lang) if utterance else None
    return transcription.language or stated


@dataclass(frozen=True)
class FolderOutput:
    """Folder with ``transcripts.jsonl`` for the format ``nemo``, and one file per utterance for each other format."""

    path: Path
    names: Sequence[str]
    """File name of each utterance without suffix; see `file_names`."""
    kinds: Sequence[str]
    style: SubtitleStyle = SENTENCES
    timed: bool = False

    def files(self, index: int) -> list[tuple[str, Path]]:
        """Return the formats and files of an utterance."""
        return [(kind, self.path / f"{self.names[index]}{SUFFIXES[kind]}") for kind in self.kinds if kind != "nemo"]

    def write(self, index: int, item: Item, transcription: Transcription) -> None:
        """Write the files of an utterance, unless it failed."""
        if transcription.error is None:
            for kind, path in self.files(index):
                write_output(path, [render_one(item, transcription, kind, self.style)])

    def write_all(self, items: Sequence[Item], transcriptions: Sequence[Transcription]) -> Path:
        """Write all files, and return the path of the rows in NeMo's format, or of the folder."""
        for index, (item, transcription) in enumerate(zip(items, transcriptions)):
            self.write(index, item, transcription)
        if "nemo" not in self.kinds:
            return self.path
        write_output(rows := self.path / "transcripts.jsonl", render(items, transcriptions, "nemo", self.timed))
        return rows


def file_names(items: Sequence[Item], roots: Sequence[str | Path] = ()) -> list[str]:
    """Return a file name for each item: that of its audio, without suffix, relative to the one of ``roots`` that holds
    it.

    Audio files that differ only in the suffix keep it (``a.mp4.srt`` and ``a.mkv.srt``). Among several items with the
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
    """Return the path of a file, the path of a URL without its query, or the name of an archive member."""
    path = str(item.row.get("audio_filepath") or "row").rpartition("::")[2]
    if path == STANDARD_INPUT:
        return "stdin"
    return urlsplit(redacted(path)).path if "://" in path else path


def _below(path: str, roots: Sequence[str | Path]) -> Path:
    """Return the path relative to the first root that holds it, else the name only."""
    root = next((root for root in roots if Path(path).is_relative_to(root)), None)
    return Path(path).relative_to(root) if root else Path(Path(path).name or "row")


def write_output(path: Path, pieces: Iterable[str]) -> None:
    """Write a file atomically. Raises ConfigError where it cannot be written."""
    try:
        write_text(path, pieces)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --output") from None
