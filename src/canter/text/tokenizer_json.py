"""Read the ``tokenizer.json`` of Canary and Cohere Transcribe, and make one of SentencePiece models.

SentencePiece models are read as described in ``sentencepiece_model.proto``.
"""

import hashlib
import json
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from canter.errors import CheckpointError, ConfigError
from canter.files import write_text
from canter.text.languages import find
from canter.text.prompts import DEFAULTS, FLAGS, FORMATS
from canter.text.sentencepiece import SPACED, SPECIAL_PIECE, CanaryTokens, SentencePieceTokenizer
from canter.text.spelling import Spelling, piece_bytes
from canter.text.whisper import FILE, MOST_TOKENIZER_BYTES
from canter.untrusted import read_json_value, read_limited

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
STATED = {"config.json": "model_type", CONFIG: "processor_class"}
"""File beside a tokenizer -> setting that tells Cohere Transcribe's from Canary's."""
HIDDEN = "\ue000"
"""Character of the private use area that marks pieces which text is never cut into; decoding removes it."""
UNIGRAM, BPE = 1, 2  # types of models
NORMAL, UNKNOWN, _CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces


class JsonTokenizer(CanaryTokens):
    """Canary's special tokens and text pieces in one serialised tokenizer of the library tokenizers.

    Raises CheckpointError for text that is not a ``tokenizer.json`` with these special tokens.
    """

    def __init__(self, serialised: str, prompt_format: str):
        try:
            self._backend = tokenizers.Tokenizer.from_str(serialised)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing more precise, and panics at damaged tables
            raise CheckpointError(f"not a tokenizer.json ({error})") from None
        self._backend.no_padding()  # a file may request padding to a billion ids
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True  # "<|en|>" in a transcript is text
        self.serialised, self.prompt_format, self.defaults = serialised, prompt_format, {}
        added = {one.content: number for number, one in self._backend.get_added_tokens_decoder().items() if one.special}
        vocabulary = dict(sorted(self._backend.get_vocab(with_added_tokens=True).items(), key=lambda one: one[1]))
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._special_ids = {token: number for token, number in vocabulary.items() if SPECIAL_PIECE.fullmatch(token)}
        self._special_ids |= added
        self.special_numbers = frozenset(self._special_ids.values())
        missing = [token for token in ("<pad>", "<|endoftext|>") if token not in self._special_ids]
        if missing:
            raise CheckpointError(f"a tokenizer.json without {missing[0]}, which Canary and Cohere Transcribe have")
        self.pad, self.end = self._special_ids["<pad>"], self._special_ids["<|endoftext|>"]
        if "▁" in vocabulary:  # text, but a part of Cohere's prompt
            self._special_ids["▁"] = vocabulary["▁"]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the serialised tokenizer."""
        return hashlib.blake2b(self.serialised.encode(), digest_size=8).hexdigest()

    def text_ids(self, text: str, lang: str | None) -> list[int]:
        """Return the ids of text without special tokens; one vocabulary serves all languages."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of ids; ids of a model that the vocabulary lacks have none."""
        if special:
            return SPACED.decode([self.piece(number) for number in ids if self._backend.id_to_token(number)])
        kept = [number for number in ids if number not in self.special_numbers]
        return self._backend.decode(kept, skip_special_tokens=False).strip()

    def piece(self, number: int) -> str:
        """Return the piece of an id, with "▁" for a space. Raises ValueError for an id beyond the vocabulary."""
        piece = self._backend.id_to_token(number)
        if piece is None:
            raise ValueError(f"token id {number} is not in the vocabulary of {self.vocab_size}")
        return piece.rstrip(HIDDEN)

    def spelling(self, number: int) -> Spelling:
        """Return the text of an id as bytes, the name of a special token, or None for an id without a token."""
        token = self._backend.id_to_token(number)
        if token is None or number in self.special_numbers or token == "<unk>":
            return token
        return piece_bytes(token.rstrip(HIDDEN))

    def extended(self, language: str | None, texts: Sequence[str], pieces: int) -> "JsonTokenizer":
        """Return the tokenizer with a token for ``language`` at the end; all other ids, and the encoding of any text,
        stay.

        Raises ConfigError for new pieces, which its kinds of vocabulary cannot get without other text changing.
        """
        if pieces or language is None:
            raise ConfigError(
                f"a {FILE} of this kind takes a language token and no new pieces; leave --pieces out, or extend the "
                "model's .nemo archive"
            )
        token = AddedToken(f"<|{language}|>", normalized=False, special=True)
        backend = tokenizers.Tokenizer.from_str(self.serialised)
        backend.add_special_tokens([token])
        return JsonTokenizer(backend.to_str(), self.prompt_format)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json``, and what transformers' AutoTokenizer and AutoProcessor need beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = {"bos_token": "<|startoftranscript|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
        values = {
            "tokenizer_class": "TokenizersBackend",
            "processor_class": "CohereAsrProcessor" if self.prompt_format == "cohere" else "CanaryProcessor",
            **{name: token for name, token in tokens.items() if token in self._special_ids},
            "clean_up_tokenization_spaces": False,
        }
        write_text(folder / FILE, self.serialised)
        write_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")
        if self.prompt_format != "cohere":  # whose processor makes the prompt itself
            write_text(folder / TEMPLATE, chat_template(self.prompt_format))

    @classmethod
    def load(cls, file: str | Path) -> "JsonTokenizer":
        """Read a ``tokenizer.json``; the files beside it and its special tokens decide the prompt format.

        Raises CheckpointError if it is missing or not Canary's or Cohere Transcribe's.
        """
        file = Path(file)
        try:
            serialised = read_limited(file, MOST_TOKENIZER_BYTES).decode()
            kinds = (_setting(file.with_name(name), key) for name, key in STATED.items())
            if any("cohere" in kind.lower() for kind in kinds):
                return cls(serialised, "cohere")
            return cls(serialised, "canary2" if '"<|startofcontext|>"' in serialised else "canary")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}") from None

    @classmethod
    def of(cls, tokenizer: SentencePieceTokenizer) -> "JsonTokenizer":
        """Return the tokenizer whose ids, texts and prompts are those of ``tokenizer``.

        Of several vocabularies, one for each language, text is encoded with that of the default language only, or of
        English; a warning says so. Raises CheckpointError for a SentencePiece model that is not BPE or unigram.
        """
        return cls(_serialised(tokenizer), tokenizer.prompt_format)

    def __reduce__(self):
        return JsonTokenizer, (self.serialised, self.prompt_format)


