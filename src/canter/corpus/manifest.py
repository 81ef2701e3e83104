"""Manifests: NeMo JSONL in, validated utterances out, and NeMo JSONL out again.

The fields of a row are in docs/corpus.md. Beside NeMo's, Canter reads ``num_tokens`` (length of the target, prompt and
end token included), ``id`` and ``channel_selector`` (the number of a channel).
"""

import gzip
import itertools
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import BinaryIO, TypeVar, cast

from canter.corpus.columns import DEFAULT_OPTIONS, ReadOptions
from canter.corpus.remote import NO_URLS, below, folder_of, is_url, open_binary, refuse_special, urls_forbidden
from canter.corpus.utterance import DUPLICATE, OPTIONAL_TEXT, NumberedRows, Problem, Rows, Utterance
from canter.errors import ManifestError
from canter.files import write_text

Parsed = TypeVar("Parsed")
TRANSLATION = ("ast", "s2t_translation", "translate")  # values of taskname
NO_ANSWER = ("", "na")  # what Canary's manifests hold for audio to be transcribed
LONGEST_SECONDS = 1e6  # a larger duration is in milliseconds or samples, not in seconds
_SUFFIX = re.compile(r"-sub\d+(?=(\.\w+)?$)")


def utterance_from_row(
    row: object, base: str | os.PathLike[str], options: ReadOptions = DEFAULT_OPTIONS
) -> Utterance | str | None:
    """Return the utterance in one manifest row, the reason why it cannot be used, or None where ``_skipme`` is set.

    Relative paths are relative to the folder ``base``. A row without ``audio_filepath`` is not NeMo's: other customary
    keys are read, and its duration may be missing. Never raises for anything a row can hold.
    """
    if not isinstance(row, dict):
        return f"not a JSON object: {shown(row)}"
    if row.get("_skipme"):
        return None
    columns = options.columns
    path = row.get(columns.audio or "audio_filepath")
    if path is None:
        path = columns.of(row, "audio")
    if path is None:
        return f"{columns.audio or 'audio_filepath'} missing"
    if isinstance(path, dict) and isinstance(path.get("path"), str):
        path = path["path"]  # the Audio feature of datasets, written as JSON
    if not isinstance(path, str):
        return f"audio_filepath is not a string: {shown(path)}"
    if not path or "\0" in path:
        return f"audio_filepath is not a path: {shown(path)}"
    path = below(base, path)
    if is_url(path) and urls_forbidden():
        return f"URLs are forbidden ({NO_URLS}): {shown(path)}"

    offset = row.get("offset")
    offset = _seconds(offset, "offset") if offset is not None else None
    if isinstance(offset, str):
        return offset
    duration = row.get("duration")
    if duration is None and (options.measure_durations or "audio_filepath" not in row):
        duration = _measure(path, offset or 0.0)
        if isinstance(duration, str):
            return duration
    duration = _seconds(duration, "duration")
    if isinstance(duration, str):
        return duration
    if duration == 0:
        return "duration is zero"

    text = row.get(columns.text or "text")
    if text is None:
        text = columns.of(row, "text")
    answer = row.get("answer")
    if isinstance(answer, str) and answer not in NO_ANSWER and (text is None or _is_translation(row)):
        text = answer  # in Canary's manifests `text` is the transcript, and `answer` the target
    if text is None and not options.require_text:
        text = ""
    if text is None:
        return f"{columns.text} missing" if columns.text else "text missing"
    if not isinstance(text, str):
        return f"text is not a string: {shown(text)}"
    if options.require_text and not text.strip():
        return "text is empty"

    num_tokens = row.get("num_tokens")
    if num_tokens is not None and (type(num_tokens) is not int or not 0 < num_tokens < 2**31):
        return f"num_tokens is not a positive whole number: {shown(num_tokens)}"
    name = row.get("id")
    if type(name) is int:
        name = str(name)
    if name is not None and not isinstance(name, str):
        return f"id is not a string: {shown(name)}"
    channel = row.get("channel_selector")
    if channel == "average":
        channel = None
    if channel is not None and (type(channel) is not int or not 0 <= channel < 2**15):
        return f"channel_selector is not the number of one channel: {shown(channel)}"
    extra = {field: row[field] for field in OPTIONAL_TEXT if field in row}
    if columns.lang or "lang" not in extra:
        lang = columns.of(row, "lang")
        extra["lang"] = lang if columns.lang or isinstance(lang, str) else None
    for field, value in extra.items():
        if isinstance(value, bool):  # "pnc": true
            extra[field] = "yes" if value else "no"
        elif value is not None and not isinstance(value, str):
            return f"{field} is not a string: {shown(value)}"
    for value in (path, text, name, *extra.values()):
        if value and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return f"half a surrogate pair, which is no character: {shown(value)}"
    return Utterance(path, duration, text, offset, num_tokens=num_tokens, id=name, channel_selector=channel, **extra)


