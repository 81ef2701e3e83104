"""Options from the command line: a frozen dataclass, filled by tyro, with a help that reads well."""

import dataclasses
import functools
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")
KINDS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}


def parse(
    options: type[T],
    arguments: Sequence[str],
    prog: str,
    description: str | None,
    default: T | None = None,
) -> T:
    """The options that ``arguments`` give; those left out are ``default``'s, or the dataclass's own."""
    import tyro

    _polish(options)
    given: dict[str, Any] = {} if default is None else {"default": default}
    description = "\n\n".join(" ".join(part.split()) for part in (description or "").split("\n\n"))
    return tyro.cli(options, args=list(arguments), prog=prog, description=description, **given)


@functools.cache
def _polish(options: type) -> None:
    """Tells tyro, in the annotations, to show a docstring as one paragraph, `FLOAT` where it would show `{None}|FLOAT`,
    `none` as the default of what has none, and names in place of `PATH` for what has no flag."""
    import docstring_parser
    import tyro

    told = {
        one.arg_name: one.description
        for kind in reversed(options.__mro__[:-1])  # inherited fields have their docstrings where they are declared
        for one in docstring_parser.parse_from_object(kind).params
    }
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        hint = hints[field.name]
        bare, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(bare):
            _polish(typing.cast(type, bare))
            continue
        settings: dict[str, Any] = {"help": " ".join((told.get(field.name) or "").split())}
        if settings["help"].endswith(("(required).", "(required)")) or "(default: " in settings["help"]:
            settings["help_behavior_hint"] = ""  # it says so itself
        elif field.default in (None, (), ""):
            settings["help_behavior_hint"] = "(default: none)"
        elif isinstance(field.default, float) and field.default >= 1e6:
            settings["help_behavior_hint"] = f"(default: {field.default:g})"
        kind, *others = [kind for kind in typing.get_args(bare) if kind is not types.NoneType] or [bare]
        if tyro.conf.Positional in marks and typing.get_origin(bare) is tuple:
            settings |= {"metavar": f"{field.name.upper()[:-1]} ...", "help_behavior_hint": "(required)"}
        elif tyro.conf.Positional in marks and typing.get_origin(bare) is not Literal:
            name = field.name.upper()
            settings["metavar"] = f"[{name}]" if field.default is None else name
        elif typing.get_origin(bare) in (typing.Union, types.UnionType) and not others:
            choices = ",".join(map(str, typing.get_args(kind)))
            settings["metavar"] = KINDS.get(kind, f"{{{choices}}}")
        marked = Annotated[hint, tyro.conf.arg(**settings)]
        if (constructor := _constructor(bare)) is not None:
            marked = Annotated[marked, constructor]
        options.__annotations__[field.name] = marked


def _constructor(hint: Any) -> Any:
    """Return how tyro reads a number that may be left open, by the word none too; and limits on tokens a second. None
    for anything else."""
    from tyro.constructors import PrimitiveConstructorSpec

    from canter.planning.lengths import RateLimits, rate_limits

    if hint == RateLimits:
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[LIMIT | SECONDS:LIMIT ...]",
            instance_from_str=lambda words: None if words in (["none"], ["None"]) else rate_limits(words),
            is_instance=lambda value: value is None or isinstance(value, float | tuple),
            str_from_instance=_limits_as_typed,
        )
    kinds = typing.get_args(hint)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    numbers = [kind for kind in kinds if kind in (int, float)]
    if types.NoneType not in kinds or len(numbers) != 1 or len(numbers) + bool(words) + 1 != len(kinds):
        return None
    (number,) = numbers

    def read(given: list[str]) -> Any:
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


def _limits_as_typed(limits: Any) -> list[str]:
    if limits is None:
        return ["none"]
    if isinstance(limits, tuple):
        return [f"{seconds:g}:{limit:g}" for seconds, limit in limits]
    return [f"{limits:g}"]
