"""Lhotse cuts, as JSONL (gzip or not) and as Shar folders, read without Lhotse.

Format: Lhotse 1.x ``CutSet.to_jsonl`` and ``CutSet.to_shar``. Only cuts of one recording are utterances:
mixed and padded cuts, and recordings with transforms still to be applied, exist on paper alone until they
are saved as audio.
"""

import os
import re
from pathlib import Path
from typing import Any

from canter.corpus.audio import member_ref
from canter.corpus.manifest import (
    parse_line,
    read_json_lines,
    utterance_from_row,
)
from canter.corpus.remote import folder_of
from canter.corpus.tar import Member, walk_tar
from canter.corpus.utterance import OPTIONAL_TEXT, Found, NumberedFinds, Problem

TOLERANCE = 0.1  # seconds that a supervision may reach out of its cut


def read_lhotse(path: str, *, require_text: bool = True, measure_durations: bool = False) -> NumberedFinds:
    """A manifest of cuts. Audio paths that are relative are so to the working folder, or else to the
    manifest's."""
    base = folder_of(path)

    def parse(line: bytes) -> Found:
        row = _row_from_cut(parse_line(line))
        if isinstance(row, str):
            return row
        source = row["audio_filepath"]
        if isinstance(source, str) and "://" not in source and os.path.exists(source):
            row["audio_filepath"] = os.path.abspath(source)
        return utterance_from_row(row, base, require_text=require_text)

    return read_json_lines(path, parse)


def read_shar(path: str, *, require_text: bool = True, measure_durations: bool = False) -> NumberedFinds:
    """One shard of a Shar folder: ``cuts.NNNNNN.jsonl.gz`` and the ``recording.NNNNNN.tar`` beside it."""
    tar = shar_tar(path)
    members: dict[str, Member] = {}
    for member in walk_tar(tar):
        if isinstance(member, Problem):
            yield member.line, member
        elif not member.name.endswith(".json"):
            members[os.path.splitext(member.name)[0]] = member

    def parse(line: bytes) -> Found:
        row = _row_from_cut(parse_line(line))
        if isinstance(row, str):
            return row
        member = members.get(str(row["id"]))
        if member is None or not member.size or member.name.endswith(".nodata"):
            return f"no recording in the shard: {row['id']!r} is not in {tar}"
        row["audio_filepath"] = member_ref(tar, member.name, member.start, member.size)
        return utterance_from_row(row, "", require_text=require_text)

    yield from read_json_lines(path, parse)


def shar_tar(cuts: str) -> str:
    """``x/cuts.000001.jsonl.gz`` -> ``/…/x/recording.000001.tar``."""
    name = re.sub(r"^cuts(.*?)\.jsonl(\.gz)?$", r"recording\1.tar", os.path.basename(cuts))
    return str(Path(cuts).absolute().with_name(name))


def _row_from_cut(cut: Any) -> dict[str, Any] | str:
    if isinstance(cut, str):
        return cut
    if not isinstance(cut, dict):
        return "not a cut: a JSON object is expected"
    kind = cut.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        return f"a {kind} has no single audio file: save it first (CutSet.save_audios or to_shar)"
    recording, supervisions = cut.get("recording"), cut.get("supervisions") or []
    if not isinstance(recording, dict) or not isinstance(supervisions, list):
        return "cut without a recording: features alone cannot be read"
    if recording.get("transforms"):
        return (
            "recording with transforms: they exist on paper alone; save the audio first (CutSet.save_audios)"
        )
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        return "recording of several files: save it as one first (CutSet.save_audios)"
    kind, source = sources[0].get("type"), sources[0].get("source")
    if kind not in ("file", "url", "shar"):
        return f"recording in a {kind!r}: only files, URLs and Shar can be read again; save the audio first"
    channel = _channel(cut.get("channel"), sources[0].get("channels"))
    if isinstance(channel, str):
        return channel
    custom = cut.get("custom")
    custom = custom if isinstance(custom, dict) else {}
    texts, lang = [], None
    for one in supervisions:
        if not isinstance(one, dict) or not isinstance(one.get("text") or "", str):
            return "supervision without a text that is a string"
        start, end = one.get("start"), cut.get("duration")
        if isinstance(start, (int, float)) and isinstance(end, (int, float)):
            length = one.get("duration")
            stop = start + (length if isinstance(length, (int, float)) else 0.0)
            if start < -TOLERANCE or stop > end + TOLERANCE:
                return f"text goes beyond the cut: spoken from {start:g} to {stop:g} s of a cut of {end:g} s"
        if one.get("text"):
            texts.append(one["text"])
        lang = lang or one.get("language")
        if isinstance(one.get("custom"), dict):
            custom = {**one["custom"], **custom}
    row = {field: custom.get(field) for field in (*OPTIONAL_TEXT, "num_tokens", "_skipme")}
    row["lang"] = row["lang"] or lang
    return row | {
        "id": cut.get("id"),
        "audio_filepath": source,
        "offset": cut.get("start"),
        "duration": cut.get("duration"),
        "channel_selector": channel,
        "text": " ".join(texts) if texts else None,
    }


def _channel(wanted: Any, there: Any) -> int | str | None:
    """Where in the file the cut's channel is; None where the cut is of all that the file has."""
    if not isinstance(there, list):
        return None
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if wanted == [None] or len(there) < 2 or set(wanted) == set(there):
        return None
    if len(wanted) != 1 or wanted[0] not in there:
        return f"channels {wanted} of a file with {there}: one or all can be read; save the audio first"
    return there.index(wanted[0])
