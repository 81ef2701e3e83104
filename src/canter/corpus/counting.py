"""Target lengths without a tokenizer: characters, bytes or an estimate, for a first look or for models that spell."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from canter.corpus.utterance import OPTIONAL_TEXT, Utterance
from canter.errors import CanterError, ConfigError

UNITS = ("chars", "bytes")


def prompt_length(tokenizer: Any, rows: Iterable[Utterance]) -> int:
    """Return the number of tokens of the first row's prompt that the tokenizer can write; 0 for one without prompts.

    Raises ConfigError, that of the first row, where it can write none.
    """
    if not hasattr(tokenizer, "prompt"):
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
    """Proves that a tokenizer can write the prompts of rows: each combination of languages, task and slots once."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[tuple[str | None, ...], str | None] = {}

    def fault(self, row: Utterance) -> str | None:
        """Return why the row's prompt cannot be written, or its text encoded in its language; None where they can."""
        if not hasattr(self._tokenizer, "prompt"):
            return None
        asked = tuple(getattr(row, name) for name in OPTIONAL_TEXT)
        if asked not in self._known:
            try:
                self._tokenizer.prompt(row)
                self._tokenizer.encode("", row.text_lang)
                self._known[asked] = None
            except (CanterError, ValueError, KeyError) as error:
                self._known[asked] = f"prompt cannot be made: {error}"
        return self._known[asked]


@dataclass(frozen=True)
class UnitCounter:
    """Stands for a tokenizer where only the number of tokens matters: one for each Unicode character, or
    byte."""

    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"{self.unit!r} cannot be counted; choose one of {', '.join(UNITS)}")

    @property
    def fingerprint(self) -> str:
        """Names the unit."""
        return self.unit

    def encode(self, text: str, lang: str | None = None) -> range:
        """As many numbers as there are units in the text."""
        return range(len(text) if self.unit == "chars" else len(text.encode()))


ESTIMATE = "estimate"  # the fingerprint of `TokenEstimate`
NARROW = 0x530  # code points below are Latin, Greek and Cyrillic letters, digits and punctuation
CHARACTERS_A_TOKEN = 3


@dataclass(frozen=True)
class TokenEstimate:
    """Stands for a subword tokenizer: a token for three Latin, Greek or Cyrillic characters, spaces and punctuation
    counted, and one for every other character.

    Whisper's multilingual tokenizer makes a token of 2.7 to 4.7 characters in LibriSpeech, LJ Speech, CSS10 Spanish and
    Common Voice Russian, and 0.7 to 2.6 tokens of a character of other scripts in Common Voice.
    """

    @property
    def fingerprint(self) -> str:
        """Names the rule."""
        return ESTIMATE

    def encode(self, text: str, lang: str | None = None) -> range:
        """Return as many numbers as there are tokens in the text, by the rule."""
        narrow = sum(ord(character) < NARROW for character in text)
        return range(-(-narrow // CHARACTERS_A_TOKEN) + len(text) - narrow)