def is_canary(file: Path) -> bool:
    """Return whether a ``tokenizer.json`` has the special tokens of Canary and Cohere Transcribe, not Whisper's."""
    try:
        return b'"<|pnc|>"' in read_limited(file, MOST_TOKENIZER_BYTES)
    except (OSError, ValueError):
        return False  # the reader of the file says what is wrong


def _setting(file: Path, name: str) -> str:
    values = read_json_value(file) if file.is_file() else {}
    return str(values.get(name, "")) if isinstance(values, dict) else ""


def chat_template(prompt_format: str) -> str:
    """Return the Jinja template from which transformers' CanaryProcessor makes prompts of this format.

    A message of the user has a part of type "text" with ``source_language``, ``target_language`` and ``punctuation``;
    one of the assistant is a transcript.
    """
    values: dict[str, str] = {
        "source_lang": "<|{{ part.source_language }}|>",
        "target_lang": "<|{{ part.target_language }}|>",
        "task": "<|{{ 'transcribe' if part.source_language == part.target_language else 'translate' }}|>",
        "pnc": "<|{{ 'pnc' if part.punctuation else 'nopnc' }}|>",
    }
    for name, value in DEFAULTS.items():
        values.setdefault(name, f"<|no{name}|>" if name in FLAGS else value)
    parts = FORMATS[prompt_format]
    values = dict(zip(parts, parts)) | values
    prompt = "".join(values[part] for part in parts)
    return (
        "{%- for message in messages -%}{%- if message.content is string -%}{{ message.content }}{%- else -%}"
        "{%- for part in message.content if part.type == 'text' -%}{%- if message.role == 'user' -%}"
        + prompt
        + "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{%- if message.role == 'assistant' -%}<|endoftext|>{%- endif -%}{%- endfor -%}"
    )


