"""Mixtures of sources: nested groups with weights and temperatures, read from YAML.

The YAML is NeMo's ``input_cfg``: a list of sources (``manifest_filepath``, ``tarred_audio_filepaths``, ``cuts_path``,
``shar_path``, or ``path`` for any format) and of groups (``type: group`` with an ``input_cfg``), each with optional
``weight`` and ``tags``; a group may have a ``temperature``. Relative paths are relative to the file.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from canter.corpus.columns import ANY, Columns
from canter.corpus.index import Source
from canter.corpus.remote import below, refuse_special
from canter.corpus.utterance import OPTIONAL_TEXT
from canter.errors import ConfigError, ManifestError
from canter.fields import Read, from_mapping
from canter.untrusted import read_yaml_value

PATH_KEYS = ("path", "manifest_filepath", "cuts_path", "shar_path")
DEEPEST = 16


@dataclass(frozen=True)
class Group:
    """Sources and groups that share one weight.

    The members' weights are raised to ``temperature`` (1: unchanged; 0: all equal); None takes that of the group
    around this one. Members without weights are weighted by their rows; either all members have a weight or none.
    """

    members: Sequence["Source | Group"]
    weight: float | None = None
    temperature: float | None = None
    name: str = field(default="group")

    def __post_init__(self) -> None:
        if not self.members:
            raise ManifestError(f"group {self.name} has no members")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ManifestError(f"group {self.name}: weight {self.weight} would never be drawn; leave it out")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ManifestError(f"group {self.name}: temperature {self.temperature} must be 0 or more")
        weights = [member.weight for member in self.members]
        if len({weight is None for weight in weights}) > 1:
            name = self.members[weights.index(None)].name
            raise ManifestError(f"{name} has no weight while others in {self.name} have one: give all, or none")


def leaves(group: Group) -> Iterator[Source]:
    """Yield the sources of a group, depth first."""
    for member in group.members:
        if isinstance(member, Group):
            yield from leaves(member)
        else:
            yield member


def is_weighted(group: Group) -> bool:
    """Return whether a weight or temperature in the group makes some rows be drawn more often than others."""
    if group.temperature is not None or any(member.weight is not None for member in group.members):
        return True
    return any(is_weighted(member) for member in group.members if isinstance(member, Group))


def mixture_of(paths: Sequence[str | os.PathLike[str]]) -> Group | None:
    """Return the mixture that ``paths`` name, or None. Raises ConfigError for a mixture beside other paths."""
    mixtures = [os.fspath(path) for path in paths if os.fspath(path).endswith((".yaml", ".yml"))]
    if mixtures and len(paths) > 1:
        raise ConfigError(f"{mixtures[0]} is a mixture: name it alone, and further sources inside it")
    return read_mixture(mixtures[0]) if mixtures else None


def with_columns(group: Group, columns: Columns) -> Group:
    """Return the group with these columns for the sources that do not name columns."""
    members = [
        with_columns(one, columns) if isinstance(one, Group) else one if one.columns else replace(one, columns=columns)
        for one in group.members
    ]
    return replace(group, members=members)


def sources_of(paths: Sequence[str | os.PathLike[str]], columns: Columns = ANY) -> Group | list[Source]:
    """Return the mixture that ``paths`` name, or a source for each. Raises ConfigError for a mixture beside others."""
    group = mixture_of(paths)
    if group is None:
        return [Source(os.fspath(path), columns=columns) for path in paths]
    return with_columns(group, columns) if columns else group


def fractions(group: Group, rows: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Return (sources,) float64 summing to 1: the fraction of draws from each leaf, which has ``rows[leaf]`` rows."""
    temperature = temperature if group.temperature is None else group.temperature
    weights, inner = [], []
    first = 0
    for member in group.members:
        count = sum(1 for _ in leaves(member)) if isinstance(member, Group) else 1
        own = rows[first : first + count]
        first += count
        weights.append(float(sum(own)) if member.weight is None else member.weight)
        inner.append(fractions(member, own, temperature) if isinstance(member, Group) else np.ones(1))
    scaled = np.array(weights) ** temperature
    return np.concatenate([outer * part for outer, part in zip(scaled / scaled.sum(), inner, strict=True)])


