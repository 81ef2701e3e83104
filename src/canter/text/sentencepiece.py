"""The tokenizer of Canary models: special tokens, then one SentencePiece vocabulary, or one for each language.

The S special tokens have ids 0 to S - 1, and each vocabulary follows with an offset, in order. With a vocabulary for
each language this is NeMo's aggregate tokenizer of canary-1b and flash; `train_tokenizer` makes one vocabulary that all
languages share. Where the special tokens are pieces of the one vocabulary, as in canary-1b-v2, S is 0. An extension
(`SentencePieceTokenizer.extended`) adds ids after all others: a language's token, and a vocabulary of that language.
"""

import hashlib
import io
import json
import random
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import sentencepiece
from tokenizers import decoders

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.files import write_bytes, write_text
from canter.text.languages import canonical, find, is_said
from canter.text.prompts import FORMATS, prompt_ids, utterance_slots
from canter.text.spelling import Spelling, piece_bytes
from canter.text.tokenizer import Tokenizer
from canter.untrusted import is_file_name, read_json_value, read_limited

FILE = "canter_tokenizer.json"
FORMAT = "canter-tokenizer/1"
EXTENDED = "canter-tokenizer/2"
"""Format of a tokenizer with added tokens or vocabularies, which versions without them would read as another."""
SHARED = ""  # name of a vocabulary for every language
UNKNOWN_LANGUAGE = "unklang"
BASIC_TOKENS = (
    "<unk>", "<|nospeech|>", "<pad>", "<|endoftext|>", "<|startoftranscript|>", "<|pnc|>", "<|nopnc|>",
    "<|transcribe|>", "<|translate|>", "<|unklang|>",
)  # fmt: skip
MOST_TOKENIZER_BYTES = 4 * 2**20
"""Maximum size of one SentencePiece model, about that of 256,000 pieces."""
MOST_MODELS_BYTES = 2 * MOST_TOKENIZER_BYTES
"""Maximum size of the models of all languages together."""
MOST_SENTENCES = 1_000_000  # a tokenizer is trained on a random sample of this size
_TIMESTAMP = re.compile(r"(<\|\d+\|>)")
_LANGUAGE = re.compile(r"<\|(?!(?:pnc|itn)\|)([A-Za-z]{2,3}(?:[-_]\w+)*)\|>")
SPACED = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
"""Pieces to text, with the space before the first word."""
SPECIAL_PIECE = re.compile(r"<\|.+\|>|<pad>")
_TOO_LARGE = re.compile(r"<= (\d+)")


