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
from canter.text.languages import find, resolve
from canter.text.prompts import TASKS, TRUE, utterance_slots
from canter.text.sentencepiece import SPACED, train_model
from canter.text.spelling import Spelling, piece_bytes
from canter.text.whisper import TIMESTAMP_SECONDS, TIMESTAMPS
from canter.untrusted import Json, is_file_name, read_json_value, read_limited

FILE, MODEL = "owsm_tokens.json", "bpe.model"
FORMAT, EXTENDED = "canter-owsm-tokens/1", "canter-owsm-tokens/2"
"""Format of the list of tokens, and of one with vocabularies of added languages."""
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

    Tokens after the original list extend a model (see `extended`): languages, and pieces of ``models``, the serialised
    SentencePiece models of languages that have their own.

    Raises CheckpointError for a list without OWSM's special tokens, or with a token twice, and for bytes that are
    not a SentencePiece model.
    """

    def __init__(self, tokens: Sequence[str], model: bytes, models: Mapping[str, bytes] | None = None):
        self.tokens, self.model, self.models = tuple(tokens), bytes(model), dict(models or {})
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens) or len(self.tokens) > MOST_TOKENS:
            twice = next((t for number, t in enumerate(self.tokens) if self.ids[t] != number), None)
            raise CheckpointError(f"the list of {len(self.tokens):,} tokens has {twice!r:.80} twice, or is too long")
        missing = [token for token in NEEDED if token not in self.ids]
        if missing:
            raise CheckpointError(f"the list of tokens has no {missing[0]}; is it OWSM's?")
        self.processor = _processor(self.model)
        self._added = {lang: _processor(one) for lang, one in self.models.items()}
        self.pad, self.end = self.ids["<blank>"], self.ids["<eos>"]
        self.unknown = self.ids["<unk>"]
        self._own = max(self.ids[token] for token in NEEDED) + 1  # the original list ends with special tokens
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
        processors = (self.processor, *self._added.values())
        known = {one.id_to_piece(number) for one in processors for number in range(one.vocab_size())}
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
        """Languages that may be spoken, by ISO 639-3 code: the tokens between <nospeech> and <asr>, and those added."""
        own = self.tokens[self.ids["<nospeech>"] + 1 : self.ids["<asr>"]]
        return tuple(token[1:-1] for token in (*own, *self.tokens[self._own :]) if _SPECIAL.fullmatch(token))

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
        for model in (self.model, *self.models.values()):
            digest.update(model)
        return digest.hexdigest()

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Return the token ids of ``text``; one vocabulary serves all languages but those that were added with pieces,
        and no special token is made."""
        added = find(lang, self._added) if self._added and lang is not None else None
        pieces = (self.processor if added is None else self._added[added]).encode(text, out_type=str)
        known = len(self.tokens) if added is not None else self._own  # characters that the model lacks are pieces too
        ids = (self.unknown if _SPECIAL.fullmatch(piece) else self.ids.get(piece, self.unknown) for piece in pieces)
        return [number if number < known else self.unknown for number in ids]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of token ids; special tokens are left out, or written out with ``special``."""
        tokens = [self.tokens[number] for number in ids]
        if not special:
            tokens = [token for token in tokens if not _SPECIAL.fullmatch(token)]
        if self._added:  # their pieces are not in the model
            return SPACED.decode(tokens).removeprefix(" ")
        return self.processor.decode_pieces(tokens)

    def spelling(self, number: int) -> Spelling:
        """Return the text of an id as bytes, or the name of a special token."""
        token = self.tokens[number]
        return token if _SPECIAL.fullmatch(token) else piece_bytes(token)

    def extended(self, language: str | None, texts: Sequence[str], pieces: int) -> "OwsmTokenizer":
        """Return the tokenizer with a token for ``language`` at the end of the list, and, with ``pieces``, a vocabulary
        of its own for that language's text, trained on ``texts``.

        Its pieces that the list lacks follow the language; all other ids, and the encoding of any other language, stay.
        Raises ConfigError without a language.
        """
        if language is None:
            raise ConfigError("OWSM takes new pieces only for a language; name it with --language")
        known = find(language, self.languages)
        if known in self.models:
            raise ConfigError(f"the tokenizer has a vocabulary for '{language}' already")
        tokens, models = [*self.tokens, *([] if known else [f"<{language}>"])], dict(self.models)
        if pieces:
            models[known or language] = model = train_model(texts, pieces, f"a vocabulary of {language}")
            processor = _processor(model)
            new = (processor.id_to_piece(number) for number in range(processor.vocab_size()))
            tokens += [piece for piece in new if piece not in self.ids and not _SPECIAL.fullmatch(piece)]
        return OwsmTokenizer(tokens, self.model, models)

    def generation(self) -> dict[str, Json]:
        """Return the settings for decoding that follow from the tokens, named as in ``generation_config.json``."""
        return {
            "eos_token_id": self.end,
            "pad_token_id": self.pad,
            "decoder_start_token_id": self.ids["<sos>"],
            "no_timestamps_token_id": self.ids["<notimestamps>"],
            "first_timestamp_token_id": self.ids["<0.00>"],
            "last_timestamp_token_id": self.ids["<30.00>"],
            "timestamp_rules": "espnet",
            "beam_search": "espnet",
        }

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
        values: dict[str, Json] = {"format": FORMAT, "tokens": self.tokens}
        if self.models:
            files = {lang: f"bpe.{lang}.model" for lang in self.models}
            values |= {"format": EXTENDED, "models": files}
            for lang, model in self.models.items():
                write_bytes(Path(folder) / files[lang], model)
        text = json.dumps(values, ensure_ascii=False, indent=0)
        write_text(Path(folder) / FILE, text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "OwsmTokenizer":
        """Read a tokenizer that `save` wrote. Raises CheckpointError for files that are missing or damaged."""
        folder = Path(folder)
        try:
            values = read_json_value(folder / FILE)
            known = isinstance(values, dict) and values.get("format") in (FORMAT, EXTENDED)
            tokens = values.get("tokens") if known else None
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                raise CheckpointError(f"{folder / FILE} is no list of tokens of format {FORMAT} or {EXTENDED}")
            files = values.get("models", {})
            if not isinstance(files, dict) or not all(map(is_file_name, files.values())):
                raise CheckpointError(f"{folder / FILE}: models is {files!r:.80}; it must be an object of files")
            models = {lang: read_limited(folder / name, MOST_MODEL_BYTES) for lang, name in files.items()}
            return cls(tokens, read_limited(folder / MODEL, MOST_MODEL_BYTES), models)
        except OSError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    def __reduce__(self):
        return OwsmTokenizer, (self.tokens, self.model, self.models)


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return a serialised model, loaded. Raises CheckpointError for bytes of anything else."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise CheckpointError(f"not a SentencePiece model ({' '.join(str(error).split())[:200]})") from None
    return processor