def _is_translation(row: Mapping[str, object]) -> bool:
    task, source, target = (row.get(name) for name in ("taskname", "source_lang", "target_lang"))
    return task in TRANSLATION if task is not None else None not in (source, target) and source != target


def _seconds(value: object, name: str) -> float | str:
    if value is None:
        return f"{name} missing: give it in seconds, or let --measure-durations read it from the audio's header"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name} is not a number: {shown(value)}"
    if value != value or abs(value) == math.inf:
        return f"{name} is not finite: {value}"
    if value < 0:
        return f"{name} is negative: {shown(value)}"
    if value > LONGEST_SECONDS:
        return f"{name} is too large for seconds: {shown(value)}; is it in milliseconds or samples?"
    return float(value)


def _measure(path: str, offset: float) -> float | str:
    from canter.corpus.audio import audio_seconds  # and libsndfile, which few manifests need
    from canter.errors import AudioError

    try:
        return max(0.0, audio_seconds(path) - offset)
    except AudioError as error:
        return f"audio cannot be read: {error}"


def shown(value: object) -> str:
    """Return a value as a message shows it: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = "a very long value"
    return text if len(text) <= 60 else text[:57] + "..."


def parse_line(line: bytes) -> object:
    """Return the JSON value in a line; for a line without one, a str that starts with "invalid" and states why."""
    try:
        value = json.loads(line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8"))
    except UnicodeDecodeError as error:
        return f"invalid UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
    except json.JSONDecodeError as error:
        return f"invalid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"invalid JSON: {str(error)[:80]}"
    return value if not isinstance(value, str) else f"invalid row: a bare string {shown(value)}"


def utterance_from_line(
    line: bytes, base: str | os.PathLike[str], options: ReadOptions = DEFAULT_OPTIONS
) -> Utterance | str | None:
    """Parse a line of JSON and return `utterance_from_row` of it."""
    row = parse_line(line)
    return row if isinstance(row, str) else utterance_from_row(row, base, options)


def scan_lines(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Yield ``(byte offset, line number, line)`` of the lines, blank ones too, that begin in bytes ``[start, end)``.

    ``start`` must be the first byte of a line; line numbers count from 1 there.
    """
    place = start
    if start:
        file.seek(start)
    for number, line in enumerate(file, 1):
        if end is not None and place >= end:
            return
        yield place, number, line
        place += len(line)


