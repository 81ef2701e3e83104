"""Audio files, folders and manifests that a user names, as a list of items to transcribe."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from canter.corpus.audio import STANDARD_INPUT, audio_seconds
from canter.corpus.columns import ReadOptions
from canter.corpus.manifest import (
    Problem,
    Utterance,
    open_manifest,
    parse_line,
    row_from_utterance,
    scan_lines,
    utterance_from_row,
)
from canter.corpus.media import is_media, media_in
from canter.corpus.remote import absolute, folder_of, is_url
from canter.corpus.sources import Unit, open_source, units_of
from canter.errors import AudioError, ConfigError, ManifestError
from canter.inference.languages import Defaults
from canter.redaction import redacted

Channel = int | Literal["each", "mix"]
"""Channel of recordings with several, from 0: one of them, each by itself, or the average of all."""


def read_channel(value: str | int) -> Channel:
    """Return the channel that a user names. Raises ConfigError for anything but "each", "mix" or a number from 0."""
    text = str(value)
    if text in ("each", "mix"):
        return cast(Channel, text)
    if isinstance(value, bool) or not text.isascii() or not text.isdecimal():
        raise ConfigError(f"channel is {text[:40]!r}; it must be each, mix, or the number of a channel, from 0")
    return int(text)


@dataclass(frozen=True)
class Item:
    """One utterance to transcribe and the row it comes from."""

    row: dict[str, object]
    """Fields of the manifest's row, or path and duration of an audio file."""
    utterance: Utterance | None
    problem: str | None = None
    """Reason why there is no utterance."""

    def __post_init__(self) -> None:
        if self.problem is not None:
            object.__setattr__(self, "problem", redacted(self.problem))

    @property
    def path(self) -> str | None:
        """Path of the audio in the row, without the secrets of a URL."""
        path = self.row.get("audio_filepath")
        return redacted(path) if isinstance(path, str) else None

    def on(self, channel: Channel) -> "Item":
        """Return the item with that channel where it names none and ``channel`` is a number."""
        if self.utterance is None or not isinstance(channel, int) or self.utterance.channel_selector is not None:
            return self
        row, utterance = self.row | {"channel_selector": channel}, replace(self.utterance, channel_selector=channel)
        return replace(self, row=row, utterance=utterance)

    def completed(self, defaults: Defaults) -> "Item":
        """Return the item with unset fields taken from ``defaults``; with a problem where it lacks a language."""
        if self.utterance is None:
            return self
        try:
            return replace(self, utterance=defaults.complete(self.utterance))
        except ConfigError as error:
            return replace(self, utterance=None, problem=str(error))


def names_of(items: Sequence[Item], most: int = 5) -> str:
    """Return the file names of the first items, and the number of other ones."""
    names = [*dict.fromkeys(Path(str(item.path)).name for item in items)]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_items(
    paths: Iterable[str | os.PathLike[str]],
    *,
    defaults: Defaults | None = None,
    track: int | None = None,
    channel: Channel = "mix",
) -> list[Item]:
    """Return the items of audio files, folders and manifests, in the order given; ``-`` is standard input.

    ``track`` is the audio track of files with several, ``channel`` that of items that name none. A path that is nothing
    of the kind, or a folder or manifest without a single item, is an item with a problem. Raises ManifestError where
    that holds for all paths.
    """
    items: list[Item] = []
    failures: list[str] = []
    names = [os.fspath(path) for path in paths]
    for path in names:
        problem = f"{path} holds nothing to transcribe"
        try:
            found = list(_items(path, track))
        except ManifestError as error:
            found, problem = [], str(error)
        if not any(item.utterance for item in found) and path != STANDARD_INPUT and not is_media(path):
            reasons = "".join(f"\n  {item.problem}" for item in found[:3])
            failures.append(problem + (":" + reasons if reasons else ""))
            found = found or [Item({"audio_filepath": path}, None, problem)]
        items += found
    if failures and len(failures) == len(names):
        raise ManifestError("\n".join(failures))
    return [item.on(channel).completed(defaults or Defaults()) for item in items]


def files_in(path: str) -> list[str] | None:
    """Return the audio and video files below a folder without a manifest; None for any other path."""
    if not os.path.isdir(path) or [unit.kind for unit in units_of(path)] != ["folder"]:
        return None
    return media_in(os.path.abspath(path))[0]


def items_of(path: str | os.PathLike[str], defaults: Defaults, channel: Channel = "mix") -> Iterator[Item]:
    """Yield the items of one audio file, folder or manifest as they are read. Raises ManifestError for any other
    path."""
    for item in _items(os.fspath(path)):
        yield item.on(channel).completed(defaults)


def _items(path: str, track: int | None = None) -> Iterator[Item]:
    if path == STANDARD_INPUT:
        yield _audio(path, track)
        return
    if is_media(path):
        yield _audio(absolute(path), track)
        return
    if not is_url(path) and not os.path.exists(path) and "::" not in path and "{" not in path and "_OP_" not in path:
        raise ManifestError(f"{path} does not exist; give audio files, folders or manifests")
    units = _units(path)
    if [unit.kind for unit in units] == ["folder"]:
        yield from (_audio(file, track) for file in media_in(os.path.abspath(path))[0])
    elif [unit.kind for unit in units] == ["nemo"]:
        yield from _nemo(units[0].path)
    else:
        for found in open_source(path, require_text=False, measure_durations=True):
            if isinstance(found, Problem):
                yield Item({"audio_filepath": found.file}, None, str(found))
            else:
                yield Item(row_from_utterance(found), found)


def _units(path: str) -> list[Unit]:
    """Return the units of a path. A folder of recordings counts as that, whatever manifests it contains, unless it is
    clear which of them lists the recordings."""
    try:
        return units_of(path)
    except ManifestError:
        if os.path.isdir(path) and media_in(path)[0]:
            return [Unit("folder", path)]
        raise


def _audio(path: str, track: int | None = None) -> Item:
    try:
        seconds = audio_seconds(path, track=track)
    except AudioError as error:
        return Item({"audio_filepath": path}, None, str(error))
    return Item({"audio_filepath": path, "duration": round(seconds, 3)}, Utterance(path, seconds, text=""))


def _nemo(path: str) -> Iterator[Item]:
    """Yield the rows of a NeMo manifest with all their fields, without rows marked ``_skipme``."""
    base = folder_of(path)
    with open_manifest(path) as file:
        for _, number, line in scan_lines(file):
            found = row = parse_line(line)
            if isinstance(row, dict):
                found = utterance_from_row(row, base, ReadOptions(require_text=False, measure_durations=True))
            fields = row if isinstance(row, dict) else {}
            if isinstance(found, Utterance):
                yield Item(fields, found)
            elif found is not None:
                yield Item(fields, None, str(Problem(path, number, str(found))))
