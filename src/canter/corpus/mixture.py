"""Mixtures of sources: groups in groups, with weights and temperatures, read from YAML.

The YAML is NeMo's ``input_cfg``: a list of sources (``manifest_filepath``, ``tarred_audio_filepaths``,
``cuts_path``, ``shar_path``, or ``path`` for anything) and of groups (``type: group`` with an
``input_cfg`` of their own), each with optional ``weight`` and ``tags``; a group may have a
``temperature``. Relative paths are relative to the file.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from canter.corpus.columns import ANY, Columns
from canter.corpus.index import Source
from canter.corpus.remote import below, refuse_special
from canter.corpus.utterance import OPTIONAL_TEXT
from canter.errors import ConfigError, ManifestError
from canter.untrusted import read_yaml_value

PATH_KEYS = ("path", "manifest_filepath", "cuts_path", "shar_path")
COLUMNS = ("text", "lang", "audio")  # with _column behind them: what a source calls them
KNOWN = {
    *PATH_KEYS,
    *(f"{name}_column" for name in COLUMNS),
    "type",
    "name",
    "weight",
    "tags",
    "input_cfg",
    "temperature",
    "tarred_audio_filepaths",
}
DEEPEST = 16


@dataclass(frozen=True)
class Group:
    """Sources and groups that share one weight. Theirs are raised to ``temperature`` (1: as they are; 0:
    all equal).

    ``temperature`` None is that of the group around this one. Members without weights count by their
    rows; siblings either all have a weight or none.
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
    """The sources of a group, depth first."""
    for member in group.members:
        if isinstance(member, Group):
            yield from leaves(member)
        else:
            yield member


def is_weighted(group: Group) -> bool:
    """Whether anything in it has a weight or a temperature, so that its rows are not drawn equally often."""
    inside = [member for member in group.members if isinstance(member, Group)]
    told = group.temperature is not None or any(member.weight is not None for member in group.members)
    return told or any(map(is_weighted, inside))


def mixture_of(paths: Sequence[str | os.PathLike[str]]) -> Group | None:
    """The mixture that ``paths`` name, if they do. Raises `ConfigError` for one among others."""
    mixtures = [os.fspath(path) for path in paths if os.fspath(path).endswith((".yaml", ".yml"))]
    if mixtures and len(paths) > 1:
        raise ConfigError(f"{mixtures[0]} is a mixture: name it alone, and further sources inside it")
    return read_mixture(mixtures[0]) if mixtures else None


def with_columns(group: Group, columns: Columns) -> Group:
    """Return the group with these columns for the sources that name none of their own."""
    members = [
        with_columns(one, columns) if isinstance(one, Group) else one if one.columns else replace(one, columns=columns)
        for one in group.members
    ]
    return replace(group, members=members)


def sources_of(paths: Sequence[str | os.PathLike[str]], columns: Columns = ANY) -> Group | list[Source]:
    """Return the mixture that ``paths`` name, or a source for each. Raises ConfigError for a mixture among others."""
    group = mixture_of(paths)
    if group is None:
        return [Source(os.fspath(path), columns=columns) for path in paths]
    return with_columns(group, columns) if columns else group


