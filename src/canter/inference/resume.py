"""Partial results, from which a stopped transcription resumes: finished rows, appended to files beside the output.

Each process writes its own file, ``OUTPUT.partial``, ``OUTPUT.partial-1``, ..., and all of them are read, so that a
transcription can resume with another number of processes. Rows are identified by their contents (audio, offset,
languages, task), not by their number, so that the manifest may have grown or changed.
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
from canter.inference.recording import Transcription
from canter.inference.transcript.formats import json_text
from canter.inference.transcript.segments import Alternatives, Segment, TokenScore, Word

IRRELEVANT = ("text", "num_tokens", "id")  # fields that the transcript does not depend on


def row_key(utterance: Utterance) -> str:
    """Return 16 hexadecimal digits that are equal for rows with equal fields and an unchanged file (size and time of
    modification)."""
    asked = {name: value for name, value in asdict(utterance).items() if name not in IRRELEVANT}
    asked["file"] = _state(utterance.audio_filepath)
    return blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()


def _state(path: str) -> list[int] | None:
    """Return size and modification time of a file, or of the archive that holds it; None without a local file."""
    try:
        found = os.stat(path if os.path.exists(path) else path.partition("::")[0])
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


def partial_files(output: Path, folder: bool) -> Path:
    """Return the first process's file for an output; the others add ``-RANK``."""
    beside = output / "transcripts" if folder else output
    return beside.with_name(beside.name + ".partial")


def read_done(first: Path, identity: Mapping[str, object]) -> dict[str, Transcription]:
    """Return all finished transcriptions by `row_key`, from the files that belong to ``first``.

    ``identity`` describes model and settings. Raises ConfigError for a file with another identity.
    """
    done: dict[str, Transcription] = {}
    for path in _files(first):
        done |= _rows(path, identity)
    return done


def remove(first: Path) -> None:
    """Remove the files that belong to ``first``."""
    for path in _files(first):
        path.unlink(missing_ok=True)


def _files(first: Path) -> Sequence[Path]:
    others = [path for path in first.parent.glob("*") if path.name.startswith(first.name + "-")]
    numbered = [path for path in others if path.name.removeprefix(first.name + "-").isdigit()]
    return [*([first] if first.exists() else []), *sorted(numbered)]


def _rows(path: Path, identity: Mapping[str, object]) -> Iterator[tuple[str, Transcription]]:
    """Yield the complete rows after the first line, which is the identity."""
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
        words = tuple(Word(**word | {"probabilities": tuple(word["probabilities"])}) for word in segment.pop("words"))
        scores = tuple(TokenScore(**score) for score in segment.pop("token_scores"))
        segment |= {"tokens": tuple(segment["tokens"]), "words": words, "token_scores": scores}
        segments.append(Segment(**segment))
    nbest = [Alternatives(**one | {"hypotheses": tuple(map(tuple, one["hypotheses"]))}) for one in row.pop("nbest", ())]
    ctc = row.pop("ctc", None)
    return Transcription(
        tokens=tuple(row.pop("tokens")),
        segments=tuple(segments),
        ctc=None if ctc is None else tuple(ctc),
        warnings=tuple(row.pop("warnings", ())),
        nbest=tuple(nbest),
        language_probabilities=tuple((name, share) for name, share in row.pop("language_probabilities", ())),
        **row,
    )


class Partial:
    """File to which this process appends its transcriptions as they finish."""

    def __init__(self, path: Path, identity: Mapping[str, object]):
        """Open the file for appending; an existing one must have this ``identity`` (see `read_done`)."""
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
        """Write a transcription; failures are not written, so that they are tried again. ``key``: the row's key before
        its file was read, because the file may have been replaced since."""
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
    """Truncate the file after its last complete line."""
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
