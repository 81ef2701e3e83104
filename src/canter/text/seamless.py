"""The tokenizer of Seamless: a BPE in one of two kinds of files, and language tokens such as ``__eng__``.

The file is a SentencePiece model, whose ids are one lower than the model's, or the ``tokenizer.json`` that transformers
writes. ``tokenizer_config.json`` lies beside it, with the ids of the language tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.files import write_bytes, write_text
from canter.text.languages import resolve
from canter.text.prompts import TASKS, utterance_slots
from canter.text.spelling import Spelling, piece_bytes
from canter.untrusted import read_json_value, read_limited

SENTENCEPIECE, SERIALISED, SETTINGS = "sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json"
ADDED = "added_tokens.json"
CLASS = "SeamlessM4TTokenizer"
MOST_SENTENCEPIECE_BYTES = 8 * 2**20
"""Size of the SentencePiece model; that of 256,000 pieces has 5 MB."""
MOST_SERIALISED_BYTES = 64 * 2**20
"""Size of the ``tokenizer.json``; with 256,000 pieces and their merges it takes up to 40 MB."""
MOST_ID = 2_000_000
BASIC = ("<pad>", "<unk>", "<s>", "</s>")
_LANGUAGE = re.compile(r"__([A-Za-z]{2,3}(?:_[A-Za-z]+)?)__")


class SeamlessTokenizer:
    """Tokenizer of the content of a file: a SentencePiece model with the ids of the tokens ``added`` to it, or, without
    these, a ``tokenizer.json``.

    Raises CheckpointError for content of another kind, and without Seamless' special tokens.
    """

    detects_language = False
    loss_after = None

    def __init__(self, model: bytes, added: Mapping[str, int] | None = None):
        self.model, self.added = bytes(model), None if added is None else dict(added)
        try:
            if added is None:
                self._backend = tokenizers.Tokenizer.from_str(self.model.decode())
                self._backend.no_padding()  # a file may request padding to a billion ids
                self._backend.no_truncation()
                self._backend.encode_special_tokens = True  # "__eng__" in a transcript is text
                self.ids = self._backend.get_vocab()
                special = self._backend.get_added_tokens_decoder().keys()
            else:
                self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
                pieces = [self._processor.id_to_piece(number) for number in range(self._processor.vocab_size())]
                self.ids = {"<pad>": 0, **{piece: number for number, piece in enumerate(pieces, 1)}}
                special = {number for token, number in added.items() if self.ids.setdefault(token, number) == number}
        except Exception as error:  # the libraries raise nothing more precise
            kind = "a tokenizer.json" if added is None else "a SentencePiece model"
            raise CheckpointError(f"not {kind} ({' '.join(str(error).split())[:200]})") from None
        self._tokens = {number: token for token, number in self.ids.items()}
        self._size = max(self._tokens, default=-1) + 1
        self._special = {*special, *range(len(BASIC))}
        found = ((number, _LANGUAGE.fullmatch(self._tokens.get(number, ""))) for number in sorted(self._special))
        self.language_ids = {match[1]: number for number, match in found if match}
        """Ids of the language tokens by language, in the order of ids."""
        wrong = [token for number, token in enumerate(BASIC) if self.ids.get(token) != number]
        if wrong or not self.languages or len(self._tokens) < len(self.ids):
            missing = wrong[0] if wrong else "language tokens such as __eng__, or one id for two tokens"
            raise CheckpointError(f"the tokenizer has no {missing}; is it Seamless'?")
        self.pad, self.end = self.ids["<pad>"], self.ids["</s>"]

    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""
        return self._size

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that may be written, by ISO 639-3 code, some with a script (``cmn_Hant``)."""
        return tuple(self.language_ids)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the file and the added tokens."""
        digest = hashlib.blake2b(repr(self.added).encode(), digest_size=8)
        digest.update(self.model)
        return digest.hexdigest()

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Return the token ids of ``text``; one vocabulary serves all languages, and no special token is made."""
        if self.added is None:
            return self._backend.encode(text, add_special_tokens=False).ids
        return [number + 1 for number in self._processor.encode(text)]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of token ids; special tokens are left out, or written out with ``special``."""
        tokens = [self._tokens.get(number, "") for number in ids if special or number not in self._special]
        text = "".join(tokens).replace("▁", " ")
        return text if special else text.strip()

    def spelling(self, number: int) -> Spelling:
        """Return the text of an id as bytes, the name of a special token, or None for an id without a token."""
        token = self._tokens.get(number)
        return token if token is None or number in self._special else piece_bytes(token)

    def extended(self, language: str | None, texts: Sequence[str], pieces: int) -> "SeamlessTokenizer":
        """Return the tokenizer with a token for ``language`` at the end; all other ids, and the encoding of any text,
        stay.

        Raises ConfigError for new pieces, which its files cannot get without other text changing.
        """
        if pieces or language is None:
            raise ConfigError("Seamless takes a language token and no new pieces; leave --pieces out")
        token = f"__{language}__"
        if self.added is not None:
            return SeamlessTokenizer(self.model, {**self.added, token: self.vocab_size})
        backend = tokenizers.Tokenizer.from_str(self.model.decode())
        backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
        return SeamlessTokenizer(backend.to_str().encode())

    def special_id(self, token: str) -> int:
        """Return the id of a special token, "__eng__" or "<|eng|>". Raises ConfigError where there is none."""
        plain = f"__{token[2:-2]}__" if token.startswith("<|") and token.endswith("|>") else token
        if plain not in self.ids:
            raise ConfigError(f"the tokenizer has no special token {plain}")
        return self.ids[plain]

    def prompt(self, utterance: Utterance) -> list[int]:
        """Return the ids of the utterance's prompt."""
        return self.prompt_ids(utterance_slots(utterance))

    def prompt_ids(self, slots: Mapping[str, str]) -> list[int]:
        """Return the ids of ``</s> <language>``, the language that is written.

        Slots: ``source_lang``, ``target_lang`` (of translations), ``task``; others have no place in the prompt. Raises
        ConfigError for a language or task that the model does not have, and where the language is missing.
        """
        task = slots.get("task", "asr")
        if task not in TASKS:
            raise ConfigError(f"'{task}' is not a task; there are {', '.join(TASKS)}")
        name, option = "source_lang", "'lang' in the manifest, or --language"
        if TASKS[task] == TASKS["translate"]:
            name, option = "target_lang", "it in the manifest, or --target-language"
        if name not in slots:
            raise ConfigError(f"the prompt needs {name}: give {option}")
        return [self.end, self.language_ids[resolve(slots[name], self.languages)]]

    def save(self, folder: str | Path) -> None:
        """Write the files that `load` and transformers read."""
        settings: dict[str, object] = {
            "tokenizer_class": CLASS,
            "processor_class": "SeamlessM4TProcessor",
            "additional_special_tokens": [f"__{name}__" for name in self.languages],
        }
        write_bytes(Path(folder) / (SERIALISED if self.added is None else SENTENCEPIECE), self.model)
        if self.added is not None:
            write_text(Path(folder) / ADDED, json.dumps(self.added, ensure_ascii=False, indent=2) + "\n")
            flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
            tokens = {number: token for token, number in self.added.items()} | dict(enumerate(BASIC))
            settings["added_tokens_decoder"] = {
                str(number): {"content": token, **flags, "special": True} for number, token in sorted(tokens.items())
            }
        write_text(Path(folder) / SETTINGS, json.dumps(settings, ensure_ascii=False, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "SeamlessTokenizer":
        """Read the tokenizer in a folder that `save` or transformers wrote.

        Raises CheckpointError for files that are missing, damaged, or of another model.
        """
        folder = Path(folder)
        serialised = (folder / SERIALISED).exists()
        file = folder / (SERIALISED if serialised else SENTENCEPIECE)
        try:
            added = None if serialised else _added_tokens(folder)
            return cls(read_limited(file, MOST_SERIALISED_BYTES if serialised else MOST_SENTENCEPIECE_BYTES), added)
        except (OSError, CheckpointError) as error:
            text = str(error)
            raise CheckpointError(text if str(folder) in text else f"{file}: {text}") from None

    def __reduce__(self):
        return SeamlessTokenizer, (self.model, self.added)


def is_seamless_tokenizer(folder: str | Path) -> bool:
    """Return whether a folder has the files of a Seamless tokenizer.

    Raises CheckpointError for a ``tokenizer_config.json`` that is damaged.
    """
    path = Path(folder) / SETTINGS
    settings = read_json_value(path) if path.is_file() else None
    name = settings.get("tokenizer_class") if isinstance(settings, dict) else None
    return (Path(folder) / SENTENCEPIECE).exists() or (isinstance(name, str) and name.removesuffix("Fast") == CLASS)


def _added_tokens(folder: Path) -> dict[str, int]:
    """Return the tokens beside a SentencePiece model with their ids, from one of two files."""
    source = folder / ADDED
    if source.is_file():
        values = read_json_value(source)
        pairs = list(values.items()) if isinstance(values, dict) else None
    else:
        source = folder / SETTINGS
        settings = read_json_value(source)
        values = settings.get("added_tokens_decoder") if isinstance(settings, dict) else None
        pairs = None
        if isinstance(values, dict) and all(isinstance(token, dict) for token in values.values()):
            pairs = [(token.get("content"), int(n) if n.isdecimal() else n) for n, token in values.items()]
    if pairs is None:
        raise CheckpointError(f"{source} holds no JSON object of added tokens and ids; copy it anew")
    for token, number in pairs:
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < MOST_ID:
            raise CheckpointError(
                f"{source}: the id of the added token {token!r:.80} is {number!r:.80}; it must be a number below "
                f"{MOST_ID:,}"
            )
    return dict(pairs)
