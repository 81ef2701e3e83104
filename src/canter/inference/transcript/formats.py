"""Segments as text in the formats of the Whisper command line, byte for byte as openai-whisper writes them."""

import html
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from canter.inference.transcript.segments import Segment, spaced
from canter.inference.transcript.subtitles import WHISPER, Cue, SubtitleStyle, cues_of

SUFFIXES = {"nemo": ".jsonl", "txt": ".txt", "srt": ".srt", "vtt": ".vtt", "tsv": ".tsv", "json": ".json"}
FORMATS = tuple(SUFFIXES)
ONE_RECORDING = tuple(kind for kind in SUFFIXES if kind != "nemo")
SUBTITLES = ("srt", "vtt")


def timestamp(seconds: float, *, hours: bool, comma: bool = False) -> str:
    """``01:02:03.045``; where ``hours`` is not asked for they are left out as long as there are none."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    whole, minutes = divmod(minutes, 60)
    front = f"{whole:02d}:" if hours or whole else ""
    mark = "," if comma else "."
    return f"{front}{minutes:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def txt(segments: Iterable[Segment]) -> str:
    return "".join(f"{segment.text.strip()}\n" for segment in segments)


def srt(segments: Sequence[Segment], style: SubtitleStyle = WHISPER) -> str:
    return "".join(
        f"{number}\n{timestamp(cue.start, hours=True, comma=True)} --> "
        f"{timestamp(cue.end, hours=True, comma=True)}\n{_text(cue, _without_arrow)}\n\n"
        for number, cue in enumerate(cues_of(segments, style), 1)
    )


def vtt(segments: Sequence[Segment], style: SubtitleStyle = WHISPER) -> str:
    """Return WebVTT; ``&``, ``<`` and ``>`` of the text are escaped."""
    return "WEBVTT\n\n" + "".join(
        f"{timestamp(cue.start, hours=False)} --> {timestamp(cue.end, hours=False)}\n"
        f"{_text(cue, partial(html.escape, quote=False))}\n\n"
        for cue in cues_of(segments, style)
    )


def _text(cue: Cue, escape: Callable[[str], str]) -> str:
    """Return the cue's lines, without blank ones, which would end it."""
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
        f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t" + segment.text.strip().replace("\t", " ") + "\n"
        for segment in segments
    )


def whisper_json(text: str, segments: Sequence[Segment], language: str | None) -> dict[str, Any]:
    """Return the object that Whisper writes, and the OpenAI API calls ``verbose_json``.

    Its segments' texts join to the whole. As in Whisper's, every word begins with a space where its script has
    spaces. ``seek`` is the start of the segment in frames of 10 ms.
    """
    return {"text": text, "segments": [*_whisper_segments(text, segments)], "language": language}


def _whisper_segments(text: str, segments: Sequence[Segment]) -> Iterator[dict[str, Any]]:
    texts = spaced(text, [segment.text for segment in segments])
    texts[:1] = [one if text[:1].isspace() else one.lstrip() for one in texts[:1]]
    for number, (segment, whole) in enumerate(zip(segments, texts)):
        value: dict[str, Any] = {
            "id": number,
            "seek": round(segment.start * 100),
            "start": segment.start,
            "end": segment.end,
            "text": whole,
            "tokens": [*segment.tokens],
            "temperature": segment.temperature,
            "avg_logprob": segment.avg_logprob,
            "compression_ratio": compression_ratio(segment.text),
            "no_speech_prob": segment.no_speech_prob,
        }
        if segment.words:
            parts = spaced(whole, [word.text for word in segment.words])
            value["words"] = [
                {"word": part, "start": word.start, "end": word.end, "probability": word.probability}
                for part, word in zip(parts, segment.words)
            ]
        yield value


def compression_ratio(text: str) -> float:
    """Bytes of the text for each byte of it compressed, as Whisper's: over 2.4 it repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def finite(value: Any) -> Any:
    """Return a value for JSON with null in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """Return the value as JSON in its own letters; as ASCII where something in it, a file's name that is no UTF-8,
    could not be written otherwise. Numbers that are not finite become null."""
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
    probability: float | None = None,
) -> str:
    """Return the file in any format but ``nemo``; ``style`` is that of srt and vtt, ``probability`` that of a language
    that was detected, which json has."""
    if kind == "json":
        value = whisper_json(text, segments, language)
        if probability is not None:
            value["language_probability"] = round(probability, 4)
        return json.dumps(finite(value), allow_nan=False)
    if kind in ("srt", "vtt"):
        return {"srt": srt, "vtt": vtt}[kind](segments, style)
    return {"txt": txt, "tsv": tsv}[kind](segments)
