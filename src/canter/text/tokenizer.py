"""What a tokenizer is: text to token ids and back, and the ids of prompts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from canter.corpus.manifest import Utterance


class Tokenizer(Protocol):
    """Token ids are those of the model's embedding. Tokenizers can be pickled, so that workers may count
    tokens."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def pad(self) -> int:
        """Fills up batches."""
        ...

    @property
    def end(self) -> int:
        """Ends a transcript."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits; the same for tokenizers that encode alike."""
        ...

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that a prompt may name."""
        ...

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Ids of `text`, without prompt and end token. `lang` matters to tokenizers with a vocabulary a
        language."""
        ...

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids. Special tokens are left out, or shown with `special`."""
        ...

    def special_id(self, token: str) -> int:
        """The id of a special token such as "<|en|>". Raises ConfigError if there is none."""
        ...

    def prompt(self, utterance: Utterance) -> list[int]:
        """Ids of the utterance's prompt."""
        ...

    def prompt_ids(self, slots: Mapping[str, str]) -> list[int]:
        """Ids of the prompt with these slots (see `canter.text.prompts`)."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer(folder)` reads; the folder may hold other files too."""
        ...
