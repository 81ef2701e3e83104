"""Languages as people write them (``en``, ``EN``, ``English``, ``en-US``, ``eng``), and their codes.

Codes are those of ISO 639-1 where a language has one, else of ISO 639-3, as in Whisper's and FLEURS' lists.
languages.txt has a line for each language: its codes, the preferred one first, and its English names. A model may use
another code of a language (``jw`` and ``jv``, ``zh`` and ``cmn``): `resolve` finds it.
"""

# pyright: strict

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeGuard

from canter.errors import ConfigError

NOT_SAID = frozenset(("", "auto", "und", "unknown", "none", "null"))
SHOWN = 12  # languages that an error message lists
_CODE = re.compile(r"[a-z]{2,3}")
_MARKS = re.compile(r"<\||\|>|\(.*?\)|（.*?）")
_SEPARATORS = re.compile(r"[\s_,-]+")


def is_said(written: str | None) -> TypeGuard[str]:
    """Return whether the value names a language: not None, empty, or ``auto``."""
    return written is not None and written.strip().lower() not in NOT_SAID


def canonical(written: str) -> str | None:
    """Return the preferred code of the language that ``written`` names, as a code or in English, or None.

    A region or script after a code (``pt-BR``, ``cmn_hans_cn``) and Whisper's brackets (``<|en|>``) are ignored. A
    well-formed code that is not in the list is returned as it is.
    """
    text = _SEPARATORS.sub(" ", _MARKS.sub(" ", written)).strip().casefold()
    codes = _codes()
    if text in codes:
        return codes[text]
    first = text.partition(" ")[0]
    return codes.get(first, first if _CODE.fullmatch(first) else None)


def english_name(code: str) -> str:
    """Return the English name of a language's code, or the code itself where it is not in the list."""
    return _names().get(code, code)


def same(one: str, other: str) -> bool:
    """Return whether two values name the same language."""
    found = canonical(one)
    return one == other or (found is not None and found == canonical(other))


def find(written: str, known: Iterable[str]) -> str | None:
    """Return the one of the codes ``known`` that means the language written, or None.

    An equal code, apart from case and separators, is preferred, so that ``pt-PT`` and ``pt-BR`` may both be known; then
    one of the same language with an equal script or region (``cmn_Hant`` for ``zh-Hant``), then the shortest one.
    """
    names = list(known)
    if written in names:
        return written
    plain = _plain(written)
    exact = [name for name in names if _plain(name) == plain]
    code = canonical(written)
    alike = [name for name in names if code is not None and canonical(name) == code]
    return min(exact or alike, key=lambda name: (_subtags(name) != _subtags(written), len(name)), default=None)


def resolve(written: str, known: Sequence[str]) -> str:
    """Return the code of `find`. Raises ConfigError, naming the value and the known languages, where there is none."""
    found = find(written, known)
    if found is not None:
        return found
    code = canonical(written)
    name = english_name(code) if code else ""
    what = f"{written!r} ({name})" if code and name.casefold() not in (code, written.casefold()) else f"{written!r}"
    if code is None:
        raise ConfigError(f"{what} is not the name or code of a language; {listed(known)}")
    raise ConfigError(f"{what} is not a language of this model; {listed(known)}")


def listed(known: Sequence[str]) -> str:
    """Return the part of an error message that lists the known languages; of many only the first."""
    return f"it knows {shortened(known)}" if known else "it has no languages to choose from"


def shortened(names: Sequence[str]) -> str:
    """Return the names as a list in words; of many only the first and the number of the others."""
    more = len(names) - SHOWN
    return ", ".join(names if more <= 1 else [*names[:SHOWN], f"and {more} more"])


def _plain(text: str) -> str:
    return _SEPARATORS.sub("-", _MARKS.sub("", text).strip()).casefold()


def _subtags(code: str) -> str:
    return _plain(code).partition("-")[2]


@functools.cache
def _table() -> list[tuple[list[str], list[str]]]:
    """Return the codes and the English names of every language, the preferred ones first."""
    lines = Path(__file__).with_name("languages.txt").read_text(encoding="utf-8").splitlines()
    rows = (line.split(": ") for line in lines)
    return [(codes.split(), names.split(", ")) for codes, names in rows]


@functools.cache
def _codes() -> dict[str, str]:
    """Map every code and name, in lower case, to the language's preferred code."""
    found: dict[str, str] = {}
    for codes, names in _table():
        for one in (*codes, *names):
            found.setdefault(_SEPARATORS.sub(" ", one).casefold(), codes[0])
    return found


@functools.cache
def _names() -> dict[str, str]:
    return {codes[0]: names[0] for codes, names in _table()}
