"""Tars read by byte range: NeMo's tarred manifests and WebDataset shards."""

import posixpath
from collections.abc import Iterator

from canter.corpus.audio import member_ref
from canter.corpus.manifest import (
    expand_shards,
    open_manifest,
    parse_line,
    read_json_lines,
    utterance_from_row,
    without_sub,
)
from canter.corpus.readers.common import AUDIO_SUFFIXES, common_fields
from canter.corpus.remote import absolute
from canter.corpus.tar import Member, walk_tar
from canter.corpus.utterance import Found, NumberedFinds, Problem


def read_nemo_tarred(
    path: str, audio: str, *, require_text: bool = True, measure_durations: bool = False
) -> NumberedFinds:
    """A NeMo manifest whose ``audio_filepath`` names members of tars: one, or several told apart by
    ``shard_id``.

    ``audio`` is a tar or a pattern of tars. Format: NeMo's ``convert_to_tarred_audio_dataset``, whose
    ``a-sub1.wav`` is the second cut of member ``a.wav``.
    """
    tars = expand_shards(audio)
    opened: dict[str, dict[str, Member]] = {}
    told: list[Problem] = []

    def members(tar: str) -> dict[str, Member]:
        if tar not in opened:
            found = list(walk_tar(tar))
            told.extend(one for one in found if isinstance(one, Problem))
            opened[tar] = {one.name: one for one in found if isinstance(one, Member)}
        return opened[tar]

    def parse(line: bytes) -> Found:
        row = parse_line(line)
        if not isinstance(row, dict):
            return row if isinstance(row, str) else utterance_from_row(row, "")
        name, shard = row.get("audio_filepath"), row.get("shard_id", 0)
        if isinstance(name, str) and not row.get("_skipme"):
            if len(tars) > 1 and (type(shard) is not int or not 0 <= shard < len(tars)):
                return f"shard_id is not one of the {len(tars)} tars: {shard!r}"
            tar = tars[shard] if len(tars) > 1 else tars[0]
            name = posixpath.normpath(name)
            member = members(tar).get(name) or members(tar).get(without_sub(name))
            if member is None:
                return f"no such member in the tar: {name!r} is not in {tar}"
            row["audio_filepath"] = member_ref(absolute(tar), member.name, member.start, member.size)
        return utterance_from_row(row, "", require_text=require_text, measure_durations=measure_durations)

    for row in read_json_lines(path, parse):
        yield from ((problem.line, problem) for problem in told)
        told.clear()
        yield row


def read_webdataset(
    path: str, *, require_text: bool = True, measure_durations: bool = False
) -> NumberedFinds:
    """A WebDataset tar: neighbouring members ``KEY.flac``, ``KEY.txt`` and/or ``KEY.json`` are one sample.

    The JSON may hold any manifest field; a ``duration`` it does not give is read from the audio's header.
    Format: the WebDataset specification (key: the path up to the first dot of its last part).
    """
    with open_manifest(path) as file:
        for key, members in _samples(path):
            if isinstance(key, Problem):
                yield key.line, key
                continue
            number = min(member.number for member in members.values())
            row = {}
            if "json" in members:
                _, start, size, number = members["json"]
                file.seek(start)
                row = parse_line(file.read(size))
                if not isinstance(row, dict):
                    why = row if isinstance(row, str) else f"{key}.json is not an object"
                    yield number, why
                    continue
            found = [kind for kind in members if "." + kind.rsplit(".", 1)[-1] in AUDIO_SUFFIXES]
            if not found:
                yield number, f"no audio in the sample: {key!r} has {', '.join(members)}"
                continue
            name, start, size, number = members[found[0]]
            row = common_fields(row)
            row["audio_filepath"] = member_ref(absolute(path), name, start, size)
            text = next(
                (members[kind] for kind in ("txt", "text", "transcript", "lab") if kind in members), None
            )
            if text is not None:
                file.seek(text.start)
                try:
                    row["text"] = file.read(text.size).decode().strip()
                except UnicodeDecodeError as error:
                    yield text.number, f"invalid UTF-8: {error.reason} in {text.name!r}"
                    continue
            result = utterance_from_row(row, "", require_text=require_text, measure_durations=True)
            yield number, f"{result} ({key})" if isinstance(result, str) else result


def _samples(path: str) -> Iterator[tuple[str | Problem, dict[str, Member]]]:
    """``(key, {extension: member})``, or a Problem in the key's place."""
    key, members = None, {}
    for member in walk_tar(path):
        if isinstance(member, Problem):
            yield member, {}
            continue
        folder, base = posixpath.split(member.name)
        stem, _, extension = base.partition(".")
        this = posixpath.join(folder, stem)
        if this != key and members:
            yield key or "", members
            members = {}
        key = this
        members[extension.lower()] = member
    if members:
        yield key or "", members
