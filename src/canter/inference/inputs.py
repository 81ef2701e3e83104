"""What the user names, audio files, folders and manifests, as a list of items to transcribe."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from canter.redaction import redacted
from canter.text.languages import canonical, is_said, resolve, same, shortened
from canter.text.prompts import utterance_slots
from canter.text.tokenizer import Tokenizer
from canter.text.whisper import WhisperTokenizer


@dataclass(frozen=True)
class Item:
    """One utterance to transcribe and the row it comes from."""

    row: dict[str, Any]
    """The manifest's fields as they are; of an audio file its path and duration."""
    utterance: Utterance | None
    problem: str | None = None
    """Why there is no utterance."""

    def __post_init__(self) -> None:
        if self.problem is not None:
            object.__setattr__(self, "problem", redacted(self.problem))


@dataclass(frozen=True)
class Defaults:
    """What rows are taken to say that say nothing of it."""

    language: str | None = None
    """Spoken."""
    task: Literal["transcribe", "translate"] | None = None
    target_language: str = "en"
    """Written, where the task is to translate."""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        language: str | None,
        task: Literal["transcribe", "translate"] | None = None,
        target_language: str = "en",
    ) -> "Defaults":
        """Return the defaults that a user asks of a model, with languages in the model's own codes.

        The one language of a model that knows no other is the default. Raises ConfigError for languages that the model
        does not know, and for a translation that it cannot make.
        """
        known = tokenizer.languages
        spoken = None
        if is_said(language):
            spoken = resolve(language, known) if known else _label(tokenizer, language)
        elif len(known) == 1:
            spoken = known[0]
        if task != "translate":
            return cls(spoken, task)
        if len(known) < 2:
            raise ConfigError("this model knows one language alone and cannot translate; leave the task out")
        written = resolve(target_language, known)
        if isinstance(tokenizer, WhisperTokenizer) and not same(written, "en"):
            raise ConfigError(f"a Whisper translates into English alone, not into {target_language!r}")
        return cls(spoken, task, written)

    def complete(self, item: Item) -> Item:
        """Return the item with what its row leaves open taken from here."""
        return _completed(item, self)


def _label(tokenizer: Tokenizer, language: str) -> str:
    """Return the code of a language for a model that has none to choose from. Raises ConfigError where its prompt would
    have to name it."""
    code = canonical(language)
    if code is None:
        raise ConfigError(f"{language!r} is not the name or code of a language")
    try:
        tokenizer.prompt_ids({"source_lang": code, "target_lang": code})
    except ConfigError:
        resolve(language, ())  # which raises
    return code


def read_items(
    paths: Iterable[str | os.PathLike[str]],
    lang: str | None = None,
    defaults: Defaults | None = None,
    track: int | None = None,
) -> list[Item]:
    """The items of audio files, folders and manifests of any kind, in the order given; ``lang`` is short for
    defaults with that language, and ``track`` the audio track of files with several. ``-`` is a recording on standard
    input.

    A path that is nothing of the kind, or a folder or manifest without a single item, is an item with a problem;
    ManifestError where that holds for all of them.
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
    defaults = defaults or Defaults(lang)
    return [_completed(item, defaults) for item in items]


def require_language(items: Iterable[Item], languages: Sequence[str]) -> list[Item]:
    """The items; those that name no language, or of a translation only the one it is to be in, have a problem instead
    of an utterance."""
    return [
        replace(
            item,
            utterance=None,
            problem=f"{utterance.audio_filepath} names no language, and the model "
            f"knows {shortened(languages)}: give 'lang' in the manifest, or --language",
        )
        if (utterance := item.utterance) and "source_lang" not in utterance_slots(utterance)
        else item
        for item in items
    ]


def files_in(path: str) -> list[str] | None:
    """Return the audio and video files below a folder without a manifest, None for any other path."""
    if not os.path.isdir(path) or [unit.kind for unit in units_of(path)] != ["folder"]:
        return None
    return media_in(os.path.abspath(path))[0]


def items_of(path: str | os.PathLike[str], defaults: Defaults | None = None) -> Iterator[Item]:
    """Yield the items of one audio file, folder or manifest as they are read; what ``read_items`` says holds here.

    Raises ManifestError for a path that is nothing of the kind.
    """
    defaults = defaults or Defaults()
    for item in _items(os.fspath(path)):
        yield _completed(item, defaults)


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
    """Return what a path holds. A folder of recordings is that whatever tables and manifests lie there, unless it is
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
    """A NeMo manifest's rows, all their fields kept; rows with ``_skipme`` are passed over."""
    base = folder_of(path)
    with open_manifest(path) as file:
        for _, number, line in scan_lines(file):
            row = parse_line(line)
            found = (
                utterance_from_row(row, base, ReadOptions(require_text=False, measure_durations=True))
                if isinstance(row, dict)
                else row
            )
            if isinstance(found, Utterance) and isinstance(row, dict):
                yield Item(row, found)
            elif found is not None:
                problem = str(Problem(path, number, str(found)))
                yield Item(row if isinstance(row, dict) else {}, None, problem)


def _completed(item: Item, defaults: Defaults) -> Item:
    """The item with what its row leaves open taken from ``defaults``."""
    utterance = item.utterance
    if utterance is None:
        return item
    changes: dict[str, str] = {}
    if defaults.language and not any(map(is_said, (utterance.lang, utterance.source_lang, utterance.target_lang))):
        changes["lang"] = defaults.language
    if defaults.task and not utterance.taskname:
        changes["taskname"] = defaults.task
        if defaults.task == "translate" and not is_said(utterance.target_lang):
            named = (utterance.source_lang, utterance.lang, defaults.language)
            source = next(filter(is_said, named), None)
            changes |= {"source_lang": source} if source else {}
            changes["target_lang"] = defaults.target_language
    return replace(item, utterance=replace(utterance, **changes)) if changes else item
