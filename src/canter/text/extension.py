"""Extend a tokenizer by a language or by pieces; every old id keeps its meaning."""

# pyright: strict

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from canter.errors import ConfigError
from canter.text.languages import canonical, find
from canter.text.tokenizer import Tokenizer

_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")


@runtime_checkable
class Extensible(Protocol):
    """A tokenizer that can be extended."""

    def extended(self, language: str | None, texts: Sequence[str], pieces: int) -> Tokenizer:
        """Return the tokenizer with a token for ``language`` and ``pieces`` pieces learned from ``texts``."""
        ...


def extend_tokenizer(
    tokenizer: Tokenizer, language: str | None, texts: Sequence[str] = (), pieces: int = 0
) -> Tokenizer:
    """Return ``tokenizer`` with a token for ``language``, if it has none, and ``pieces`` pieces learned from ``texts``.

    New ids follow all others, which stay as they are. Text of the other languages is encoded as before; only pieces
    without a language change the text in which they occur.

    Raises ConfigError for a language that has another form than a code, or is known already, for pieces without text,
    and for a kind of tokenizer that cannot be extended so.
    """
    if not isinstance(tokenizer, Extensible):
        raise ConfigError(
            f"a {type(tokenizer).__name__} cannot be extended; the tokenizers of Whisper, Canary, Cohere Transcribe, "
            "OWSM, Seamless and of Canter's own models can"
        )
    if pieces < 0:
        raise ConfigError(f"--pieces is {pieces}; it must be 0 or more")
    if language is None and not pieces:
        raise ConfigError("nothing to add: name a --language, or a number of --pieces")
    if pieces and not any(map(str.strip, texts)):
        raise ConfigError("--pieces are learned from text, and there is none; name a --manifest with text")
    if language is not None:
        language = _checked(language, tokenizer, pieces)
    return tokenizer.extended(language, texts, pieces)


def _checked(language: str, tokenizer: Tokenizer, pieces: int) -> str:
    """Return the code of a new language in the tokenizer's style."""
    code = language if _CODE.fullmatch(language) else canonical(language)
    if code is None:
        raise ConfigError(f"--language {language} is not the code or name of a language, such as kab or Kabyle")
    known = find(code, tokenizer.languages)
    takes_own = hasattr(tokenizer, "models")  # a vocabulary for each language, which a known one may lack
    if known is not None and not (pieces and takes_own):
        raise ConfigError(
            f"the model knows '{known}' already; train it as it is, or leave --language out and add --pieces for every "
            "language"
            if not takes_own
            else f"the model knows '{known}' already; give --pieces for a vocabulary of it"
        )
    return code


def tokens_per_word(tokenizer: Tokenizer, texts: Sequence[str], language: str | None) -> float:
    """Return the mean number of tokens of a word; of a language without a vocabulary, infinity."""
    words = sum(len(text.split()) for text in texts)
    try:
        return sum(len(tokenizer.encode(text, language)) for text in texts) / max(1, words)
    except ConfigError:
        return float("inf")