def read_mixture(path: str | os.PathLike[str]) -> Group:
    """Return the group in a YAML file. Raises ConfigError naming the entry that cannot be understood."""
    return _file(Path(path), {}, 0)


def _tags(value: object, base: Path | None) -> Mapping[str, str]:
    tags = value or {}
    if not isinstance(tags, dict):
        raise ConfigError("tags must be names and strings, such as tags: {lang: en}")
    for name, text in tags.items():
        if name not in OPTIONAL_TEXT:
            raise ConfigError(
                f"tag {name!r} is none of those that Canter reads ({', '.join(OPTIONAL_TEXT)}); rename it, or remove it"
            )
        if not isinstance(text, str):
            raise ConfigError(f"tag {name} is {text!r}, not a string; quote it (yes and no are YAML's booleans)")
    return tags


def _path(value: object, base: Path | None) -> str:
    if not isinstance(value or "", str):
        raise ConfigError("give one path; several are written x_{0..3}.json, or as several entries")
    return str(value or "")


def _text(value: object, base: Path | None) -> str:
    return str(value or "")


AnyPath = Annotated[str, Read(_path)]


@dataclass(frozen=True)
class _Entry:
    """A source or group as the YAML writes it."""

    path: AnyPath = ""
    manifest_filepath: AnyPath = ""
    cuts_path: AnyPath = ""
    shar_path: AnyPath = ""
    tarred_audio_filepaths: AnyPath = ""
    input_cfg: object = None
    type: object = None
    name: Annotated[str, Read(_text)] = ""
    weight: float | None = None
    temperature: float | None = None
    tags: Annotated[Mapping[str, str], Read(_tags)] = field(default_factory=dict)
    text_column: str | None = None
    language_column: str | None = None
    audio_column: str | None = None
    lang_column: str | None = None
    """``language_column`` in files of Canter 0.1."""

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column or "", self.language_column or self.lang_column or "", self.audio_column or "")


def _file(path: Path, tags: Mapping[str, str], depth: int) -> Group:
    try:
        refuse_special(path)
        content = read_yaml_value(path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    entry = {"input_cfg": content} if isinstance(content, list) else content
    return _group(entry, path, path.name, tags, depth)


def _group(content: object, file: Path, where: str, tags: Mapping[str, str], depth: int) -> Group:
    if depth > DEEPEST:
        raise ConfigError(f"{file}: {where}: groups are nested more than {DEEPEST} deep; does a file include itself?")
    if not isinstance(content, dict) or "input_cfg" not in content:
        raise ConfigError(f"{file}: {where} is not a list of sources, nor a group with an input_cfg")
    entry = from_mapping(_Entry, content, f"{file}: {where}")
    inner = {**tags, **entry.tags}
    name, temperature = entry.name or where, entry.temperature
    if isinstance(entry.input_cfg, str):
        group = _file(file.parent / entry.input_cfg, inner, depth + 1)
        temperature = group.temperature if temperature is None else temperature
        return Group(group.members, entry.weight, temperature, name)
    if not isinstance(entry.input_cfg, list):
        raise ConfigError(f"{file}: {where}: input_cfg must be a list, or the path of a YAML file that holds one")
    members = [_member(one, file, f"{where}[{at}]", inner, depth) for at, one in enumerate(entry.input_cfg)]
    return Group(members, entry.weight, temperature, name)


def _member(content: object, file: Path, where: str, tags: Mapping[str, str], depth: int) -> Source | Group:
    if isinstance(content, dict) and "input_cfg" in content:
        return _group(content, file, where, tags, depth + 1)
    keys = [key for key in PATH_KEYS if key in content] if isinstance(content, dict) else []
    if not isinstance(content, dict) or len(keys) != 1 or not isinstance(content[keys[0]], (str, list)):
        raise ConfigError(f"{file}: {where} must name its data by one of {', '.join(PATH_KEYS)}")
    entry = from_mapping(_Entry, content, f"{file}: {where}")
    path, tars = below(file.parent, getattr(entry, keys[0])), entry.tarred_audio_filepaths
    audio = below(file.parent, tars) if tars else ""
    return Source(path, entry.name, entry.weight, audio, {**tags, **entry.tags}, entry.columns)
