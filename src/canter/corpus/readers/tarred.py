"""Tars read by byte range: NeMo's tarred manifests and WebDataset shards."""

import posixpath
from dataclasses import dataclass
from typing import BinaryIO

from canter.corpus.columns import Columns, ReadOptions, common_fields
from canter.corpus.containers import Member, member_ref, walk_tar
from canter.corpus.manifest import (
    expand_shards,
    open_manifest,
    parse_line,
    read_json_lines,
    utterance_from_row,
    without_sub,
)
from canter.corpus.media import AUDIO_SUFFIXES
from canter.corpus.remote import absolute
from canter.corpus.utterance import Found, NumberedRows, Problem


def read_nemo_tarred(path: str, options: ReadOptions, audio: str) -> NumberedRows:
    """Yield the rows of a NeMo manifest whose audio is in one tar, or in several, numbered by ``shard_id``.

    ``audio`` is a tar or a pattern of tars. Format: NeMo's ``convert_to_tarred_audio_dataset``, whose ``a-sub1.wav`` is
    the second segment of member ``a.wav``.
    """
    tars, columns = expand_shards(audio), options.columns
    opened: dict[str, dict[str, Member]] = {}
    problems: list[Problem] = []

    def members(tar: str) -> dict[str, Member]:
        if tar not in opened:
            found = list(walk_tar(tar))
            problems.extend(one for one in found if isinstance(one, Problem))
            opened[tar] = {one.name: one for one in found if isinstance(one, Member)}
        return opened[tar]

    def parse(line: bytes) -> Found:
        row = parse_line(line)
        if not isinstance(row, dict):
            return row if isinstance(row, str) else utterance_from_row(row, "")
        name, shard = columns.of(row, "audio"), row.get("shard_id", 0)
        if isinstance(name, str) and not row.get("_skipme"):
            if len(tars) > 1 and (type(shard) is not int or not 0 <= shard < len(tars)):
                return f"shard_id is not one of the {len(tars)} tars: {shard!r}"
            tar = tars[shard] if len(tars) > 1 else tars[0]
            name = posixpath.normpath(name)
            member = members(tar).get(name) or members(tar).get(without_sub(name))
            if member is None:
                return f"no such member in the tar: {name!r} is not in {tar}"
            row[columns.audio or "audio_filepath"] = member_ref(absolute(tar), member.name, member.start, member.size)
        return utterance_from_row(row, "", options)

    for row in read_json_lines(path, parse):
        yield from ((problem.line, problem) for problem in problems)
        problems.clear()
        yield row


def read_webdataset(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the samples of a WebDataset tar: members ``KEY.flac`` with ``KEY.txt`` and/or ``KEY.json``.

    The JSON may hold any manifest field; a missing ``duration`` is read from the audio's header. Members of a sample
    need not be neighbours. Format: the WebDataset specification (the key is the path up to the first dot of its last
    part). Where a key has several audio files, such as ``a.1.flac`` and ``a.2.flac``, each is a sample, with the
    members that share its name up to the last dot.
    """
    samples: list[_Sample] = []
    open_keys: dict[str, _Sample] = {}
    for member in walk_tar(path):
        if isinstance(member, Problem):
            yield member.line, member
            continue
        folder, base = posixpath.split(member.name)
        stem, _, extension = base.partition(".")
        key, extension = posixpath.join(folder, stem), extension.lower()
        sample = open_keys.get(key)
        if sample is None or extension in sample.members:  # a repeated key begins another sample
            sample = open_keys[key] = _Sample(key, {})
            samples.append(sample)
        sample.members[extension] = member
    with open_manifest(path) as file:
        for sample in samples:
            for one in sample.split():
                number, row = _webdataset_row(one, path, file, options.columns)
                if isinstance(row, dict):
                    row = utterance_from_row(row, "", options.for_fields)
                    row = f"{row} ({one.key})" if isinstance(row, str) else row
                yield number, row


@dataclass(frozen=True, slots=True)
class _Sample:
    """Members of a tar that share a key, by extension: everything after the key and a dot, in lower case."""

    key: str
    members: dict[str, Member]

    @property
    def audio(self) -> list[str]:
        return [one for one in self.members if "." + one.rsplit(".", 1)[-1] in AUDIO_SUFFIXES]

    def split(self) -> "list[_Sample]":
        """Return a sample for each name up to the last dot, where some audio has a longer name than the key.

        Members named after the key then belong to every sample, unless there is audio among them.
        """
        groups: dict[str, dict[str, Member]] = {}
        for extension, member in self.members.items():
            name, _, kind = extension.rpartition(".")
            groups.setdefault(name, {})[kind] = member
        spoken = {one.rpartition(".")[0] for one in self.audio}
        if len(groups) == 1 or spoken <= {""}:
            return [self]
        shared = {} if "" in spoken else groups.pop("", {})
        return [
            _Sample(f"{self.key}.{name}" if name else self.key, {**shared, **members})
            for name, members in groups.items()
        ]

    def get(self, *kinds: str) -> Member | None:
        """Return the member of the first kind present, named after the key or after the audio."""
        name = self.audio[0].rpartition(".")[0] if self.audio else ""
        wanted = (one for kind in kinds for one in (f"{name}.{kind}" if name else kind, kind))
        return next((self.members[one] for one in wanted if one in self.members), None)


def _webdataset_row(
    sample: _Sample, path: str, file: BinaryIO, columns: Columns
) -> tuple[int, dict[str, object] | str]:
    """Return the number of a member of the sample, and its row or the reason why it cannot be used."""
    number = min(member.number for member in sample.members.values())
    if not sample.audio:
        return number, f"no audio in the sample: {sample.key!r} has {', '.join(sample.members)}"
    row: object = {}
    described = sample.get("json")
    if described is not None:
        file.seek(described.start)
        row = parse_line(file.read(described.size))
    if not isinstance(row, dict):
        assert described is not None
        return described.number, row if isinstance(row, str) else f"{described.name} is not an object"
    name, start, size, number = sample.members[sample.audio[0]]
    row = common_fields(row, columns)
    row["audio_filepath"] = member_ref(absolute(path), name, start, size)
    text = None if columns.text else sample.get("txt", "text", "transcript", "lab")
    if text is not None:
        file.seek(text.start)
        try:
            row["text"] = file.read(text.size).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            return text.number, f"invalid UTF-8: {error.reason} in {text.name!r}"
    return number, row
