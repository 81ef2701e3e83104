"""OWSM's tokenizer (ESPnet): a list of tokens, some of them special, and the SentencePiece model of the others."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.files import write_bytes, write_text
from canter.text.languages import resolve
from canter.text.prompts import TASKS, TRUE, utterance_slots
from canter.text.whisper import TIMESTAMP_SECONDS, TIMESTAMPS
from canter.untrusted import read_json_value, read_limited

FILE, MODEL = "owsm_tokens.json", "bpe.model"
FORMAT = "canter-owsm-tokens/1"
NEEDED = ("<blank>", "<unk>", "<na>", "<nospeech>", "<asr>", "<notimestamps>", "<0.00>", "<30.00>", "<sos>", "<eos>",
          "<sop>")  # fmt: skip
MOST_MODEL_BYTES = 8 * 2**20
"""Size of the SentencePiece model; OWSM's 50,000 pieces take about 1 MB."""
MOST_TOKENS = 1_000_000
MOST_UNKNOWN = 0.01
"""Fraction of the tokens of text that the SentencePiece model may lack."""
_SPECIAL = re.compile(r"<.+>")
_TRANSLATION = re.compile(r"<st_(.+)>")


class OwsmTokenizer:
    """Token ids are places in ``tokens``. ``model`` is the serialised SentencePiece model that cuts text into them.

    Raises CheckpointError for a list without OWSM's special tokens, or with a token twice, and for bytes that are
    not a SentencePiece model.
    """

    def __init__(self, tokens: Sequence[str], model: bytes):
        self.tokens, self.model = tuple(tokens), bytes(model)
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens) or len(self.tokens) > MOST_TOKENS:
            twice = next((t for number, t in enumerate(self.tokens) if self.ids[t] != number), None)
            raise CheckpointError(f"the list of {len(self.tokens):,} tokens has {twice!r:.80} twice, or is too long")
        missing = [token for token in NEEDED if token not in self.ids]
        if missing:
            raise CheckpointError(f"the list of tokens has no {missing[0]}; is it OWSM's?")
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(self.model)
        except RuntimeError as error:
            raise CheckpointError(f"not a SentencePiece model ({' '.join(str(error).split())[:200]})") from None
        self.pad, self.end = self.ids["<blank>"], self.ids["<eos>"]
        self.unknown = self.ids["<unk>"]
        self._check_order()

    def _check_order(self) -> None:
        """Raise CheckpointError for a list whose order is not OWSM's, or whose text is not the SentencePiece model's.

        CTC's blank is the first token, the timestamps follow one another, and so do the languages, after <nospeech>.
        """
        if self.pad:
            raise CheckpointError(f"the list of tokens has <blank> at place {self.pad}; it must be the first, for CTC")
        first = self.ids["<0.00>"]
        for step in range(TIMESTAMPS):
            wanted = f"<{step * TIMESTAMP_SECONDS:.2f}>"
            if (found := self.ids.get(wanted)) != first + step:
                raise CheckpointError(
                    f"the list of tokens has {wanted} at place {found}; timestamps must follow <0.00>, at place {first}"
                )
        if not self.languages:
            raise CheckpointError("the list of tokens has no language between <nospeech> and <asr>; is it OWSM's?")
        text = [token for token in self.tokens if not _SPECIAL.fullmatch(token)]
        known = {self.processor.id_to_piece(number) for number in range(self.processor.vocab_size())}
        missing = [token for token in text if token not in known]
        if len(missing) > MOST_UNKNOWN * len(text):
            raise CheckpointError(
                f"the list of tokens is not that of {MODEL}: {len(missing):,} of {len(text):,} pieces are missing "
                f"there, such as {missing[0]!r:.80}"
            )

    detects_language = True
    prompt_slots = ("prevtext", "source_lang", "target_lang", "task", "timestamp")

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.tokens)

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that may be spoken, by ISO 639-3 code: the tokens between <nospeech> and <asr>."""
        return tuple(token[1:-1] for token in self.tokens[self.ids["<nospeech>"] + 1 : self.ids["<asr>"]])

    @cached_property
    def translations(self) -> tuple[str, ...]:
        """Languages that may be translated into."""
        return tuple(found[1] for token in self.tokens if (found := _TRANSLATION.fullmatch(token)))

    @property
    def loss_after(self) -> int:
        """Id of <sos>: language and task are targets too, previous text is none."""
        return self.ids["<sos>"]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over tokens and model."""
        digest = hashlib.blake2b("\n".join(self.tokens).encode(), digest_size=8)
        digest.update(self.model)
        return digest.hexdigest()

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Return the token ids of ``text``; one vocabulary serves all languages, and no special token is made."""
        pieces = self.processor.encode(text, out_type=str)
        return [self.unknown if _SPECIAL.fullmatch(p) else self.ids.get(p, self.unknown) for p in pieces]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of token ids; special tokens are left out, or written out with ``special``."""
        tokens = [self.tokens[number] for number in ids]
        if not special:
            tokens = [token for token in tokens if not _SPECIAL.fullmatch(token)]
        return self.processor.decode_pieces(tokens)

    def piece(self, number: int) -> str:
        """Return the SentencePiece piece of an id; a special token has none and gives ""."""
        return "" if _SPECIAL.fullmatch(self.tokens[number]) else self.tokens[number]

    def special_id(self, token: str) -> int:
        """Return the id of a special token, "<eng>" or "<|eng|>". Raises ConfigError where there is none."""
        plain = f"<{token[2:-2]}>" if token.startswith("<|") and token.endswith("|>") else token
        if plain not in self.ids:
            raise ConfigError(f"the tokenizer has no special token {plain}")
        return self.ids[plain]

    def prompt(self, utterance: Utterance) -> list[int]:
        """Return the ids of the utterance's prompt."""
        return self.prompt_ids(utterance_slots(utterance))

    def prompt_ids(self, slots: Mapping[str, str]) -> list[int]:
        """Return the ids of ``[<sop> previous text] <sos> <language> <task> [<notimestamps>]`` (Peng et al., 2023,
        arXiv 2309.13876).

        Slots: ``source_lang``, ``target_lang`` (of translations), ``task``, ``timestamp``, ``prevtext``; others have no
        place in the prompt. Raises ConfigError for a language or task that the model does not have, and where
        ``source_lang`` is missing.
        """
        if "source_lang" not in slots:
            raise ConfigError("the prompt needs source_lang: give 'lang' in the manifest, or --language")
        task = slots.get("task", "asr")
        if task not in TASKS:
            raise ConfigError(f"'{task}' is not a task; there are {', '.join(TASKS)}")
        name = "asr"
        if TASKS[task] == TASKS["translate"]:
            if "target_lang" not in slots:
                raise ConfigError("a translation needs target_lang: give it in the manifest, or --target-language")
            name = f"st_{resolve(slots['target_lang'], self.translations)}"
        previous = slots.get("prevtext", "").strip()
        ids = [self.ids["<sop>"], *self.encode(previous)] if previous else []
        ids += [
            self.ids["<sos>"],
            self.ids[f"<{resolve(slots['source_lang'], self.languages)}>"],
            self.ids[f"<{name}>"],
        ]
        return ids if slots.get("timestamp") in TRUE else [*ids, self.ids["<notimestamps>"]]

    def save(self, folder: str | Path) -> None:
        """Write the files that `load` reads."""
        write_bytes(Path(folder) / MODEL, self.model)
        text = json.dumps({"format": FORMAT, "tokens": self.tokens}, ensure_ascii=False, indent=0)
        write_text(Path(folder) / FILE, text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "OwsmTokenizer":
        """Read a tokenizer that `save` wrote. Raises CheckpointError for files that are missing or damaged."""
        folder = Path(folder)
        try:
            values = read_json_value(folder / FILE)
            tokens = values.get("tokens") if isinstance(values, dict) and values.get("format") == FORMAT else None
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                raise CheckpointError(f"{folder / FILE} is no list of tokens of format {FORMAT}")
            return cls(tokens, read_limited(folder / MODEL, MOST_MODEL_BYTES))
        except OSError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    def __reduce__(self):
        return OwsmTokenizer, (self.tokens, self.model)
