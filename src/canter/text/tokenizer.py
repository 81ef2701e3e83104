"""The protocol of tokenizers: text to token ids and back, and the ids of prompts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from canter.corpus.manifest import Utterance


class Tokenizer(Protocol):
    """A tokenizer whose ids are those of the model's embedding. It can be pickled, for worker processes."""

    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""
        ...

    @property
    def pad(self) -> int:
        """Id that pads batches."""
        ...

    @property
    def end(self) -> int:
        """Id that ends a transcript."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for tokenizers that encode alike."""
        ...

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that a prompt may name."""
        ...

    @property
    def detects_language(self) -> bool:
        """True if the model can write the language of the audio itself, as multilingual Whisper does."""
        ...

    @property
    def loss_after(self) -> int | None:
        """Id of the prompt's token after which every token bears loss in training; None: no token of it does."""
        ...

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Return the ids of ``text``, without prompt and end token; ``lang`` selects one of several vocabularies."""
        ...

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of ids, stripped and without special tokens; ``special`` keeps both spaces and tokens."""
        ...

    def special_id(self, token: str) -> int:
        """Return the id of a special token such as "<|en|>". Raises ConfigError where there is none."""
        ...

    def prompt(self, utterance: Utterance) -> list[int]:
        """Return the ids of the utterance's prompt."""
        ...

    def prompt_ids(self, slots: Mapping[str, str]) -> list[int]:
        """Return the ids of the prompt with these slots (see `canter.text.prompts`)."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the files that `load_tokenizer(folder)` reads; the folder may hold other files too."""
        ...
