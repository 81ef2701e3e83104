"""Read result manifests: NeMo JSONL rows with a reference, ``text``, and a transcript, ``pred_text``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from canter.corpus.manifest import Problem, parse_line, read_json_lines


@dataclass(frozen=True, slots=True)
class ScoredTranscript:
    """A reference and its hypothesis."""

    text: str
    pred_text: str
    lang: str | None
    name: str
    """Id or audio path, with the offset where there is one."""
    line: int
    words: tuple[tuple[str, float], ...] = ()
    """Words and their confidences, from ``segments``; empty where a word has none."""


def read_transcripts(path: str | os.PathLike[str]) -> tuple[list[ScoredTranscript], list[Problem]]:
    """Return the rows that can be scored, and a `Problem` for each other row except ``_skipme`` ones.

    An empty ``pred_text`` is a transcript (all deletions), a missing one is a problem. A row's language is its
    ``target_lang``, else its ``lang``, else its ``source_lang``. Raises ManifestError where the file cannot be opened.
    """
    transcripts: list[ScoredTranscript] = []
    problems: list[Problem] = []
    for number, row in read_json_lines(path, parse_line):
        if isinstance(row, dict) and row.get("_skipme"):
            continue
        if reason := _unusable(row):
            problems.append(Problem(str(path), number, reason))
        else:
            transcripts.append(_transcript(cast("dict[str, str]", row), number))
    return transcripts, problems


def _transcript(row: dict[str, str], line: int) -> ScoredTranscript:
    name = str(row.get("id") or row.get("audio_filepath") or f"line {line}")
    offset = row.get("offset")
    if offset and isinstance(offset, (int, float)):
        name += f" @ {offset:g} s"
    lang = row.get("target_lang") or row.get("lang") or row.get("source_lang")
    return ScoredTranscript(row["text"], row["pred_text"], lang, name, line, _words(row))


def _words(row: Mapping[str, object]) -> tuple[tuple[str, float], ...]:
    try:
        words = [word for segment in cast("Any", row).get("segments", ()) for word in segment.get("words", ())]
        found = tuple((str(word["text"]), float(word["confidence"])) for word in words)
    except (AttributeError, KeyError, TypeError, ValueError):
        return ()
    return found if all(0 <= confidence <= 1 for _, confidence in found) else ()


def _unusable(row: object) -> str | None:
    """Return the reason why a parsed row cannot be scored, or None."""
    if isinstance(row, str):  # the reason given by parse_line
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
