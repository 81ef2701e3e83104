"""Tables of text: CSV and TSV with a header, and lists of ``path|text`` such as LJ Speech's ``metadata.csv``.

Read so are SpeechBrain's CSV (``ID,duration,wav,spk_id,wrd``), DeepSpeech's, the Hub's ``metadata.csv`` and what a
spreadsheet exports. Formats: RFC 4180; LJ Speech 1.1 (``ID|text|normalised text``, audio in ``wavs/ID.wav``).
"""

import csv
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from canter.corpus.columns import ANY, AUDIO_NAMES, TEXT_NAMES, Columns, common_fields
from canter.corpus.manifest import open_manifest, utterance_from_row
from canter.corpus.readers.common import AUDIO_SUFFIXES
from canter.corpus.remote import below, folder_of
from canter.corpus.utterance import NumberedFinds
from canter.errors import ManifestError

DELIMITERS = "\t,;|"
NUMBERS = ("duration", "offset", "num_tokens", "channel_selector")
PLACEHOLDERS = ("$data_root", "{data_root}", "{ROOT}", "$root")  # SpeechBrain's recipes replace them


def read_table(
    path: str, *, require_text: bool = True, measure_durations: bool = False, columns: Columns = ANY
) -> NumberedFinds:
    """Yield the rows of a table whose first line names the columns. A duration that no column gives is read from the
    audio's header."""
    base = folder_of(path)
    with open_manifest(path) as file:
        header, delimiter = _header(file, path)
        columns.check(header, path)
        audio = columns.audio or next((name for name in AUDIO_NAMES if name in header), None)
        if audio is None:
            raise ManifestError(
                f"{path} has no column of audio; name it (--audio-column); it has {', '.join(header)[:200]}"
            )
        columns.check(header, path, require_text)
        for number, values in _records(file, delimiter):
            if isinstance(values, str):
                yield number, values
                continue
            if len(values) != len(header):
                yield number, f"wrong number of fields: {len(values)}, not {len(header)}"
                continue
            cells = {name: value for name, value in zip(header, values, strict=True) if value != ""}
            row = common_fields(cells, columns)
            where = cells.get(audio)
            if where is not None and any(one in where for one in PLACEHOLDERS):
                yield number, f"path with a placeholder: {where!r:.80}; write the folder in its place"
                continue
            row["audio_filepath"] = where
            for name in NUMBERS:
                row[name] = _number(row[name])
            milliseconds = _number(cells.get("duration_ms"))
            if row["duration"] is None and isinstance(milliseconds, int | float):
                row["duration"] = milliseconds / 1000
            yield (
                number,
                utterance_from_row(row, base, require_text=require_text, measure_durations=True),
            )


def read_list(
    path: str, *, require_text: bool = True, measure_durations: bool = False, columns: Columns = ANY
) -> NumberedFinds:
    """Yield the rows of a list of ``ID|text|normalised text`` (the last is taken), or of ``path|text``.

    The audio of an ID is ``wavs/ID.wav``. ``columns.text`` may be "text" or "normalized_text".
    """
    base = folder_of(path)
    if columns.text not in ("", "text", "normalized_text"):
        raise ManifestError(f"{path} has no column {columns.text!r} of text; it has text, normalized_text")
    with open_manifest(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                name, *texts = (part.strip() for part in line.decode("utf-8-sig").split("|"))
            except UnicodeDecodeError as error:
                yield number, f"invalid UTF-8: {error.reason} at byte {error.start + 1} of the line"
                continue
            text = next((one for one in reversed(texts[:2]) if one), None)
            if columns.text == "text":
                text = texts[0] if texts else None
            is_path = os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES
            row = {"audio_filepath": name if is_path else os.path.join("wavs", f"{name}.wav"), "text": text}
            if not is_path:
                row["id"] = name
            yield number, utterance_from_row(row, base, require_text=require_text, measure_durations=True)


def is_list(path: str) -> bool:
    """Return whether a file is a list of ``ID|text`` without a header: fields parted by bars, none a column's name."""
    with open_manifest(path) as file:
        first = file.readline().decode("utf-8-sig", errors="replace").strip()
    fields = [one.strip().strip('"').lower() for one in first.split("|")]
    if len(fields) < 2 or {*AUDIO_NAMES, *TEXT_NAMES} & set(fields):
        return False
    wav = below(folder_of(path), os.path.join("wavs", f"{first.split('|')[0].strip()}.wav"))
    return os.path.splitext(fields[0])[1] in AUDIO_SUFFIXES or os.path.exists(wav) or len(fields) == 3


def names_audio(path: str) -> bool:
    """Return whether the first line of a table names a column of audio and one of text."""
    with open_manifest(path) as file:
        try:
            header, _ = _header(file, path)
        except ManifestError:
            return False
    return bool(set(AUDIO_NAMES) & set(header)) and bool(set(TEXT_NAMES) & set(header))


def _header(file: BinaryIO, path: str) -> tuple[list[str], str]:
    """Return the columns' names and what parts them. Raises ManifestError for a file without a header."""
    first = file.readline(1 << 16).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    delimiter = max(DELIMITERS, key=first.count)
    try:
        names = [one.strip() for one in next(csv.reader([first], delimiter=delimiter), [])]
    except csv.Error:
        names = []
    if len(names) < 2 or len(set(names)) < len(names):
        raise ManifestError(f"{path}: its first line does not name columns: {first[:80]!r}")
    return names, delimiter


def _records(file: BinaryIO, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the number of each record's first line, from 2, and its fields or why it has none."""
    if delimiter == "\t":
        yield from _tabbed(file)
        return
    count = 1
    broken: list[int] = []

    def lines() -> Iterator[str]:
        nonlocal count
        for line in file:
            count += 1
            try:
                yield line.decode()
            except UnicodeDecodeError:
                broken.append(count)
                yield line.decode(errors="replace")

    reader = csv.reader(lines(), delimiter=delimiter)
    while True:
        number = count + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield number, f"invalid CSV: {error}"
            continue
        if values is None:
            return
        if broken:
            yield number, "invalid UTF-8: in this line"
            broken.clear()
        elif values:
            yield number, values


def _tabbed(file: BinaryIO) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the records of a TSV, in which a line is a record; quotes around a whole field are taken off."""
    for number, line in enumerate(file, 2):
        if not line.strip():
            continue
        try:
            yield number, [_unquoted(one) for one in line.decode().rstrip("\r\n").split("\t")]
        except UnicodeDecodeError as error:
            yield number, f"invalid UTF-8: {error.reason} at byte {error.start + 1} of the line"


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field


def _number(value: Any) -> Any:
    """Return the number that a cell holds, or the cell itself, which the manifest's rules then refuse."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().isdecimal() and len(value) < 19 else float(value)
    except ValueError:
        return value
