"""Target lengths: the protocol of token counters, and counters for use without a tokenizer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from canter.corpus.utterance import OPTIONAL_TEXT, Utterance
from canter.errors import CanterError, ConfigError

UNITS = ("chars", "bytes")


class TokenCounter(Protocol):
    """A tokenizer, as far as the index needs it. With worker processes it must be picklable."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str, lang: str | None = None) -> Sequence[int]: ...


@runtime_checkable
class PromptWriter(Protocol):
    """A token counter that also writes the prompts of a model."""

    def prompt(self, utterance: Utterance) -> list[int]: ...

    def encode(self, text: str, lang: str | None = None) -> Sequence[int]: ...


def prompt_length(tokenizer: object, rows: Iterable[Utterance]) -> int:
    """Return the number of tokens of the first row's prompt that the tokenizer can write; 0 for one without prompts.

    Raises ConfigError, that of the first row, where it can write none.
    """
    if not isinstance(tokenizer, PromptWriter):
        return 0
    fault = None
    for row in rows:
        try:
            return len(tokenizer.prompt(row))
        except ConfigError as error:
            fault = fault or error
    if fault is not None:
        raise fault
    return 0


class PromptCheck:
    """Checks that a tokenizer can write the prompts of rows; each combination of languages, task and slots once."""

    def __init__(self, tokenizer: object):
        self._tokenizer = tokenizer if isinstance(tokenizer, PromptWriter) else None
        self._known: dict[tuple[str | None, ...], str | None] = {}

    def fault(self, row: Utterance) -> str | None:
        """Return why the row's prompt cannot be written or its text not be encoded in its language, or None."""
        if self._tokenizer is None:
            return None
        slots = tuple(getattr(row, name) for name in OPTIONAL_TEXT)
        if slots not in self._known:
            try:
                self._tokenizer.prompt(row)
                self._tokenizer.encode("", row.text_lang)
                self._known[slots] = None
            except (CanterError, ValueError, KeyError) as error:
                self._known[slots] = f"prompt cannot be made: {error}"
        return self._known[slots]


@dataclass(frozen=True)
class UnitCounter:
    """A token counter that takes every Unicode character, or every byte, for a token."""

    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"{self.unit!r} cannot be counted; choose one of {', '.join(UNITS)}")

    @property
    def fingerprint(self) -> str:
        return self.unit

    def encode(self, text: str, lang: str | None = None) -> range:
        """Return a range with a number for each unit of the text."""
        return range(len(text) if self.unit == "chars" else len(text.encode()))


ESTIMATE = "estimate"  # the fingerprint of `TokenEstimate`
NARROW = 0x530  # code points below are Latin, Greek and Cyrillic letters, digits and punctuation
CHARACTERS_A_TOKEN = 3


@dataclass(frozen=True)
class TokenEstimate:
    """A token counter that estimates the tokens of a subword tokenizer.

    Three Latin, Greek or Cyrillic characters, spaces and punctuation included, make a token, and so does every other
    character. Whisper's multilingual tokenizer makes a token of 2.7 to 4.7 characters in LibriSpeech, LJ Speech, CSS10
    Spanish and Common Voice Russian, and 0.7 to 2.6 tokens of a character of other scripts in Common Voice.
    """

    @property
    def fingerprint(self) -> str:
        return ESTIMATE

    def encode(self, text: str, lang: str | None = None) -> range:
        """Return a range with a number for each estimated token of the text."""
        narrow = sum(ord(character) < NARROW for character in text)
        return range(-(-narrow // CHARACTERS_A_TOKEN) + len(text) - narrow)