@dataclass(frozen=True)
class _Model:
    """What a serialised SentencePiece model says."""

    pieces: list[tuple[str, float, int]]
    """Piece, score and type, by id."""
    settings: dict[int, int]
    """Numbers of the section ``trainer_spec``."""
    normalizer: dict[int, int]
    """Numbers of the section ``normalizer_spec``."""
    charsmap: bytes
    """Compiled table of normalised characters."""

    @classmethod
    def of(cls, model: bytes) -> "_Model":
        """Read a model. Raises CheckpointError for one that is not BPE or unigram."""
        pieces: list[tuple[str, float, int]] = []
        sections: dict[int, dict[int, int]] = {2: {}, 3: {}}
        charsmap = b""
        for number, content in _fields(model):
            values = dict(_fields(content)) if isinstance(content, bytes) else {}
            texts = {name: value for name, value in values.items() if isinstance(value, bytes)}
            numbers = {name: value for name, value in values.items() if isinstance(value, int)}
            if number == 1:
                score = struct.unpack("<f", texts.get(2, bytes(4)))[0]
                pieces.append((texts[1].decode(), score, numbers.get(3, NORMAL)))
            elif number in sections:
                sections[number] = numbers
                charsmap = texts.get(2, b"") if number == 3 else charsmap
        settings, normalizer = sections.values()
        if settings.get(3, UNIGRAM) not in (UNIGRAM, BPE):
            raise CheckpointError(
                f"{FILE} holds only BPE and unigram models of SentencePiece, and this is another; keep the model as a "
                "Canter folder"
            )
        return cls(pieces, settings, normalizer, charsmap)

    @property
    def unknown(self) -> str:
        """The piece of unknown characters."""
        return next(piece for piece, _, kind in self.pieces if kind == UNKNOWN)

    def merges(self) -> list[tuple[str, str]]:
        """Return the pairs that BPE joins, the first ones first."""
        known = {piece: (-score, place) for place, (piece, score, kind) in enumerate(self.pieces) if kind == NORMAL}
        pairs = [
            (order, piece[:cut], piece[cut:])
            for piece, order in known.items()
            for cut in range(1, len(piece))
            if piece[:cut] in known and piece[cut:] in known
        ]
        return [(left, right) for _, left, right in sorted(pairs)]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of the fields of a protocol buffer: an integer, or bytes of any other type."""
    place = 0

    def integer() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        key = integer()
        if key & 7 == 0:
            yield key >> 3, integer()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or integer()
            yield key >> 3, message[place : place + size]
            place += size


def _serialised(tokenizer: SentencePieceTokenizer) -> str:
    languages = list(tokenizer.models)
    wanted = tokenizer.defaults.get("target_lang", "").strip("<|>")
    chosen = find(wanted, languages) or find("en", languages) or languages[0]
    if len(languages) > 1:
        names = [lang or "all other languages" for lang in languages]
        warnings.warn(
            f"{FILE}: transformers encodes text with the vocabulary of {repr(chosen) if chosen else names[0]} "
            f"only, and decodes all of {', '.join(names)}",
            stacklevel=4,
        )
    model, offset = _Model.of(tokenizer.models[chosen]), tokenizer.offsets[chosen]
    ids = {piece: offset + place for place, (piece, _, kind) in enumerate(model.pieces) if kind != UNUSED}
    for number in tokenizer.special_numbers:
        token = tokenizer.piece(number)
        if SPECIAL_PIECE.fullmatch(token) or token not in ids:  # others, such as "▁", are text
            ids[token] = number
    pieces = {number: piece for piece, number in ids.items()}
    for number in range(tokenizer.vocab_size):
        if number not in pieces:
            pieces[number] = tokenizer.piece(number) + HIDDEN
            while pieces[number] in ids:
                pieces[number] += HIDDEN
            ids[pieces[number]] = number
    byte_fallback = bool(model.settings.get(35, 0))
    if model.settings.get(3, UNIGRAM) == BPE:
        backend = tokenizers.Tokenizer(
            models.BPE(ids, model.merges(), unk_token=model.unknown, fuse_unk=True, byte_fallback=byte_fallback)
        )
    else:
        least = min(score for _, score, _ in model.pieces) - 1000.0  # of what text is not cut into
        scores = {
            offset + place: score for place, (_, score, kind) in enumerate(model.pieces) if kind in (NORMAL, BYTE)
        }
        vocabulary = [(pieces[number], scores.get(number, least)) for number in range(tokenizer.vocab_size)]
        backend = tokenizers.Tokenizer(models.Unigram(vocabulary, ids[model.unknown], byte_fallback))
    trimmed, prefixed = (bool(model.normalizer.get(number, 1)) for number in (4, 3))
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:  # which the library applies to letters with one accent only
        steps += [normalizers.NFC(), normalizers.Precompiled(model.charsmap)]
    if trimmed:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if prefixed:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=trimmed)  # pyright: ignore
    backend.decoder = decoders.Sequence(  # pyright: ignore
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(HIDDEN, ""),
            decoders.Replace(Regex(r"\A\s+|\s+\z"), ""),
        ]
    )
    special = [pieces[number] for number in sorted(tokenizer.special_numbers)]
    defined = [piece for piece, _, kind in model.pieces if kind == USER_DEFINED and piece not in special]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in defined])
    return backend.to_str()
