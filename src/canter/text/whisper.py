"""Whisper's byte-level BPE, read from the ``tokenizer.json`` of a Hugging Face checkpoint."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.files import write_text
from canter.text.languages import same
from canter.text.prompts import TASKS, prompt_ids, utterance_slots
from canter.untrusted import read_limited

FILE = "tokenizer.json"
MOST_TOKENIZER_BYTES = 16 * 2**20
"""Size of a tokenizer.json; Whisper's have up to 4 MB."""
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>, every 20 ms, after <|notimestamps|>; many files omit them
TIMESTAMP_SECONDS = 0.02
ENGLISH_END = 50256  # English-only models use GPT-2's vocabulary, one token smaller than the multilingual one


class WhisperTokenizer:
    """Whisper's tokenizer: ids below ``<|endoftext|>`` are text, the others special tokens and timestamps."""

    loss_after = None

    def __init__(self, serialised: str):
        try:
            self._backend = tokenizers.Tokenizer.from_str(serialised)
        except Exception as error:  # the library raises nothing more precise
            raise CheckpointError(f"not a tokenizer.json ({error})") from None
        self._backend.no_padding()  # a file may request padding to a billion ids
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True  # "<|en|>" in a transcript is text
        self.serialised = serialised
        self.pad = self.end = self.special_id("<|endoftext|>")
        self._first_timestamp = self.special_id("<|notimestamps|>") + 1

    @property
    def vocab_size(self) -> int:
        return self._first_timestamp + TIMESTAMPS

    @property
    def languages(self) -> tuple[str, ...]:
        if not self.multilingual:
            return ("en",)
        # the languages stand between <|startoftranscript|> and <|translate|>, which precedes <|transcribe|>
        first, last = self.special_id("<|startoftranscript|>") + 1, self.special_id("<|translate|>")
        return tuple(str(self._backend.id_to_token(number)).strip("<|>") for number in range(first, last))

    @property
    def multilingual(self) -> bool:
        return self.end != ENGLISH_END

    @property
    def detects_language(self) -> bool:
        return self.multilingual

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.serialised.encode(), digest_size=8).hexdigest()

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Return the ids of ``text``; one vocabulary serves all languages."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        if not special:
            return self._backend.decode([number for number in ids if number < self.end]).strip()
        text, run = "", []
        for number in ids:
            if number < self._first_timestamp:
                run.append(number)
                continue
            text += self._backend.decode(run, skip_special_tokens=False)
            text += f"<|{(number - self._first_timestamp) * TIMESTAMP_SECONDS:.2f}|>"
            run = []
        return text + self._backend.decode(run, skip_special_tokens=False)

    def special_id(self, token: str) -> int:
        number = self._backend.token_to_id(token)
        if number is None:
            raise ConfigError(f"the tokenizer has no special token {token}; is it Whisper's?")
        return number

    def prompt(self, utterance: Utterance) -> list[int]:
        return self.prompt_ids(utterance_slots(utterance))

    def prompt_ids(self, slots: Mapping[str, str]) -> list[int]:
        """Return the ids of Whisper's task prompt, which has no language and task in English-only models."""
        if self.multilingual:
            return prompt_ids(self, "whisper", slots)
        for name in ("source_lang", "target_lang"):
            if not same(slots.get(name, "en"), "en"):
                raise ConfigError(f"{name} is '{slots[name]}', but this Whisper knows English only")
        if TASKS.get(slots.get("task", "")) == TASKS["translate"]:
            raise ConfigError("the task is to translate, but this Whisper knows English only and cannot; leave it out")
        return prompt_ids(self, "whisper_english", slots)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder) / FILE, self.serialised)

    @classmethod
    def load(cls, file: str | Path) -> "WhisperTokenizer":
        """Read a ``tokenizer.json``. Raises CheckpointError if it is missing or not Whisper's."""
        try:
            return cls(read_limited(file, MOST_TOKENIZER_BYTES).decode())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}") from None

    def __reduce__(self):
        return WhisperTokenizer, (self.serialised,)