class CanaryTokens:
    """Base of tokenizers with Canary's special tokens: it looks them up, and makes prompts of them."""

    detects_language = False
    loss_after = None
    prompt_format: str
    defaults: dict[str, str]
    special_numbers: frozenset[int]
    """Ids that are not text."""
    end: int
    _special_ids: dict[str, int]

    def text_ids(self, text: str, lang: str | None) -> list[int]:
        """Return the ids of text without special tokens."""
        raise NotImplementedError

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Return the ids of ``text``.

        "<|endoftext|>" at the end and, where the vocabulary has them, timestamps such as "<|12|>" are special tokens;
        anything else is plain text. Raises ConfigError for a language without a vocabulary.
        """
        if "<|" not in text:
            return self.text_ids(text, lang)
        end = text.endswith("<|endoftext|>")
        parts = [text.removesuffix("<|endoftext|>")]
        if "<|0|>" in self._special_ids and _TIMESTAMP.search(text):
            parts = [part.strip() for part in _TIMESTAMP.split(parts[0])]
        ids: list[int] = []
        for part in parts:
            if _TIMESTAMP.fullmatch(part) and part in self._special_ids:
                ids.append(self._special_ids[part])
            else:
                ids += self.text_ids(part, lang)
        return [*ids, self.end] if end else ids

    @property
    def languages(self) -> tuple[str, ...]:
        found = (_LANGUAGE.fullmatch(token) for token in self._special_ids)
        return tuple(match[1] for match in found if match)

    def special_id(self, token: str) -> int:
        if token not in self._special_ids:
            languages = f"; its languages are {', '.join(self.languages)}" if _LANGUAGE.fullmatch(token) else ""
            raise ConfigError(f"the tokenizer has no special token {token}{languages}")
        return self._special_ids[token]

    def prompt(self, utterance: Utterance) -> list[int]:
        return self.prompt_ids(utterance_slots(utterance))

    def prompt_ids(self, slots: Mapping[str, str]) -> list[int]:
        return prompt_ids(cast(Tokenizer, self), self.prompt_format, {**self.defaults, **slots})


class SentencePieceTokenizer(CanaryTokens):
    """Special tokens and SentencePiece models (``{language: serialised model}``, or one for all under "").

    ``special`` is empty where the one vocabulary has the special tokens among its pieces. ``defaults`` are values of
    prompt slots (``source_lang``, ...) that an utterance leaves unset. ``added`` lists what stands after the original
    vocabularies, in order: special tokens (``<|kab|>``), and languages of ``models`` whose vocabularies stand there.
    """

    def __init__(
        self,
        special: Sequence[str],
        models: Mapping[str, bytes],
        prompt_format: str = "canary",
        defaults: Mapping[str, str] | None = None,
        added: Sequence[str] = (),
    ):
        self.special, self.models, self.added = tuple(special), dict(models), tuple(added)
        texts = (*self.special, *self.models, *self.added, *(defaults or {}), *(defaults or {}).values())
        if isinstance(special, str) or isinstance(added, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError("special tokens, languages and prompt slots must be texts")
        tokens = [one for one in self.added if SPECIAL_PIECE.fullmatch(one)]
        if len({*self.added}) < len(self.added) or not {*self.added} <= {*tokens, *self.models}:
            raise ValueError(f"added tokens and vocabularies {list(self.added)} are not those of its models")
        if not all(self.models.values()):
            raise ValueError("a SentencePiece model is empty")
        if prompt_format not in FORMATS:
            raise ConfigError(f"{prompt_format!r:.80} is not a prompt format; there are {', '.join(FORMATS)}")
        self.prompt_format, self.defaults = prompt_format, dict(defaults or {})
        self._processors = {
            lang: sentencepiece.SentencePieceProcessor(model_proto=model) for lang, model in self.models.items()
        }
        self._parts = [*(lang for lang in self.models if lang not in self.added), *self.added]
        self._starts = [len(self.special)]
        for name in self._parts:
            size = self._processors[name].vocab_size() if name in self._processors else 1
            self._starts.append(self._starts[-1] + size)
        places = dict(zip(self._parts, self._starts))
        self.offsets = {lang: places[lang] for lang in self.models}
        self._special_ids = {token: number for number, token in enumerate(self.special)}
        if not self.special:
            self._special_ids = _special_pieces(self._processors[SHARED])
        self._special_ids |= {token: places[token] for token in tokens}
        self.special_numbers = frozenset(self._special_ids.values())
        self.pad, self.end = self.special_id("<pad>"), self.special_id("<|endoftext|>")

    @property
    def vocab_size(self) -> int:
        return self._starts[-1]

    @property
    def fingerprint(self) -> str:
        parts = (self.special, list(self.models), *([self.added] if self.added else []))
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8)
        for model in self.models.values():
            digest.update(model)
        return digest.hexdigest()

    def text_ids(self, text: str, lang: str | None) -> list[int]:
        """Return the ids of text without special tokens; raise ConfigError for a language without a vocabulary."""
        name = lang if is_said(lang) else self.defaults.get("target_lang")
        name = find(name or "", filter(None, self._processors)) or name
        if name not in self._processors:
            if SHARED not in self._processors:
                raise ConfigError(
                    f"the tokenizer has no vocabulary for language '{name}', only {', '.join(self.models)}; "
                    "correct 'lang' in the manifest"
                )
            name = SHARED
        offset = self.offsets[name]
        return [offset + number for number in self._processors[name].encode(text)]

    def piece(self, number: int) -> str:
        """Return the piece of an id, with "▁" for a space. Raises ValueError for an id beyond the vocabulary."""
        if not 0 <= number < self.vocab_size:
            raise ValueError(f"token id {number} is not in the vocabulary of {self.vocab_size}")
        if number < len(self.special):
            return self.special[number]
        place = bisect_right(self._starts, number) - 1
        name = self._parts[place]
        return self._processors[name].id_to_piece(number - self._starts[place]) if name in self._processors else name

    def spelling(self, number: int) -> Spelling:
        """Return the text of an id as bytes, or the name of a special or unknown token."""
        piece = self.piece(number)
        return piece if number in self.special_numbers or piece == "<unk>" else piece_bytes(piece)

    def extended(self, language: str | None, texts: Sequence[str], pieces: int) -> "SentencePieceTokenizer":
        """Return the tokenizer with a token for ``language`` and a vocabulary of ``pieces`` for its text, trained on
        ``texts``, at the end; all other ids, and the encoding of any other language, stay.

        Raises ConfigError without a language, and for an aggregate of vocabularies without pieces.
        """
        if language is None:
            raise ConfigError("this tokenizer takes new pieces only for a language; name it with --language")
        if find(language, filter(None, self.models)):
            raise ConfigError(f"the tokenizer has a vocabulary for '{language}' already")
        if not pieces and SHARED not in self.models:
            raise ConfigError(
                f"this tokenizer has a vocabulary for each language ({', '.join(self.models)}): '{language}' needs one "
                "too; give --pieces and text"
            )
        known = find(language, self.languages)
        added = [] if known else [f"<|{language}|>"]
        models = dict(self.models)
        if pieces:
            added.append(known or language)
            models[known or language] = train_model(texts, pieces, f"a vocabulary of {language}")
        return SentencePieceTokenizer(self.special, models, self.prompt_format, self.defaults, (*self.added, *added))

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of ids; with ``special`` exactly NeMo's, with special tokens and the leading space."""
        kept = ids if special else (number for number in ids if number not in self.special_numbers)
        text = SPACED.decode(list(map(self.piece, kept)))
        return text if special else text.strip()

    def save(self, folder: str | Path) -> None:
        """Write ``canter_tokenizer.json`` and a ``tokenizer[.LANG].model`` for each vocabulary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {lang: f"tokenizer.{lang}.model" if lang else "tokenizer.model" for lang in self.models}
        for lang, model in self.models.items():
            write_bytes(folder / files[lang], model)
        values = {
            "format": FORMAT,
            "prompt_format": self.prompt_format,
            "defaults": self.defaults,
            "models": files,
            "special": self.special,
            **({"format": EXTENDED, "added": self.added} if self.added else {}),
        }
        write_text(folder / FILE, json.dumps(values, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def of_model(
        cls, model: bytes, prompt_format: str | None = None, defaults: Mapping[str, str] | None = None
    ) -> "SentencePieceTokenizer":
        """Return the tokenizer of one serialised SentencePiece model with Canary's special tokens among its pieces.

        Without ``prompt_format`` it is "canary2" where the model has that format's first token, else "canary". Raises
        CheckpointError for data that is not such a model.
        """
        try:
            tokenizer = cls((), {SHARED: model}, prompt_format or "canary", defaults)
        except ConfigError as error:
            raise CheckpointError(
                f"a SentencePiece model whose pieces are not a Canary's: {error}; 'canter tokenizer' trains one "
                "that fits"
            ) from None
        except RuntimeError as error:
            raise CheckpointError(f"not a SentencePiece model ({error})") from None
        if prompt_format is None and "<|startofcontext|>" in tokenizer._special_ids:
            tokenizer.prompt_format = "canary2"
        return tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> "SentencePieceTokenizer":
        """Read the files that `save` writes. Raises CheckpointError if something is missing or malformed."""
        file = Path(folder) / FILE
        try:
            values = read_json_value(file)
            if values.get("format") not in (FORMAT, EXTENDED):
                raise ValueError(f"its format is {values.get('format')!r}, not {FORMAT} or {EXTENDED}")
            names = values["models"]
            if not all(map(is_file_name, names.values())):
                raise ValueError("a model file lies outside the folder")
            models = read_models(names, lambda name: read_limited(Path(folder) / name, MOST_TOKENIZER_BYTES))
            return cls(values["special"], models, values["prompt_format"], values["defaults"], values.get("added", ()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{file}: not a tokenizer ({error})") from None

    def __reduce__(self):
        return SentencePieceTokenizer, (self.special, self.models, self.prompt_format, self.defaults, self.added)


def read_models(names: Mapping[str, str], read: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return the serialised model of each language. Raises CheckpointError where they are too large together."""
    models: dict[str, bytes] = {}
    for lang, name in names.items():
        models[lang] = read(name)
        if sum(map(len, models.values())) > MOST_MODELS_BYTES:
            raise CheckpointError(f"its SentencePiece models have more than {MOST_MODELS_BYTES:,} bytes; refused")
    return models


