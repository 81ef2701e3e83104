"""Kaldi's data folders, which ESPnet has too: ``wav.scp`` and ``text``, where they are there ``segments``,
``utt2lang``, ``utt2dur`` and ``reco2dur``.

A command in ``wav.scp`` (a line that ends or begins with ``|``) is never executed. Format: kaldi-asr.org, "Data
preparation".
"""

import os
import re
from collections.abc import Iterator

from canter.corpus.columns import ANY, Columns
from canter.corpus.manifest import open_manifest, utterance_from_row
from canter.corpus.utterance import NumberedFinds
from canter.errors import ManifestError

_ARCHIVE = re.compile(r".+\.ark(:\d+)?(\[.*\])?")


def read_kaldi(
    path: str, *, require_text: bool = True, measure_durations: bool = False, columns: Columns = ANY
) -> NumberedFinds:
    """Yield the utterances of a data folder, in the order of ``segments``, or else of ``wav.scp``.

    Relative audio paths are relative to the working folder if there is such a file, else to the data folder. A duration
    that no file gives is read from the audio's header.
    """
    folder = os.path.abspath(path)
    audio = dict(_table(folder, "wav.scp"))
    texts, langs = dict(_table(folder, "text")), dict(_table(folder, "utt2lang"))
    if require_text and not texts:
        raise ManifestError(f"{folder} has no file text, or an empty one: what its utterances say is not known")
    cut = os.path.exists(os.path.join(folder, "segments"))
    lasting = dict(_table(folder, "utt2dur")) if cut else dict(_table(folder, "reco2dur"))
    lasting = lasting or dict(_table(folder, "utt2dur"))
    rows = _table(folder, "segments") if cut else ((name, "") for name in audio)
    for number, (name, rest) in enumerate(rows, 1):
        row: dict[str, object] = {"id": name, "text": texts.get(name), "lang": langs.get(name)}
        recording = name
        duration = _seconds(lasting.get(name))
        if cut:
            recording, start, end = [*rest.split(), "", "", ""][:3]
            row["offset"], stop = _seconds(start), _seconds(end)
            if row["offset"] is None or stop is None:
                yield number, f"segment without start and end in seconds: {name} {rest!r:.60}"
                continue
            if stop >= 0:  # -1: to the end of the recording
                duration = round(stop - float(str(row["offset"])), 6)
        where = audio.get(recording)
        if where is None:
            yield number, f"no such recording in wav.scp: {recording!r:.60} of utterance {name}"
            continue
        fault = _unreadable(where)
        if fault is not None:
            yield number, f"{fault} ({name})"
            continue
        if name not in texts and require_text:
            yield number, f"text missing ({name})"
            continue
        if not ("://" in where or os.path.isabs(where)) and os.path.exists(where):
            where = os.path.abspath(where)
        row |= {"audio_filepath": where, "duration": duration}
        yield number, utterance_from_row(row, folder, require_text=require_text, measure_durations=True)


def _unreadable(where: str) -> str | None:
    """Return why the second field of wav.scp is no file of audio, or None."""
    if where.endswith("|") or where.startswith("|"):
        return f"wav.scp names a command: it is not executed; write the audio to a file: {where!r:.80}"
    if _ARCHIVE.fullmatch(where):
        return f"audio in a Kaldi archive: write it to a file: {where!r:.80}"
    return None


def _table(folder: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield key and rest of each line of a file of the folder; nothing where there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return
    with open_manifest(path) as file:
        for line in file:
            key, _, rest = line.decode("utf-8-sig", errors="replace").strip().replace("\t", " ").partition(" ")
            if key:
                yield key, rest.strip()


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
