"""Tables of text: CSV and TSV with a header, Common Voice's TSV, and lists of ``path|text`` (LJ Speech's metadata.csv).

CSV includes SpeechBrain's (``ID,duration,wav,spk_id,wrd``), DeepSpeech's, the Hub's ``metadata.csv`` and what a
spreadsheet exports. Formats: RFC 4180; LJ Speech 1.1 (``ID|text|normalised text``, audio in ``wavs/ID.wav``).
"""

import csv
import os
from collections.abc import Iterator
from typing import BinaryIO

from canter.corpus.columns import AUDIO_NAMES, TEXT_NAMES, ReadOptions, common_fields, no_column
from canter.corpus.manifest import open_manifest, utterance_from_row
from canter.corpus.media import AUDIO_SUFFIXES
from canter.corpus.remote import below, folder_of
from canter.corpus.utterance import NumberedRows
from canter.errors import ManifestError

DELIMITERS = "\t,;|"
NUMBERS = ("duration", "offset", "num_tokens", "channel_selector")
PLACEHOLDERS = ("$data_root", "{data_root}", "{ROOT}", "$root")  # SpeechBrain's recipes replace them


def read_table(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the rows of a table whose first line names the columns. Missing durations are read from the headers."""
    base, columns = folder_of(path), options.columns
    with open_manifest(path) as file:
        header, delimiter = _header(file, path)
        columns.check(header, path)
        audio = columns.audio or next((name for name in AUDIO_NAMES if name in header), None)
        if audio is None:
            raise no_column(path, "audio", header)
        columns.check(header, path, options.require_text)
        records = _tabbed(file) if delimiter == "\t" else _delimited(file, delimiter)
        for number, cells in _as_dicts(records, header):
            if isinstance(cells, str):
                yield number, cells
                continue
            cells = {name: value for name, value in cells.items() if value != ""}
            where = cells.get(audio)
            if fault := unresolved(where):
                yield number, fault
                continue
            row = common_fields(cells, columns)
            row["audio_filepath"] = where
            for name in NUMBERS:
                row[name] = _number(row[name])
            milliseconds = _number(cells.get("duration_ms"))
            if row["duration"] is None and isinstance(milliseconds, int | float):
                row["duration"] = milliseconds / 1000
            yield number, utterance_from_row(row, base, options.for_fields)


def unresolved(path: object) -> str | None:
    """Return why a path with a placeholder of SpeechBrain's recipes cannot be used, None for any other path."""
    if isinstance(path, str) and any(one in path for one in PLACEHOLDERS):
        return f"path with a placeholder: {path!r:.80}; write the folder in its place"
    return None


def read_commonvoice(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the rows of Common Voice's ``train.tsv`` and the like (columns ``path``, ``sentence``, ``locale``).

    Clips are in ``clips/``; tabs separate fields and nothing is quoted. The duration of a clip that
    ``clip_durations.tsv`` does not list is read from its header.
    """
    folder, columns = folder_of(path), options.columns
    durations = _clip_durations(os.path.join(folder, "clip_durations.tsv"))
    with open_manifest(path) as file:
        header = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n").split("\t")
        columns.check(header, path)
        if not {"path", "sentence"} <= set(header):
            raise ManifestError(f"{path} has no columns path and sentence; it has {', '.join(header)}")
        for number, row in _as_dicts(_tabbed(file, quoted=False), header):
            if isinstance(row, str):
                yield number, row
                continue
            clip = row[columns.audio or "path"]
            fields = {
                "audio_filepath": os.path.join("clips", clip) if clip else None,
                "text": row[columns.text or "sentence"],
                "lang": row.get(columns.lang or "locale") or None,
                "duration": durations.get(clip),
            }
            yield number, utterance_from_row(fields, folder, options.for_fields)


def _clip_durations(path: str) -> dict[str, float]:
    """Return the seconds of each clip in ``clip_durations.tsv``, which states milliseconds."""
    if not os.path.exists(path):
        return {}
    found = {}
    with open_manifest(path) as file:
        for line in file:
            clip, _, milliseconds = line.decode("utf-8", errors="replace").rstrip("\r\n").partition("\t")
            try:
                found[clip] = float(milliseconds) / 1000
            except ValueError:
                continue  # the heading, or a torn line: the clip's own header will be read
    return found


def read_list(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the rows of a list of ``ID|text|normalised text`` (the last is taken), or of ``path|text``.

    The audio of an ID is ``wavs/ID.wav``. The text column may be "text" or "normalized_text".
    """
    base, wanted = folder_of(path), options.columns.text
    if wanted not in ("", "text", "normalized_text"):
        raise ManifestError(f"{path} has no column {wanted!r} of text; it has text, normalized_text")
    with open_manifest(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                name, *texts = (part.strip() for part in line.decode("utf-8-sig").split("|"))
            except UnicodeDecodeError as error:
                yield number, _invalid_utf8(error)
                continue
            text = next((one for one in reversed(texts[:2]) if one), None)
            if wanted == "text":
                text = texts[0] if texts else None
            is_path = os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES
            row = {"audio_filepath": name if is_path else os.path.join("wavs", f"{name}.wav"), "text": text}
            if not is_path:
                row["id"] = name
            yield number, utterance_from_row(row, base, options.for_fields)


def is_list(path: str) -> bool:
    """Return whether a file is a list of ``ID|text`` without a header: bars, and no field that is a column's name."""
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
    """Return the names of the columns and the delimiter. Raises ManifestError for a file without a header."""
    first = file.readline(1 << 16).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    delimiter = max(DELIMITERS, key=first.count)
    try:
        names = [one.strip() for one in next(csv.reader([first], delimiter=delimiter), [])]
    except csv.Error:
        names = []
    if len(names) < 2 or len(set(names)) < len(names):
        raise ManifestError(f"{path}: its first line does not name columns: {first[:80]!r}")
    return names, delimiter


Records = Iterator[tuple[int, list[str] | str]]  # number of a record's first line, from 2; its fields, or a reason


def _as_dicts(records: Records, header: list[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    for number, values in records:
        if isinstance(values, str):
            yield number, values
        elif len(values) != len(header):
            yield number, f"wrong number of fields: {len(values)}, not {len(header)}"
        else:
            yield number, dict(zip(header, values, strict=True))


def _delimited(file: BinaryIO, delimiter: str) -> Records:
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


def _tabbed(file: BinaryIO, quoted: bool = True) -> Records:
    """Yield the records of a TSV, one a line; with ``quoted``, quotes around a complete field are removed."""
    for number, line in enumerate(file, 2):
        if not line.strip():
            continue
        try:
            values = line.decode().rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            yield number, _invalid_utf8(error)
            continue
        yield number, [*map(_unquoted, values)] if quoted else values


def _invalid_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8: {error.reason} at byte {error.start + 1} of the line"


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field


def _number(value: object) -> object:
    """Return the number in a cell, or the cell itself, which the manifest's rules then refuse."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().isdecimal() and len(value) < 19 else float(value)
    except ValueError:
        return value
