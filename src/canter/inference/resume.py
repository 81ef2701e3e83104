"""What lets a stopped transcription go on: transcriptions as they finish, appended to files beside the output.

Each process writes a file of its own, ``OUTPUT.partial``, ``OUTPUT.partial-1``, ...; all of them are read, so
that a transcription may go on with more processes or fewer. Rows are known by what they ask for (audio, place,
languages, task), not by their number: a manifest that has grown or changed goes on too.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.inference.transcribe import Transcription
from canter.inference.transcript.formats import json_text
from canter.inference.transcript.segments import Segment, Word

OURS = ("text", "num_tokens", "id")  # of an utterance, but without a part in its transcript


def row_key(utterance: Utterance) -> str:
    """Return 16 hexadecimal digits, the same for rows with the same transcript: what they ask for, and the size and the
    time of change of their file, so that a file that was replaced is transcribed anew."""
    asked = {name: value for name, value in asdict(utterance).items() if name not in OURS}
    asked["file"] = _state(utterance.audio_filepath)
    return blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()


def _state(path: str) -> list[int] | None:
    """Return size and time of change of a file, or of the archive that it lies in; None for what is no local file."""
    try:
        found = os.stat(path if os.path.exists(path) else path.partition("::")[0])
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def partial_files(output: Path, folder: bool) -> Path:
    """The first process's file for an output; those of others add ``-RANK``."""
    beside = output / "transcripts" if folder else output
    return beside.with_name(beside.name + ".partial")


def read_done(first: Path, identity: Mapping[str, Any]) -> dict[str, Transcription]:
    """Everything finished, by `row_key`, in all the files that belong to ``first``.

    ``identity`` says by what it is transcribed. Raises ConfigError where a file is of something else.
    """
    done: dict[str, Transcription] = {}
    for path in _files(first):
        done |= _rows(path, identity)
    return done


def remove(first: Path) -> None:
    """Removes the files that belong to ``first``."""
    for path in _files(first):
        path.unlink(missing_ok=True)


def _files(first: Path) -> Sequence[Path]:
    others = [path for path in first.parent.glob("*") if path.name.startswith(first.name + "-")]
    numbered = [path for path in others if path.name.removeprefix(first.name + "-").isdigit()]
    return [*([first] if first.exists() else []), *sorted(numbered)]


def _rows(path: Path, identity: Mapping[str, Any]) -> Iterator[tuple[str, Transcription]]:
    """The whole lines after the first; one torn by the stop is passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                if number:
                    yield row.pop("row"), _transcription(row)
                elif row != identity:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(
                    f"{path} is the unfinished result of another model or setting; remove it, or choose "
                    "another --output"
                ) from None


def _transcription(row: dict[str, Any]) -> Transcription:
    segments = []
    for segment in row.pop("segments", ()):
        words = tuple(Word(**word) for word in segment.pop("words"))
        segments.append(Segment(**segment | {"tokens": tuple(segment["tokens"])}, words=words))
    ctc = row.pop("ctc", None)
    return Transcription(
        tokens=tuple(row.pop("tokens")),
        segments=tuple(segments),
        ctc=None if ctc is None else tuple(ctc),
        warnings=tuple(row.pop("warnings", ())),
        **row,
    )


class Partial:
    """Transcriptions of this process as they finish, appended to its file."""

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        """Goes on with the file if there is one, which `read_done` has found to be of this ``identity``."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _cut_torn_line(path)
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --output") from None
        if not self._file.tell():
            self._write(dict(identity))

    def add(self, utterance: Utterance, transcription: Transcription, key: str | None = None) -> None:
        """Remember a transcription; failures are not kept, so that they are tried again. ``key``: the row's before its
        file was read, which may have been replaced since."""
        if transcription.error is None:
            row = {"row": key or row_key(utterance), **asdict(transcription)}
            self._write({name: value for name, value in row.items() if value is not None and value != ()})

    def _write(self, row: Mapping[str, Any]) -> None:
        row = row if "row" not in row else {"tokens": [], **row}
        self._file.write(json_text(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Cuts what follows the last whole line."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        place = size
        while place:
            start = max(0, place - 65536)
            file.seek(start)
            found = file.read(place - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            place = start
        file.truncate(0)
