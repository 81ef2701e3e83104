"""Segments as text in the formats of the Whisper command line, byte for byte as openai-whisper writes them."""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from canter.inference.segments import Segment

SUFFIXES = {"nemo": ".jsonl", "txt": ".txt", "srt": ".srt", "vtt": ".vtt", "tsv": ".tsv", "json": ".json"}
FORMATS = tuple(SUFFIXES)
TIMED = ("srt", "vtt", "tsv")  # of no use without times


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


def srt(segments: Iterable[Segment]) -> str:
    return "".join(
        f"{number}\n{timestamp(start, hours=True, comma=True)} --> "
        f"{timestamp(end, hours=True, comma=True)}\n{text}\n\n"
        for number, (start, end, text) in enumerate(map(_cue, segments), 1)
    )


def vtt(segments: Iterable[Segment]) -> str:
    return "WEBVTT\n\n" + "".join(
        f"{timestamp(start, hours=False)} --> {timestamp(end, hours=False)}\n{text}\n\n"
        for start, end, text in map(_cue, segments)
    )


def tsv(segments: Iterable[Segment]) -> str:
    return "start\tend\ttext\n" + "".join(
        f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t"
        + segment.text.strip().replace("\t", " ")
        + "\n"
        for segment in segments
    )


def _cue(segment: Segment) -> tuple[float, float, str]:
    """Start, end and text of a subtitle: from the first word to the last, where the words have times."""
    start, end = segment.start, segment.end
    if segment.words:
        start, end = segment.words[0].start, segment.words[-1].end
    return start, end, segment.text.strip().replace("-->", "->")


def whisper_json(text: str, segments: Sequence[Segment], language: str | None) -> dict[str, Any]:
    """The object that Whisper writes, and the OpenAI API calls ``verbose_json``. Its segments' texts join to the
    whole, its words' to their segment's; ``seek`` is where the segment itself starts, in frames of 10 ms."""
    return {"text": text, "segments": [*_whisper_segments(text, segments)], "language": language}


def _whisper_segments(text: str, segments: Sequence[Segment]) -> Iterator[dict[str, Any]]:
    for number, (segment, spaced) in enumerate(zip(segments, _spaced(text, [one.text for one in segments]))):
        value: dict[str, Any] = {
            "id": number,
            "seek": round(segment.start * 100),
            "start": segment.start,
            "end": segment.end,
            "text": spaced,
            "tokens": [*segment.tokens],
            "temperature": segment.temperature,
            "avg_logprob": segment.avg_logprob,
            "compression_ratio": compression_ratio(segment.text),
            "no_speech_prob": segment.no_speech_prob,
        }
        if segment.words:
            parts = _spaced(spaced, [word.text for word in segment.words])
            value["words"] = [
                {"word": part, "start": word.start, "end": word.end, "probability": word.probability}
                for part, word in zip(parts, segment.words)
            ]
        yield value


def _spaced(text: str, parts: Sequence[str]) -> list[str]:
    """The parts of ``text``, each with the white space that stands before it there; with a space before it,
    but for the first, where it does not occur."""
    found: list[str] = []
    place = 0
    for number, part in enumerate(map(str.strip, parts)):
        start = text.find(part, place)
        if start < 0 or text[place:start].strip():
            found.append(f" {part}" if number else part)
            continue
        found.append(text[place : start + len(part)])
        place = start + len(part)
    return found


def compression_ratio(text: str) -> float:
    """Bytes of the text for each byte of it compressed, as Whisper's: over 2.4 it repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def render_segments(kind: str, text: str, segments: Sequence[Segment], language: str | None) -> str:
    """A file of any format but ``nemo``."""
    if kind == "json":
        return json.dumps(whisper_json(text, segments, language))
    return {"txt": txt, "srt": srt, "vtt": vtt, "tsv": tsv}[kind](segments)
