"""Transcripts to disk, whole or not at all, and the file that lets a stopped transcription go on.

Formats: ``nemo``, the manifest's rows with ``pred_text`` added, one JSON object a line; ``txt``, the text
alone; ``json``, as the Whisper command line writes it. A row that could not be transcribed has ``error`` and
no ``pred_text``.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from canter.errors import ConfigError
from canter.inference.inputs import Item
from canter.inference.transcribe import Transcription

FORMATS = ("nemo", "txt", "json")
SUFFIXES = {"nemo": ".jsonl", "txt": ".txt", "json": ".json"}


def result_row(item: Item, transcription: Transcription) -> dict[str, Any]:
    """The item's own fields, then ``pred_text``; or ``error``."""
    row = {key: value for key, value in item.row.items() if key not in ("pred_text", "error")}
    if transcription.error is not None:
        return row | {"error": transcription.error}
    return row | {"pred_text": transcription.text}


def render(items: Sequence[Item], transcriptions: Sequence[Transcription], kind: str) -> str:
    """All transcripts as one file of that format; ``txt`` is one line an item."""
    pairs = list(zip(items, transcriptions))
    if kind == "nemo":
        return "".join(_line(result_row(*pair)) for pair in pairs)
    if kind == "txt":
        return "".join(transcription.text.replace("\n", " ") + "\n" for transcription in transcriptions)
    return json.dumps([_whisper_json(*pair) for pair in pairs], ensure_ascii=False, indent=2) + "\n"


def write_results(
    items: Sequence[Item],
    transcriptions: Sequence[Transcription],
    target: Path,
    kinds: Iterable[str],
    folder: bool,
) -> list[Path]:
    """Writes to the file ``target``, or into the folder: ``transcripts.jsonl`` for ``nemo``, for the other
    formats one file an utterance, named after its audio. Returns what was written, of the many files of a
    folder the folder.
    """
    if not folder:
        (kind,) = kinds
        _write(target, render(items, transcriptions, kind))
        return [target]
    written: list[Path] = []
    names = _names(items)
    for kind in kinds:
        if kind == "nemo":
            written.append(target / "transcripts.jsonl")
            _write(written[-1], render(items, transcriptions, kind))
            continue
        for name, item, transcription in zip(names, items, transcriptions):
            if transcription.error is None:
                text = transcription.text + "\n"
                if kind == "json":
                    value = _whisper_json(item, transcription)
                    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
                _write(target / f"{name}{SUFFIXES[kind]}", text)
    return written or [target]


def _whisper_json(item: Item, transcription: Transcription) -> dict[str, Any]:
    row = item.row
    value: dict[str, Any] = {"audio_filepath": row.get("audio_filepath")}
    if transcription.error is not None:
        return value | {"error": transcription.error}
    duration = row.get("duration")
    start = row.get("offset") or 0.0
    end = start + duration if isinstance(duration, (int, float)) else None
    utterance = item.utterance
    language = (utterance.target_lang or utterance.lang) if utterance else None
    segment = {
        "id": 0,
        "start": start,
        "end": end,
        "text": transcription.text,
        "tokens": [*transcription.tokens],
    }
    return value | {"text": transcription.text, "language": language, "segments": [segment]}


def _names(items: Sequence[Item]) -> list[str]:
    """A file name for each item: the stem of its audio, numbered where it occurs again."""
    names: list[str] = []
    taken: set[str] = set()
    for item in items:
        stem = name = Path(str(item.row.get("audio_filepath") or "row").rpartition("::")[2]).stem
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        names.append(name)
    return names


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --output") from None


class Partial:
    """Transcriptions as they finish, appended to a file: a transcription that was stopped goes on from
    there."""

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        """``identity`` says what is transcribed by what. Raises ConfigError if the file is of something
        else."""
        self.path = path
        self.done: dict[int, Transcription] = {}
        self.identity = dict(identity)
        self._file: TextIO | None = None
        kept = self._read() if path.exists() else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); choose another --output"
            ) from None
        if not kept:
            self._file.write(_line(self.identity))

    def _read(self) -> int:
        """Reads what is there, drops a line torn by the stop, returns the bytes kept."""
        kept = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    if number:
                        done = Transcription(row["text"], tuple(row["tokens"]), row["finished"])
                        self.done[row["item"]] = done
                except (ValueError, KeyError, TypeError):
                    row = None
                if row is None or (number == 0 and row != self.identity):
                    raise ConfigError(
                        f"{self.path} is the unfinished result of another model, input or setting; "
                        "remove it, or choose another --output"
                    )
                kept += len(line)
        os.truncate(self.path, kept)
        return kept

    def add(self, index: int, transcription: Transcription) -> None:
        """Remembers a transcription; failures are not kept, so that they are tried again."""
        if transcription.error is None and self._file:
            row = {"item": index, "text": transcription.text, "tokens": transcription.tokens}
            self._file.write(_line(row | {"finished": transcription.finished}))
            self._file.flush()

    def close(self, remove: bool) -> None:
        if self._file:
            self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)
