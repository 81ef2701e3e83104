"""Kaldi's data folders, which ESPnet uses too.

They hold ``wav.scp`` and ``text``, and optionally ``segments``, ``utt2lang``, ``utt2dur`` and ``reco2dur``. A command
in ``wav.scp`` (a line that ends or begins with ``|``) is never executed. Format: kaldi-asr.org, "Data preparation".
"""

import os
import re
from collections.abc import Iterator

from canter.corpus.columns import ReadOptions
from canter.corpus.manifest import open_manifest, utterance_from_row
from canter.corpus.remote import from_working_folder
from canter.corpus.utterance import NumberedRows
from canter.errors import ManifestError

_ARCHIVE = re.compile(r".+\.ark(:\d+)?(\[.*\])?")


def read_kaldi(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the utterances of a data folder, in the order of ``segments``, or of ``wav.scp`` without it.

    Relative audio paths are relative to the working folder if there is such a file, else to the data folder. A missing
    duration is read from the audio's header.
    """
    folder = os.path.abspath(path)
    audio = dict(_table(folder, "wav.scp"))
    texts, langs = dict(_table(folder, "text")), dict(_table(folder, "utt2lang"))
    if options.require_text and not texts:
        raise ManifestError(f"{folder} has no file text, or an empty one: its utterances have no text")
    segmented = os.path.exists(os.path.join(folder, "segments"))
    durations = dict(_table(folder, "utt2dur")) if segmented else dict(_table(folder, "reco2dur"))
    durations = durations or dict(_table(folder, "utt2dur"))
    rows = _table(folder, "segments") if segmented else ((name, "") for name in audio)
    for number, (name, times) in enumerate(rows, 1):
        row: dict[str, object] = {"id": name, "text": texts.get(name), "lang": langs.get(name)}
        recording = name
        duration = _seconds(durations.get(name))
        if segmented:
            recording, start, end = [*times.split(), "", "", ""][:3]
            offset, stop = _seconds(start), _seconds(end)
            if offset is None or stop is None:
                yield number, f"segment without start and end in seconds: {name} {times!r:.60}"
                continue
            row["offset"] = offset
            if stop >= 0:  # -1: to the end of the recording
                duration = round(stop - offset, 6)
        where = audio.get(recording)
        if where is None:
            yield number, f"no such recording in wav.scp: {recording!r:.60} of utterance {name}"
            continue
        fault = _unreadable(where)
        if fault is not None:
            yield number, f"{fault} ({name})"
            continue
        if name not in texts and options.require_text:
            yield number, f"text missing ({name})"
            continue
        row |= {"audio_filepath": from_working_folder(where), "duration": duration}
        yield number, utterance_from_row(row, folder, options.for_fields)


def _unreadable(where: str) -> str | None:
    """Return why the second field of wav.scp is not an audio file, or None where it is."""
    if where.endswith("|") or where.startswith("|"):
        return f"wav.scp names a command: it is not executed; write the audio to a file: {where!r:.80}"
    if _ARCHIVE.fullmatch(where):
        return f"audio in a Kaldi archive: write it to a file: {where!r:.80}"
    return None


def _table(folder: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the value of each line of a file in the folder; nothing where the file does not exist."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return
    with open_manifest(path) as file:
        for line in file:
            key, _, value = line.decode("utf-8-sig", errors="replace").strip().replace("\t", " ").partition(" ")
            if key:
                yield key, value.strip()


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
