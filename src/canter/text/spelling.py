"""What the ids of a tokenizer stand for, and the old ids from which the rows of new ids start.

The spelling of an id is its text as bytes (so that pieces of different tokenizers compare: "▁the" and "Ġthe" are both
" the"), the name of a special token, or None for an id without a token.

Rows of embedding and head start so: an id whose spelling the old tokenizer has keeps that row; a new piece gets the
mean of the rows of the fewest old pieces that spell it; a new language token gets the mean of the old language tokens,
or the row of the language that the user names. Means of old rows are the usual start of new tokens (Hewitt,
"Initializing new word embeddings for pretrained language models", 2021).
"""

# pyright: strict

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from tokenizers import pre_tokenizers

from canter.errors import ConfigError
from canter.text.languages import find
from canter.text.tokenizer import Tokenizer

Spelling: TypeAlias = bytes | str | None
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@runtime_checkable
class Spelled(Protocol):
    """A tokenizer that tells what its ids stand for."""

    def spelling(self, number: int) -> Spelling:
        """Return the text of an id as bytes, the name of a special token, or None for an id without a token."""
        ...


def spellings(tokenizer: Tokenizer) -> list[Spelling]:
    """Return the spelling of every id. Raises ConfigError for a tokenizer of another library, which does not tell."""
    if not isinstance(tokenizer, Spelled):
        raise ConfigError(f"the vocabulary of a {type(tokenizer).__name__} cannot be changed")
    return [tokenizer.spelling(number) for number in range(tokenizer.vocab_size)]


def piece_bytes(piece: str) -> bytes:
    """Return the text of a SentencePiece piece: "▁" is a space, "<0x41>" a byte."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


@functools.cache
def byte_symbols() -> dict[str, int]:
    """Map the 256 characters of a byte-level BPE (GPT-2's) to the bytes that they stand for."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in plain)
    symbols = {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert symbols.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return symbols


def symbol_bytes(token: str) -> bytes:
    """Return the text of a token of a byte-level BPE; characters that stand for no byte are themselves."""
    symbols = byte_symbols()
    return b"".join(bytes([symbols[one]]) if one in symbols else one.encode() for one in token)


@dataclass(frozen=True)
class Start:
    """Old ids whose rows give the row of a new id: one is copied, several are averaged."""

    ids: tuple[int, ...]
    kept: bool = False
    """True where the id means the same in the old tokenizer."""


class Vocabulary:
    """The pieces and special tokens of a tokenizer, looked up by what they stand for."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.spelled = spellings(tokenizer)
        self.ids: dict[bytes | str, int] = {}
        for number, spelling in enumerate(self.spelled):
            if spelling is not None:
                self.ids.setdefault(spelling, number)
        self.text = {spelling: number for spelling, number in self.ids.items() if isinstance(spelling, bytes)}
        self.longest = max(map(len, self.text), default=0)
        self.languages = {code: tokenizer.special_id(f"<|{code}|>") for code in tokenizer.languages}

    def cut(self, text: bytes) -> tuple[int, ...]:
        """Return the fewest pieces that spell ``text``, of equally many those with the longer pieces first.

        Bytes that no piece has are left out.
        """
        best: list[tuple[int, int]] = [(0, 0)]  # (cost, length of the first piece) of the text from a place on
        for place in reversed(range(len(text))):
            known = (size for size in range(1, self.longest + 1) if text[place : place + size] in self.text)
            most = len(text) - place
            choices = [(1 + best[-size][0], -size) for size in known if size <= most]
            cost, size = min(choices, default=(len(text) + best[-1][0], -1))  # a byte left out costs more than all
            best.append((cost, -size))
        ids: list[int] = []
        place = 0
        while place < len(text):
            size = best[len(text) - place][1]
            number = self.text.get(text[place : place + size])
            ids += [] if number is None else [number]
            place += size
        return tuple(ids)

    def start(self, spelling: Spelling, like: str | None = None) -> Start | None:
        """Return the old ids from which the row of an id of this spelling starts; None for an id without a token.

        A piece of which no byte is known starts from the mean of all pieces, a language token from that of the language
        ``like`` or the mean of all languages, another special token from the mean of all special tokens.
        """
        if spelling is None:
            return None
        if spelling in self.ids:
            return Start((self.ids[spelling],), kept=True)
        if isinstance(spelling, bytes):
            return Start(self.cut(spelling) or tuple(self.text.values()))
        if like is not None:
            return Start((self.languages[like],))
        special = tuple(number for name, number in self.ids.items() if isinstance(name, str))
        return Start(tuple(self.languages.values()) if is_language_token(spelling) else special or (0,))

    def known_language(self, written: str) -> str | None:
        """Return the tokenizer's code of a language; None where it has no token of it."""
        return find(written, self.tokenizer.languages)


_LANGUAGE = re.compile(
    r"<\|?(?!(?:pnc|itn|sos|eos|sop|unk|na|asr|pad)\|?>)[A-Za-z]{2,3}(?:[-_]\w+)*\|?>|__[A-Za-z]{2,3}(?:_[A-Za-z]+)?__"
)


def is_language_token(spelling: Spelling) -> bool:
    """Return whether a special token has the form of a language's, ``<|en|>``, ``<eng>`` or ``__eng__``."""
    return isinstance(spelling, str) and _LANGUAGE.fullmatch(spelling) is not None


def starts_of_other(old: Tokenizer, new: Tokenizer) -> list[Start | None]:
    """Return where the row of each id of ``new`` comes from; None for an id without a token.

    Special tokens with the same role (padding, end, a language) are the same, whatever their names.
    """
    vocabulary = Vocabulary(old)
    roles = {new.pad: old.pad, new.end: old.end}
    for code in new.languages:
        if (same := vocabulary.known_language(code)) is not None:
            roles.setdefault(new.special_id(f"<|{code}|>"), vocabulary.languages[same])
    return [
        Start((roles[number],), kept=True) if number in roles else vocabulary.start(spelling)
        for number, spelling in enumerate(spellings(new))
    ]


def starts_of_extended(old: Tokenizer, new: Tokenizer, like: str | None = None) -> Sequence[Start | None]:
    """Return where the row of each id of ``new`` comes from, whose first ids are those of ``old``.

    like: language whose token a new language token starts from. Raises ConfigError where ``old`` does not know it,
    and where no language token is new.
    """
    vocabulary, size = Vocabulary(old), old.vocab_size
    found = None
    if like is not None and (found := vocabulary.known_language(like)) is None:
        raise ConfigError(f"--like {like} is not a language of this model; it knows {', '.join(old.languages)}")
    kept = [Start((number,), kept=True) for number in range(size)]
    more = spellings(new)[size:]
    if like is not None and not any(map(is_language_token, more)):
        raise ConfigError(f"--like {like}: the language's token is there already, and keeps its row; leave it out")
    added = (vocabulary.start(spelling, found) for spelling in more)
    return [*kept, *(None if start is None else Start(start.ids) for start in added)]
