"""Fill a frozen dataclass of options from the command line with tyro, and show a readable help."""

import dataclasses
import functools
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from canter.fields import FileOnly

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec

    from canter.planning.lengths import GivenLimits

T = TypeVar("T")
KINDS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}


def parse(
    options: type[T], arguments: Sequence[str], prog: str, description: str | None, default: T | None = None
) -> T:
    """Return the options in ``arguments``, the others from ``default`` or the defaults of the dataclass."""
    import tyro

    _annotate(options)
    given: dict[str, Any] = {} if default is None else {"default": default}
    description = "\n\n".join(" ".join(part.split()) for part in (description or "").split("\n\n"))
    return tyro.cli(options, args=list(arguments), prog=prog, description=description, **given)


@functools.cache
def _annotate(options: type) -> None:
    """Annotate the fields of a dataclass with how tyro reads and shows them.

    Docstrings become one paragraph. An optional number shows as `FLOAT` instead of `{None}|FLOAT`, an absent default as
    `none`, and a positional argument by its name instead of `PATH`.
    """
    import docstring_parser
    import tyro

    help_texts = {
        one.arg_name: one.description
        for kind in reversed(
            options.__mro__[:-1]
        )  # inherited fields have their docstrings in the class that declares them
        for one in docstring_parser.parse_from_object(kind).params
    }
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        bare, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(bare):
            _annotate(typing.cast(type, bare))
            continue
        if any(isinstance(mark, FileOnly) for mark in marks):
            options.__annotations__[field.name] = Annotated[hint, tyro.conf.Suppress]
            continue
        text = " ".join((help_texts.get(field.name) or "").split())
        default = metavar = None
        if text.endswith(("(required).", "(required)")) or "(default: " in text:
            default = ""  # the text says it
        elif field.default in (None, (), ""):
            default = "(default: none)"
        elif isinstance(field.default, float) and field.default >= 1e6:
            default = f"(default: {field.default:g})"
        kind, *others = [kind for kind in typing.get_args(bare) if kind is not types.NoneType] or [bare]
        if tyro.conf.Positional in marks and typing.get_origin(bare) is tuple:
            metavar, default = f"{field.name.upper()[:-1]} ...", "(required)"
        elif tyro.conf.Positional in marks and typing.get_origin(bare) is not Literal:
            metavar = f"[{field.name.upper()}]" if field.default is None else field.name.upper()
        elif typing.get_origin(bare) in (typing.Union, types.UnionType) and not others:
            metavar = KINDS.get(kind, f"{{{','.join(map(str, typing.get_args(kind)))}}}")
        marked = Annotated[hint, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=default)]
        if (constructor := _constructor(bare)) is not None:
            marked = Annotated[marked, constructor]
        options.__annotations__[field.name] = marked


def _constructor(hint: object) -> "PrimitiveConstructorSpec | None":
    """Return how tyro reads an optional number, for which it also takes ``none``, or limits on tokens a second.

    Returns None for any other type, which tyro reads by its own rules.
    """
    from tyro.constructors import PrimitiveConstructorSpec

    from canter.planning.lengths import GivenLimits, rate_limits

    if hint == GivenLimits:
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[LIMIT | SECONDS:LIMIT ... | auto]",
            instance_from_str=lambda words: None if words in (["none"], ["None"]) else rate_limits(words),
            is_instance=lambda value: value in (None, "auto") or isinstance(value, float | tuple),
            str_from_instance=_limits_as_typed,
        )
    kinds = typing.get_args(hint)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    numbers = [kind for kind in kinds if kind in (int, float)]
    if types.NoneType not in kinds or len(numbers) != 1 or len(numbers) + bool(words) + 1 != len(kinds):
        return None
    (number,) = numbers

    def read(given: list[str]) -> object:
        if given[0].lower() == "none":
            return None
        if given[0] in words:
            return given[0]
        try:
            return number(given[0])
        except ValueError:
            what = "a whole number" if number is int else "a number"
            raise ValueError(f"expected {', '.join([*words, 'none'])} or {what}, found '{given[0]}'") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join([*words, "none", KINDS[number]]) if words else KINDS[number],
        instance_from_str=read,
        is_instance=lambda value: value is None or value in words or isinstance(value, number | int),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def _limits_as_typed(limits: "GivenLimits") -> list[str]:
    if limits is None:
        return ["none"]
    if isinstance(limits, str):
        return [limits]
    if isinstance(limits, tuple):
        return [f"{seconds:g}:{limit:g}" for seconds, limit in limits]
    return [f"{limits:g}"]
