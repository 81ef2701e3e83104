"""Reads result manifests: NeMo JSONL rows with a reference, ``text``, and a transcript, ``pred_text``."""

import gzip
import os
import zlib
from dataclasses import dataclass
from typing import Any

from canter.corpus.manifest import Problem, open_manifest, parse_line, scan_lines


@dataclass(frozen=True, slots=True)
class Transcript:
    """A reference and its hypothesis. ``name`` is its audio, with the offset where there is one."""

    text: str
    pred_text: str
    lang: str | None
    name: str
    line: int


def read_transcripts(path: str | os.PathLike[str]) -> tuple[list[Transcript], list[Problem]]:
    """The rows that can be scored, and a `Problem` for each that cannot; ``_skipme`` rows are neither.

    An empty ``pred_text`` is a transcript (all deletions), a missing one is a problem. A row's language is
    its ``target_lang``, else its ``lang``, else its ``source_lang``. Raises `ManifestError` where the file cannot
    be opened.
    """
    transcripts: list[Transcript] = []
    problems: list[Problem] = []
    number = 0
    with open_manifest(path) as file:
        try:
            for _, number, line in scan_lines(file):
                row = parse_line(line) if line.strip() else {"_skipme": True}
                if isinstance(row, dict) and row.get("_skipme"):
                    continue
                reason = _unusable(row)
                if reason:
                    problems.append(Problem(str(path), number, reason))
                elif isinstance(row, dict):
                    transcripts.append(_transcript(row, number))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problems.append(Problem(str(path), number + 1, f"invalid gzip: {error}"))
    return transcripts, problems


def _transcript(row: dict[str, Any], line: int) -> Transcript:
    """The transcript of a row that `_unusable` found nothing wrong with."""
    name = str(row.get("id") or row.get("audio_filepath") or f"line {line}")
    offset = row.get("offset")
    if offset and isinstance(offset, (int, float)):
        name += f" @ {offset:g} s"
    lang = row.get("target_lang") or row.get("lang") or row.get("source_lang")
    return Transcript(row["text"], row["pred_text"], lang, name, line)


def _unusable(row: object) -> str | None:
    """Why a parsed row cannot be scored, or None."""
    if isinstance(row, str):  # parse_line's own reason
        return row
    if not isinstance(row, dict):
        return "not a JSON object"
    for field in ("text", "pred_text"):
        if row.get(field) is None:
            return f"{field} missing"
        if not isinstance(row[field], str):
            return f"{field} is not a string: {row[field]!r:.60}"
    for field in ("target_lang", "lang", "source_lang"):
        if row.get(field) is not None and not isinstance(row[field], str):
            return f"{field} is not a string: {row[field]!r:.60}"
    return None