def shares(group: Group, rows: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """(sources,) float64 summing to 1: each leaf's share of the draws, ``rows`` being how many each has."""
    temperature = temperature if group.temperature is None else group.temperature
    weights, below = [], []
    first = 0
    for member in group.members:
        count = sum(1 for _ in leaves(member)) if isinstance(member, Group) else 1
        mine = rows[first : first + count]
        first += count
        weights.append(float(sum(mine)) if member.weight is None else member.weight)
        below.append(shares(member, mine, temperature) if isinstance(member, Group) else np.ones(1))
    scaled = np.array(weights) ** temperature
    return np.concatenate([share * part for share, part in zip(scaled / scaled.sum(), below, strict=True)])


def read_mixture(path: str | os.PathLike[str]) -> Group:
    """The group in a YAML file. Raises `ConfigError` naming the entry that cannot be understood."""
    return _file(Path(path), {}, 0)


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


def _group(entry: Any, file: Path, where: str, tags: Mapping[str, str], depth: int) -> Group:
    if depth > DEEPEST:
        raise ConfigError(f"{file}: {where}: groups are nested more than {DEEPEST} deep; does a file include itself?")
    if not isinstance(entry, dict) or "input_cfg" not in entry:
        raise ConfigError(f"{file}: {where} is not a list of sources, nor a group with an input_cfg")
    _check(entry, file, where)
    inner = {**tags, **_tags(entry, file, where)}
    content = entry["input_cfg"]
    weight, temperature = _number(entry, "weight", file, where), _number(entry, "temperature", file, where)
    name = str(entry.get("name") or where)
    if isinstance(content, str):
        group = _file(file.parent / content, inner, depth + 1)
        temperature = group.temperature if temperature is None else temperature
        return Group(group.members, weight, temperature, name)
    if not isinstance(content, list):
        raise ConfigError(f"{file}: {where}: input_cfg must be a list, or the path of a YAML file that holds one")
    members = [_member(one, file, f"{where}[{position}]", inner, depth) for position, one in enumerate(content)]
    return Group(members, weight, temperature, name)


def _member(entry: Any, file: Path, where: str, tags: Mapping[str, str], depth: int) -> Source | Group:
    if isinstance(entry, dict) and "input_cfg" in entry:
        return _group(entry, file, where, tags, depth + 1)
    keys = [key for key in PATH_KEYS if key in entry] if isinstance(entry, dict) else []
    if len(keys) != 1 or not isinstance(entry[keys[0]], (str, list)):
        raise ConfigError(f"{file}: {where} must name its data by one of {', '.join(PATH_KEYS)}")
    _check(entry, file, where)
    path, audio = entry[keys[0]], entry.get("tarred_audio_filepaths") or ""
    if not isinstance(path, str) or not isinstance(audio, str):
        raise ConfigError(f"{file}: {where}: give one path; several are written x_{{0..3}}.json, or as several entries")
    inner = {**tags, **_tags(entry, file, where)}
    weight = _number(entry, "weight", file, where)
    audio = below(file.parent, audio) if audio else ""
    columns = Columns(**{name: _column(entry, name, file, where) for name in COLUMNS})
    return Source(below(file.parent, path), str(entry.get("name") or ""), weight, audio, inner, columns)


def _check(entry: Mapping[str, Any], file: Path, where: str) -> None:
    unknown = sorted(str(key) for key in set(entry) - KNOWN)
    if unknown:
        raise ConfigError(f"{file}: {where}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(KNOWN))}")


def _tags(entry: Mapping[str, Any], file: Path, where: str) -> dict[str, str]:
    tags = entry.get("tags") or {}
    if not isinstance(tags, dict):
        raise ConfigError(f"{file}: {where}: tags must be names and strings, such as tags: {{lang: en}}")
    for name, value in tags.items():
        if name not in OPTIONAL_TEXT:
            raise ConfigError(
                f"{file}: {where}: tag {name!r} is none of those that Canter reads ({', '.join(OPTIONAL_TEXT)}); "
                "rename it, or remove it"
            )
        if not isinstance(value, str):
            raise ConfigError(
                f"{file}: {where}: tag {name} is {value!r}, not a string; quote it (yes and no are YAML's booleans)"
            )
    return tags


def _column(entry: Mapping[str, Any], name: str, file: Path, where: str) -> str:
    value = entry.get(f"{name}_column") or ""
    if not isinstance(value, str):
        raise ConfigError(f"{file}: {where}: {name}_column {value!r} is not the name of a column")
    return value


def _number(entry: Mapping[str, Any], key: str, file: Path, where: str) -> float | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"{file}: {where}: {key} {value!r} is not a number")
    return None if value is None else float(value)
