"""A tokenizer of transformers, with what training and decoding ask of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.text.languages import find
from canter.text.prompts import utterance_slots


class TransformersTokenizer:
    """A tokenizer of transformers as a `canter.text.Tokenizer`.

    ``prompt_tokens`` are the decoder's first ones, the same for every utterance; where ``language_ids`` are given, the
    one of the language that is written follows.
    """

    detects_language = False

    def __init__(self, tokenizer: Any, prompt_tokens: Sequence[int], language_ids: Mapping[str, int] | None = None):
        self.tokenizer, self.prompt_tokens = tokenizer, list(prompt_tokens)
        self.language_ids = dict(language_ids or {})
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        self.end = int(tokenizer.eos_token_id)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.language_ids)

    @property
    def fingerprint(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        told = [type(self.tokenizer).__name__, rules, self.prompt_tokens, self.language_ids]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Ids of ``text``, without the special tokens that the tokenizer would put around it."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special).strip()

    def special_id(self, token: str) -> int:
        """ConfigError for what is no token of its own."""
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ConfigError(f"the tokenizer has no token {token!r}")
        return int(found)

    def prompt(self, utterance: Utterance) -> list[int]:
        return self.prompt_ids(utterance_slots(utterance))

    def prompt_ids(self, slots: Mapping[str, str]) -> list[int]:
        """Of the slots only ``target_lang`` counts, where there are languages to choose from."""
        if not self.language_ids:
            return list(self.prompt_tokens)
        language = slots.get("target_lang") or slots.get("source_lang")
        language = None if language is None else find(language, self.language_ids) or language
        if language not in self.language_ids:
            named = "names no language" if language is None else f"names the language '{language}'"
            raise ConfigError(
                f"an utterance {named}, and the model writes {', '.join(self.language_ids)}: give 'lang' in the "
                "manifest, or --language"
            )
        return [*self.prompt_tokens, self.language_ids[language]]

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
