"""Convert plain values, as in YAML and JSON, to frozen dataclasses and back; errors name the file and the field."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from canter.errors import CanterError, ConfigError
from canter.untrusted import Json

T = TypeVar("T")


@dataclass(frozen=True)
class FileOnly:
    """Mark, in ``Annotated[TYPE, FileOnly()]``, of a setting that configuration files and Python have, but no flag."""


@dataclass(frozen=True)
class Read:
    """Annotation of a field that a function converts from its plain value: ``Annotated[TYPE, Read(function)]``.

    ``function(value, base)`` returns the field's value; relative paths are relative to the folder ``base``.
    """

    function: Callable[..., object]


def from_mapping(
    cls: type[T],
    content: object,
    where: str,
    *,
    base: Path | None = None,
    error: type[CanterError] = ConfigError,
    known: Mapping[str, type] | None = None,
    exact: bool = False,
) -> T:
    """Return the dataclass ``cls`` with the fields in ``content``; other fields take their defaults.

    where: file (and field) that errors name.
    base: folder that relative paths are relative to.
    known: types of fields that ``cls`` leaves open (a union or a Protocol).
    exact: numbers in quotes are refused, as JSON has no need of them.

    Raises ``error`` where ``content`` is not a mapping, and for unknown fields (with the nearest known one), values of
    another type, and missing fields without a default.
    """
    if not isinstance(content, dict):
        raise error(f"{where}: expected a mapping of settings, found {content!r:.80}")
    hints = typing.get_type_hints(cls, include_extras=True) | dict(known or {})
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(fields))}"
            raise error(f"{where}: unknown setting '{str(key)[:80]}'; {hint}")
        values[key] = _value(value, hints[key], f"{where}: {key}", base, error, exact)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise error(f"{where}: {missing[0]} is missing")
    try:
        return cls(**values)
    except error as reason:
        raise error(f"{where}: {reason}") from None


def _value(value: object, hint: Any, where: str, base: Path | None, error: type[CanterError], exact: bool) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        reader = next((mark for mark in arguments[1:] if isinstance(mark, Read)), None)
        if reader is None:
            return _value(value, arguments[0], where, base, error, exact)
        try:
            return reader.function(value, base)
        except error as reason:
            raise error(f"{where}: {reason}") from None
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where, base=base, error=error, exact=exact)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, where, base, error, exact)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(item, arguments[0], where, base, error, exact) for item in items)
    if origin is Literal:
        if value not in arguments:
            raise error(f"{where}: {value!r:.80} is none of {', '.join(map(str, arguments))}")
        return value
    if origin in (dict, Mapping) or (origin is not None and issubclass(origin, Mapping)):
        hint = dict
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str):
        return base / value if base is not None else Path(value)
    if hint is float and isinstance(value, int | float if exact else int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-3 as a string
        except (ValueError, OverflowError):
            pass
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise error(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r:.80}")


def _one_of(
    value: object, arguments: tuple[Any, ...], where: str, base: Path | None, error: type[CanterError], exact: bool
) -> object:
    """Return the value of a union: None, one of its literals, or a value of its first other type."""
    kinds = [kind for kind in arguments if kind is not types.NoneType]
    optional = len(kinds) < len(arguments)
    if value is None and optional:
        return None
    if isinstance(value, str) and value.lower() == "none" and optional and not {str, Path} & set(kinds):
        return None
    words = [word for kind in kinds for word in typing.get_args(kind) if typing.get_origin(kind) is Literal]
    if isinstance(value, str) and value in words:
        return value
    others = [kind for kind in kinds if typing.get_origin(kind) is not Literal]
    return _value(value, (others or kinds)[0], where, base, error, exact)


def to_mapping(value: object) -> dict[str, Json]:
    """Return a dataclass as plain values for YAML or JSON: paths as strings, tuples as lists."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {key: plain(item) for key, item in dataclasses.asdict(typing.cast(Any, value)).items()}