def _special_pieces(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Return the ids of pieces that are not text: unknown and control pieces, ``<pad>`` and all ``<|...|>``."""
    pieces = ((processor.id_to_piece(number), number) for number in range(processor.vocab_size()))
    return {
        piece: number
        for piece, number in pieces
        if SPECIAL_PIECE.fullmatch(piece) or processor.is_control(number) or processor.is_unknown(number)
    }


def train_tokenizer(
    texts: Iterable[str], languages: Iterable[str], vocab_size: int, folder: str | Path | None = None
) -> SentencePieceTokenizer:
    """Train one BPE vocabulary on ``texts``, for prompts in ``languages``, and save it to ``folder``.

    ``vocab_size`` includes the special tokens; it is lowered, with a warning, where the text is too small for it.
    Raises ConfigError if there is no text, or ``vocab_size`` is less than the number of characters.
    """
    languages = sorted({canonical(language) or language for language in languages if is_said(language)})
    special = (*BASIC_TOKENS, *(f"<|{lang}|>" for lang in languages))
    model = train_model(texts, vocab_size - len(special), "a tokenizer", len(special))
    language = languages[0] if len(languages) == 1 else UNKNOWN_LANGUAGE
    defaults = {"source_lang": language, "target_lang": language}
    tokenizer = SentencePieceTokenizer(special, {SHARED: model}, "canary", defaults)
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def train_model(texts: Iterable[str], size: int, what: str, others: int = 0) -> bytes:
    """Return a serialised BPE model of ``size`` pieces, fewer, with a warning, where the texts have no more.

    ``what`` names it in messages, in which ``others`` tokens beside the pieces count. Raises ConfigError if there is no
    text, or ``size`` is less than the number of characters.
    """
    sentences = _sample(line for text in texts if (line := " ".join(text.split())))
    if not sentences:
        raise ConfigError("a tokenizer cannot be trained: there is no text")
    try:
        return _train(sentences, size)
    except RuntimeError as error:
        most = _TOO_LARGE.search(str(error))
        if "too high" not in str(error) or most is None:
            smallest = others + len(set("".join(sentences))) + 2
            raise ConfigError(
                f"{what} of {size + others} tokens cannot be trained; this text needs at least {smallest}"
            ) from None
    model = _train(sentences, int(most[1]))
    warnings.warn(
        f"tokenizer: the text has only {most[1]} pieces to learn; vocabulary lowered from {size + others} to "
        f"{int(most[1]) + others}",
        stacklevel=3,
    )
    return model


def _sample(sentences: Iterable[str]) -> list[str]:
    """Return a uniform random sample of at most MOST_SENTENCES sentences (Vitter's algorithm R), always the same."""
    rng = random.Random(0)
    kept: list[str] = []
    for number, sentence in enumerate(sentences):
        if number < MOST_SENTENCES:
            kept.append(sentence)
        elif (place := rng.randrange(number + 1)) < MOST_SENTENCES:
            kept[place] = sentence
    return kept


def _train(sentences: Sequence[str], size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    return model.getvalue()
