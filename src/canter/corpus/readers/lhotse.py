"""Lhotse cuts, as JSONL (gzip or not) and as Shar folders, read without Lhotse.

Format: Lhotse 1.x ``CutSet.to_jsonl`` and ``CutSet.to_shar``. Only cuts of one recording are utterances:
mixed and padded cuts, and recordings with transforms still to be applied, exist on paper alone until they
are saved as audio.
"""

import os
import re
from pathlib import Path
from typing import Any, TypeGuard

from canter.corpus.audio import member_ref
from canter.corpus.columns import ANY, Columns
from canter.corpus.manifest import (
    LONGEST_SECONDS,
    parse_line,
    read_json_lines,
    shown,
    utterance_from_row,
)
from canter.corpus.remote import folder_of
from canter.corpus.tar import Member, walk_tar
from canter.corpus.utterance import OPTIONAL_TEXT, Found, NumberedFinds, Problem, Utterance

TOLERANCE = 0.1  # seconds that a supervision may reach out of its cut


def read_lhotse(
    path: str, *, require_text: bool = True, measure_durations: bool = False, columns: Columns = ANY
) -> NumberedFinds:
    """Yield the cuts of a manifest. A relative audio path is relative to the working folder if there is such a file,
    else to the manifest's folder."""
    base = folder_of(path)
    return read_json_lines(
        path,
        lambda line: utterance_from_cut(parse_line(line), base, require_text=require_text, columns=columns),
    )


def utterance_from_cut(
    cut: Any, base: str, *, require_text: bool = True, columns: Columns = ANY
) -> Utterance | str | None:
    """Return the utterance in a cut, or the reason why it cannot be used; ``cut`` may be such a reason already."""
    row = _row_from_cut(cut, columns)
    if isinstance(row, str):
        return row
    source = row["audio_filepath"]
    if isinstance(source, str) and "://" not in source and "\0" not in source and os.path.exists(source):
        row["audio_filepath"] = os.path.abspath(source)
    return utterance_from_row(row, base, require_text=require_text)


def is_cut(row: Any) -> bool:
    """Return whether a JSON object looks like a Lhotse cut."""
    return isinstance(row, dict) and "audio_filepath" not in row and bool({"recording", "tracks"} & set(row))


def read_shar(
    path: str, *, require_text: bool = True, measure_durations: bool = False, columns: Columns = ANY
) -> NumberedFinds:
    """One shard of a Shar folder: ``cuts.NNNNNN.jsonl.gz`` and the ``recording.NNNNNN.tar`` beside it."""
    tar = shar_tar(path)
    members: dict[str, Member] = {}
    for member in walk_tar(tar):
        if isinstance(member, Problem):
            yield member.line, member
        elif not member.name.endswith(".json"):
            members[os.path.splitext(member.name)[0]] = member

    def parse(line: bytes) -> Found:
        row = _row_from_cut(parse_line(line), columns)
        if isinstance(row, str):
            return row
        name = row["id"]
        if type(name) is int and abs(name) < 2**63:
            name = str(name)
        member = members.get(name) if isinstance(name, str) else None
        if member is None or not member.size or member.name.endswith(".nodata"):
            return f"no recording in the shard: {shown(row['id'])} is not in {tar}"
        row["audio_filepath"] = member_ref(tar, member.name, member.start, member.size)
        return utterance_from_row(row, "", require_text=require_text)

    yield from read_json_lines(path, parse)


def shar_tar(cuts: str) -> str:
    """``x/cuts.000001.jsonl.gz`` -> ``/…/x/recording.000001.tar``."""
    name = re.sub(r"^cuts(.*?)\.jsonl(\.gz)?$", r"recording\1.tar", os.path.basename(cuts))
    return str(Path(cuts).absolute().with_name(name))


def _row_from_cut(cut: Any, columns: Columns = ANY) -> dict[str, Any] | str:
    if isinstance(cut, str):
        return cut
    if not isinstance(cut, dict):
        return "not a cut: a JSON object is expected"
    kind = cut.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        kind = kind if kind in ("MixedCut", "PaddingCut") else f"cut of type {kind!r:.60}"
        return f"a {kind} has no single audio file: save it first (CutSet.save_audios or to_shar)"
    recording, supervisions = cut.get("recording"), cut.get("supervisions") or []
    if not isinstance(recording, dict) or not isinstance(supervisions, list):
        return "cut without a recording: features alone cannot be read"
    if recording.get("transforms"):
        return "recording with transforms: they exist on paper alone; save the audio first (CutSet.save_audios)"
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        return "recording of several files: save it as one first (CutSet.save_audios)"
    kind, source = sources[0].get("type"), sources[0].get("source")
    if kind not in ("file", "url", "shar"):
        return f"recording in a {kind!r:.60}: only files, URLs and Shar can be read again; save the audio first"
    channel = _channel(cut.get("channel"), sources[0].get("channels"))
    if isinstance(channel, str):
        return channel
    custom = cut.get("custom")
    custom = custom if isinstance(custom, dict) else {}
    texts, lang = [], None
    if not all(isinstance(one, dict) for one in supervisions):
        return "supervision that is not a JSON object"
    for one in sorted(supervisions, key=_start):
        told: dict[str, Any] = one["custom"] if isinstance(one.get("custom"), dict) else {}
        text = one.get(columns.text, told.get(columns.text)) if columns.text else one.get("text")
        if not isinstance(text or "", str):
            return "supervision without a text that is a string"
        start, end = one.get("start"), cut.get("duration")
        if _is_number(start) and _is_number(end):
            length = one.get("duration")
            stop = start + (length if _is_number(length) else 0.0)
            if start < -TOLERANCE or stop > end + TOLERANCE:
                return f"text goes beyond the cut: spoken from {start:g} to {stop:g} s of a cut of {end:g} s"
        if text:
            texts.append(text)
        lang = lang or (one.get(columns.lang, told.get(columns.lang)) if columns.lang else one.get("language"))
        custom = {**told, **custom}
    row = {field: custom.get(field) for field in (*OPTIONAL_TEXT, "num_tokens", "answer", "_skipme")}
    row["lang"] = lang if columns.lang else row["lang"] or lang
    return row | {
        "id": cut.get("id"),
        "audio_filepath": source,
        "offset": cut.get("start"),
        "duration": cut.get("duration"),
        "channel_selector": channel,
        "text": " ".join(texts) if texts else None,
    }


def _is_number(value: Any) -> TypeGuard[float]:
    """Return whether it is a number that can be one of seconds; integers of JSON have no limit."""
    return type(value) in (int, float) and abs(value) <= LONGEST_SECONDS


def _start(supervision: dict[str, Any]) -> float:
    start = supervision.get("start")
    return float(start) if _is_number(start) else 0.0


def _channel(wanted: Any, there: Any) -> int | str | None:
    """Where in the file the cut's channel is; None where the cut is of all that the file has."""
    if not isinstance(there, list):
        return None
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if not all(type(one) is int for one in there) or not all(type(one) is int or one is None for one in wanted):
        return f"channels that are not numbers: {shown(wanted)} of {shown(there)}"
    if wanted == [None] or len(there) < 2 or set(wanted) == set(there):
        return None
    if len(wanted) != 1 or wanted[0] not in there:
        return f"channels {wanted} of a file with {there}: one or all can be read; save the audio first"
    return there.index(wanted[0])
