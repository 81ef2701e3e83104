"""Lhotse cuts, as JSONL (gzip or not) and as Shar folders, read without Lhotse.

Format: Lhotse 1.x ``CutSet.to_jsonl`` and ``CutSet.to_shar``. Only a cut of one recording is an utterance: mixed and
padded cuts, and recordings with transforms, have no audio of their own until they are saved.
"""

import os
import re
from pathlib import Path
from typing import TypeGuard

from canter.corpus.columns import Columns, ReadOptions
from canter.corpus.containers import Member, member_ref, walk_tar
from canter.corpus.manifest import LONGEST_SECONDS, parse_line, read_json_lines, shown, utterance_from_row
from canter.corpus.remote import folder_of, from_working_folder
from canter.corpus.utterance import OPTIONAL_TEXT, Found, NumberedRows, Problem

TOLERANCE = 0.1  # seconds by which a supervision may reach out of its cut
JsonObject = dict[str, object]


def read_lhotse(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the cuts of a manifest.

    A relative audio path is relative to the working folder if there is such a file, else to the manifest's folder.
    """
    base = folder_of(path)
    return read_json_lines(path, lambda line: utterance_from_cut(parse_line(line), base, options))


def utterance_from_cut(cut: object, base: str, options: ReadOptions) -> Found:
    """Return the utterance in a cut, or the reason why it cannot be used; ``cut`` may already be such a reason."""
    row = _row_from_cut(cut, options.columns)
    if isinstance(row, str):
        return row
    if isinstance(row["audio_filepath"], str):
        row["audio_filepath"] = from_working_folder(row["audio_filepath"])
    return utterance_from_row(row, base, ReadOptions(options.require_text))


def is_cut(row: object) -> bool:
    """Return whether a JSON value looks like a Lhotse cut."""
    return isinstance(row, dict) and "audio_filepath" not in row and bool({"recording", "tracks"} & set(row))


def read_shar(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the cuts of one shard: ``cuts.NNNNNN.jsonl.gz``, with ``recording.NNNNNN.tar`` beside it."""
    tar = shar_tar(path)
    members: dict[str, Member] = {}
    for member in walk_tar(tar):
        if isinstance(member, Problem):
            yield member.line, member
        elif not member.name.endswith(".json"):
            members[os.path.splitext(member.name)[0]] = member

    def parse(line: bytes) -> Found:
        row = _row_from_cut(parse_line(line), options.columns)
        if isinstance(row, str):
            return row
        name = row["id"]
        if type(name) is int and abs(name) < 2**63:
            name = str(name)
        member = members.get(name) if isinstance(name, str) else None
        if member is None or not member.size or member.name.endswith(".nodata"):
            return f"no recording in the shard: {shown(row['id'])} is not in {tar}"
        row["audio_filepath"] = member_ref(tar, member.name, member.start, member.size)
        return utterance_from_row(row, "", ReadOptions(options.require_text))

    yield from read_json_lines(path, parse)


def shar_tar(cuts: str) -> str:
    """Return ``/.../x/recording.000001.tar`` for ``x/cuts.000001.jsonl.gz``."""
    name = re.sub(r"^cuts(.*?)\.jsonl(\.gz)?$", r"recording\1.tar", os.path.basename(cuts))
    return str(Path(cuts).absolute().with_name(name))


def _row_from_cut(cut: object, columns: Columns) -> JsonObject | str:
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
        return "cut without a recording: features without audio cannot be read"
    if recording.get("transforms"):
        return "recording with transforms: they are not applied; save the audio first (CutSet.save_audios)"
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
        inner: JsonObject = one["custom"] if isinstance(one.get("custom"), dict) else {}
        text = one.get(columns.text, inner.get(columns.text)) if columns.text else one.get("text")
        if not isinstance(text or "", str):
            return "supervision without a text that is a string"
        start, end = one.get("start"), cut.get("duration")
        if _is_seconds(start) and _is_seconds(end):
            length = one.get("duration")
            stop = start + (length if _is_seconds(length) else 0.0)
            if start < -TOLERANCE or stop > end + TOLERANCE:
                return f"text goes beyond the cut: spoken from {start:g} to {stop:g} s of a cut of {end:g} s"
        if text:
            texts.append(text)
        lang = lang or (one.get(columns.lang, inner.get(columns.lang)) if columns.lang else one.get("language"))
        custom = {**inner, **custom}
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


def _is_seconds(value: object) -> TypeGuard[float]:
    """Return whether a value can be a number of seconds; integers of JSON have no limit."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= LONGEST_SECONDS


def _start(supervision: JsonObject) -> float:
    start = supervision.get("start")
    return float(start) if _is_seconds(start) else 0.0


def _channel(wanted: object, present: object) -> int | str | None:
    """Return the position of the cut's channel in the file, None for all channels, or why it cannot be read."""
    if not isinstance(present, list):
        return None
    chosen = wanted if isinstance(wanted, list) else [wanted]
    if not all(type(one) is int for one in present) or not all(type(one) is int or one is None for one in chosen):
        return f"channels that are not numbers: {shown(chosen)} of {shown(present)}"
    if chosen == [None] or len(present) < 2 or set(chosen) == set(present):
        return None
    if len(chosen) != 1 or chosen[0] not in present:
        return f"channels {chosen} of a file with {present}: one or all can be read; save the audio first"
    return present.index(chosen[0])