def open_manifest(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a manifest, gzip or not. Raises ManifestError where it is missing, a folder or unreadable."""
    path = os.fspath(path)
    try:
        if os.path.isdir(path):
            raise ManifestError(f"{path} is a folder, not a manifest")
        if not path.endswith(".gz"):
            return open_binary(path)
        if is_url(path):
            return cast(BinaryIO, gzip.open(open_binary(path), "rb"))
        refuse_special(path)
        return cast(BinaryIO, gzip.open(path, "rb"))
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json_lines(
    path: str | os.PathLike[str], parse: Callable[[bytes], Parsed]
) -> Iterator[tuple[int, Parsed | str]]:
    """Yield the number of every line of a JSONL file, gzip or not, and what ``parse`` returns for it.

    A torn gzip is a row that cannot be used.
    """
    number = 0
    with open_manifest(path) as file:
        try:
            for _, number, line in scan_lines(file):
                if line.strip():
                    yield number, parse(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield number + 1, f"invalid gzip: {error}"


def read_nemo(path: str | os.PathLike[str], options: ReadOptions) -> NumberedRows:
    """Yield the rows of a NeMo manifest, ``.gz`` or not, with their line numbers."""
    base = folder_of(path)
    return read_json_lines(path, lambda line: utterance_from_line(line, base, options))


def read_manifest(path: str | os.PathLike[str], *, require_text: bool = True, measure_durations: bool = False) -> Rows:
    """Yield the utterances of a NeMo JSONL manifest (``.gz`` too), and a `Problem` for each row that cannot be used.

    ``require_text=False`` accepts rows without a text, to be transcribed; ``measure_durations`` reads a missing
    ``duration`` from the header of the audio. Raises ManifestError at the end where there was no usable row, with the
    first problems.
    """
    found = read_nemo(path, ReadOptions(require_text, measure_durations))
    return (row for _, row in checked_rows(found, os.fspath(path)))


def checked_rows(found: NumberedRows, name: str) -> Iterator[tuple[int, Utterance | Problem]]:
    """Yield the rows of a reader, with reasons and repeated utterances turned into Problems of the file ``name``.

    Raises ManifestError at the end where there was no utterance.
    """
    seen: set[int] = set()
    problems: list[Problem] = []
    for number, row in found:
        if isinstance(row, Utterance):
            identity = row.identity
            if identity in seen:
                row = DUPLICATE
            else:
                seen.add(identity)
        if isinstance(row, str):
            row = Problem(name, number, row)
        if row is None:
            continue
        if isinstance(row, Problem) and len(problems) < 3:
            problems.append(row)
        yield number, row
    if not seen:
        raise no_usable_row(name, problems)


def no_usable_row(name: str, problems: Iterable[Problem]) -> ManifestError:
    """Return the error for a source without a usable row: its first problems, or that it is empty."""
    shown_first = list(itertools.islice(problems, 3))
    if len(shown_first) == 1 and shown_first[0].line == 0:  # the reader's own error, which names the file
        return ManifestError(shown_first[0].reason.removeprefix("unusable: "))
    first = [f"\n  {problem}" for problem in shown_first]
    return ManifestError(f"{name} has no usable row" + (":" + "".join(first) if first else "; it is empty"))


def count_problems(problems: Iterable[Problem]) -> dict[str, int]:
    """Return the number of problems of each kind, the most frequent first."""
    return dict(Counter(problem.kind for problem in problems).most_common())


def row_from_utterance(utterance: Utterance) -> dict[str, object]:
    """Return the manifest row of an utterance, without the fields that are None."""
    return {key: value for key, value in asdict(utterance).items() if value is not None}


def write_manifest(path: str | os.PathLike[str], rows: Iterable[Mapping[str, object] | Utterance]) -> int:
    """Write rows as NeMo JSONL, atomically, and return their number."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in rows:
            row = row_from_utterance(row) if isinstance(row, Utterance) else row
            yield json.dumps(row, ensure_ascii=False) + "\n"
            count += 1

    write_text(path, lines())
    return count


def expand_shards(pattern: str) -> list[str]:
    """Return the paths of ``x_{0..3}.tar`` or ``x__OP_0..3_CL_.tar`` (NeMo's spelling, which shells do not expand).

    Leading zeros set a width; several ranges give every combination. A path without a range is returned as it is.
    Raises ManifestError for a range that counts down or names more than a million shards.
    """
    pattern = pattern.replace("_OP_", "{").replace("_CL_", "}")
    parts = re.split(r"\{(\d+\.\.\d+)\}", pattern)
    choices: list[list[str]] = []
    for position, part in enumerate(parts):
        if position % 2 == 0:
            choices.append([part])
            continue
        first, last = part.split("..")
        if int(last) < int(first):
            raise ManifestError(f"{pattern}: the range {{{part}}} counts down; write {{{last}..{first}}}")
        if int(last) - int(first) >= 1_000_000:
            raise ManifestError(f"{pattern}: the range {{{part}}} names more than a million shards")
        width = len(first) if first.startswith("0") and len(first) > 1 else 0
        choices.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
    return ["".join(combination) for combination in itertools.product(*choices)]


def without_sub(name: str) -> str:
    """Return the member's name: NeMo's tarred manifests call the second segment of ``a.wav`` ``a-sub1.wav``."""
    return _SUFFIX.sub("", name)
