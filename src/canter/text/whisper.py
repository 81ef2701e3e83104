"""Whisper's byte-level BPE, read from ``tokenizer.json``, or from the lists of tokens and merges of older models."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.files import write_text
from canter.text.languages import find, same
from canter.text.merges import learn_merges
from canter.text.prompts import FORMATS, TASKS, prompt_ids, utterance_slots
from canter.text.spelling import Spelling, is_language_token, symbol_bytes
from canter.untrusted import Json, read_json_value, read_limited

FILE = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
ADDED, SETTINGS, SPECIALS = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
MOST_TOKENIZER_BYTES = 16 * 2**20
"""Size of a tokenizer.json; Whisper's have up to 4 MB."""
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>, every 20 ms, after <|notimestamps|>; many files omit them
TIMESTAMP_SECONDS = 0.02
ENGLISH_END = 50256  # English-only models use GPT-2's vocabulary, one token smaller than the multilingual one
TASK_TOKENS = ("transcribe", "translate")
UNSPOKEN_TOKENS = ("startoftranscript", "startofprev", "startoflm")
UNSPOKEN = """ " # ( ) * + / : ; < = > @ [ \\ ] ^ _ ` { | } ~ 「 」 『 』 << >> <<< >>> -- --- -( -[ (' (" (( )) ((( )))
[[ ]] {{ }} ♪♪ ♪♪♪ """
"""Marks that nothing in speech stands for, suppressed if they are one token."""
NOTES = "♩♪♫♬♭♮♯"
"""Marks suppressed by their first token, which several of them share."""
MOST_TOKENS = 500_000
MOST_SQUARES = 15_000_000
"""Sum of the squared lengths of all tokens whose merges are looked for; GPT-2 has 2.5 million."""
SPECIAL = re.compile(r"<\|[^|]*\|>")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Settings of an added token, with names as in ``tokenizer.json``."""


class WhisperTokenizer:
    """Whisper's tokenizer: ids below ``<|endoftext|>`` are text, the others special tokens and timestamps.

    Tokens with ids beyond the timestamps extend a model (see `extended`). They are text and languages; text of such a
    language is merged into the new pieces too, text of any other language as before. Pieces that stand before the first
    added language are for every language.
    """

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
        self._beyond = self._first_timestamp + TIMESTAMPS
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = sorted((number, token) for token, number in vocabulary.items() if number >= self._beyond)
        special = {number for number, one in self._backend.get_added_tokens_decoder().items() if one.special}
        self._special = special
        self.vocab_size = added[-1][0] + 1 if added else self._beyond
        tokens = {number: token for number, token in added if number in special and is_language_token(token)}
        self.added_languages = tuple(token.strip("<|>") for token in tokens.values())
        """Languages that an extension added."""
        self.added_text = frozenset(number for number, _ in added if number not in special)
        """Ids of pieces that an extension added."""
        self._before = self._backend  # for text of the languages that are not added
        first = min(tokens, default=self.vocab_size)
        if any(number > first for number in self.added_text):
            self._before = _without_merges_into(serialised, first)

    @property
    def languages(self) -> tuple[str, ...]:
        if not self.multilingual:
            return ("en", *self.added_languages)
        # the languages stand between <|startoftranscript|> and <|translate|>, which precedes <|transcribe|>
        first, last = self.special_id("<|startoftranscript|>") + 1, self.special_id("<|translate|>")
        own = (str(self._backend.id_to_token(number)).strip("<|>") for number in range(first, last))
        return (*own, *self.added_languages)

    @property
    def multilingual(self) -> bool:
        return self.end != ENGLISH_END

    @property
    def detects_language(self) -> bool:
        return self.multilingual

    @property
    def prompt_slots(self) -> tuple[str, ...]:
        return FORMATS["whisper" if self.multilingual else "whisper_english"]

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.serialised.encode(), digest_size=8).hexdigest()

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Return the ids of ``text``; one vocabulary serves all languages but those that were added with pieces."""
        added = self._before is not self._backend and lang is not None and find(lang, self.added_languages) is not None
        return (self._backend if added else self._before).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        if not special:
            kept = [number for number in ids if number < self.end or number in self.added_text]
            return self._backend.decode(kept).strip()
        text, run = "", []
        for number in ids:
            if not self._first_timestamp <= number < self._beyond:
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
        """Return the ids of Whisper's task prompt, which has no language and task in English-only models, except for
        languages that were added to them."""
        if self.multilingual or find(slots.get("source_lang", "en"), self.added_languages) is not None:
            return prompt_ids(self, "whisper", slots)
        for name in ("source_lang", "target_lang"):
            if not same(slots.get(name, "en"), "en"):
                raise ConfigError(f"{name} is '{slots[name]}', but this Whisper knows English only")
        if TASKS.get(slots.get("task", "")) == TASKS["translate"]:
            raise ConfigError("the task is to translate, but this Whisper knows English only and cannot; leave it out")
        return prompt_ids(self, "whisper_english", slots)

    def spelling(self, number: int) -> Spelling:
        """Return the text of an id as bytes, the name of a special token, or None for an id without a token."""
        if self._first_timestamp <= number < self._beyond:
            return f"<|{(number - self._first_timestamp) * TIMESTAMP_SECONDS:.2f}|>"
        token = self._backend.id_to_token(number)
        if token is None or number in self._special or self.end <= number < self._beyond:
            return token
        return symbol_bytes(token)

    def extended(self, language: str | None, texts: Sequence[str], pieces: int) -> "WhisperTokenizer":
        """Return the tokenizer with a token for ``language`` and ``pieces`` pieces learned from ``texts``.

        New ids follow the timestamps; all others stay. Text of other languages is encoded as before. Without a language
        the pieces are for every language, whose text is then encoded differently wherever they occur. An English-only
        model has unused tokens of other languages: one that is added gets a new token, and the unused one is renamed.

        Raises ConfigError for pieces for every language after those of one.
        """
        values = json.loads(self.serialised)
        model, number = values["model"], self.vocab_size
        # ids of added tokens that the vocabulary lacks would follow from its size, which grows
        model["vocab"] |= {one["content"]: one["id"] for one in values["added_tokens"]}
        if language is None and self.added_languages:
            raise ConfigError(
                "pieces for every language must be added before those of one, and the tokenizer has "
                f"{', '.join(self.added_languages)} already; name a language, or extend the original model"
            )
        merges = self._new_merges(texts, pieces, language) if pieces else []
        if language is not None:
            token = f"<|{language}|>"
            unused = next((one for one in values["added_tokens"] if one["content"] == token), None)
            if unused is not None:
                unused["content"] = f"<|unused {language}|>"
                model["vocab"][unused["content"]] = model["vocab"].pop(token)
            model["vocab"][token] = number
            settings = dict.fromkeys(FLAGS, False) | {"special": True}
            values["added_tokens"].append({"id": number, "content": token, **settings})
            number += 1
        for pair in merges:
            if "".join(pair) not in model["vocab"]:
                model["vocab"]["".join(pair)] = number
                number += 1
        split = not model["merges"] or isinstance(model["merges"][0], list)  # older files have "a b"
        model["merges"] += [list(pair) if split else " ".join(pair) for pair in merges]
        return WhisperTokenizer(json.dumps(values, ensure_ascii=False))

    def _new_merges(self, texts: Sequence[str], pieces: int, language: str | None) -> list[tuple[str, str]]:
        """Return merges of the pieces into which ``texts`` are cut, within words as the tokenizer divides them."""
        backend = self._backend if language is not None else self._before
        words: Counter[str] = Counter()
        for text in texts:
            plain = backend.normalizer.normalize_str(text) if backend.normalizer else text
            words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain))
        cut = {tuple(one.value for one in backend.model.tokenize(word)): count for word, count in words.items()}
        return learn_merges(cut, pieces, backend.get_vocab())

    def generation(self) -> dict[str, Json]:
        """Return the settings for decoding that follow from the tokens, named as in ``generation_config.json``.

        Suppressed are the tokens that openai-whisper suppresses (whisper/tokenizer.py, ``non_speech_tokens``): marks
        that are not spoken, and special tokens other than the end token and timestamps; the end token and a space
        only at the start.
        """
        known = {name: self._backend.token_to_id(f"<|{name}|>") for name in (*TASK_TOKENS, *UNSPOKEN_TOKENS)}
        no_timestamps = self._first_timestamp - 1
        unspoken = {no_timestamps - 1, *self.encode(" -")[:1], *self.encode(" '")[:1]}
        unspoken |= {number for number in known.values() if number is not None}
        for mark in (*UNSPOKEN.split(), *NOTES):
            for tokens in (self.encode(mark), self.encode(" " + mark)):
                unspoken |= set(tokens[:1]) if len(tokens) == 1 or mark in NOTES else set()
        found = {
            "eos_token_id": self.end,
            "pad_token_id": self.pad,
            "decoder_start_token_id": known["startoftranscript"],
            "prev_sot_token_id": known["startofprev"],
            "no_timestamps_token_id": no_timestamps,
            "max_initial_timestamp_index": 50,
            "suppress_tokens": sorted(unspoken),
            "begin_suppress_tokens": [*self.encode(" ")[:1], self.end],
            "is_multilingual": self.multilingual,
        }
        if self.multilingual:
            found["lang_to_id"] = {f"<|{name}|>": self.special_id(f"<|{name}|>") for name in self.languages}
            found["task_to_id"] = {name: known[name] for name in TASK_TOKENS}
        return {name: value for name, value in found.items() if value is not None}

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

    @classmethod
    def load_lists(cls, folder: str | Path) -> "WhisperTokenizer":
        """Read the ``vocab.json`` and ``merges.txt`` of a folder without ``tokenizer.json``.

        Special tokens are those of the vocabulary, ``added_tokens.json`` and ``tokenizer_config.json``, and those of
        ``special_tokens_map.json`` with the ids that follow. Without ``merges.txt`` the merges follow from the
        vocabulary (`merges_of`). Raises CheckpointError for a file that is missing or malformed, and for two files
        that contradict each other.
        """
        folder = Path(folder)
        ids = _ids(_json(folder / VOCABULARY), folder / VOCABULARY)
        flags: dict[str, dict[str, bool]] = {}
        for name in (ADDED, SETTINGS, SPECIALS):
            values = _json(folder / name) if (folder / name).exists() else {}
            if name == SETTINGS:
                values, found = _added(values, folder / name)
                flags |= found
            elif name == SPECIALS:
                values = _following(values, folder / name, ids)
            flags = {token: dict[str, bool]() for token in values} | flags
            for token, number in _ids(values, folder / name).items():
                if ids.setdefault(token, number) != number:
                    raise CheckpointError(
                        f"{folder / name}: {token!r:.80} has the id {number}, but in other files {ids[token]}; they do "
                        "not belong together: copy the tokenizer's files anew"
                    )
        return cls.of_tokens(ids, _merges(folder / MERGES), folder / VOCABULARY, flags)

    @classmethod
    def of_tokens(
        cls,
        ids: Mapping[str, int],
        merges: Sequence[tuple[str, str]] | None,
        source: str | Path,
        flags: Mapping[str, Mapping[str, bool]] | None = None,
    ) -> "WhisperTokenizer":
        """Return the tokenizer of all tokens, each with its id, and ``merges`` in their order (None: `merges_of`).

        Tokens such as ``<|en|>``, and those that ``flags`` names with their settings, are never merged from others.
        Raises CheckpointError that names ``source`` for tokens of which no tokenizer of Whisper can be made.
        """
        flags = flags or {}
        ordered = sorted(ids, key=ids.__getitem__)
        added = [token for token in ordered if token in flags or SPECIAL.fullmatch(token)]
        plain = [token for token in ordered if token not in flags and not SPECIAL.fullmatch(token)]
        if merges is None and sum(len(token) ** 2 for token in plain) > MOST_SQUARES:
            raise CheckpointError(f"{source} has too long tokens to derive their merges; add {FILE} to the folder")
        kept = merges_of(plain) if merges is None else merges
        settings = dict.fromkeys(FLAGS, False) | {"special": True}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        values = {
            "version": "1.0",
            "added_tokens": [{"id": ids[one], "content": one, **settings, **flags.get(one, {})} for one in added],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {
                "type": "BPE",
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "vocab": {token: ids[token] for token in ordered},
                "merges": [list(pair) for pair in kept],
            },
        }
        merged = (token for pair in kept for token in (*pair, "".join(pair)))
        if (missing := next((token for token in merged if token not in ids), None)) is not None:
            raise CheckpointError(f"{source} has no token {missing!r:.80}, which {MERGES} merges; copy both anew")
        if len(set(ids.values())) < len(ids):
            raise CheckpointError(f"{source}: two tokens have the same id; copy the tokenizer's files anew")
        try:
            return cls(json.dumps(values, ensure_ascii=False))
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{source}: {error}") from None

    def __reduce__(self):
        return WhisperTokenizer, (self.serialised,)


def merges_of(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Return the merges of a byte-level BPE from its tokens in the order in which they were learned.

    A token is the merge of the two pieces that the merges before it leave of its characters (Sennrich et al., 2016,
    arXiv 1508.07909). Tokens that no merge makes give none.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        pieces = list(token)
        while len(pieces) > 2:
            best, place = min((ranks.get(a + b, rank), at) for at, (a, b) in enumerate(itertools.pairwise(pieces)))
            if best >= rank:
                break
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        if len(pieces) == 2 and all(piece in ranks for piece in pieces):
            merges.append((pieces[0], pieces[1]))
    return merges


def _without_merges_into(serialised: str, first: int) -> tokenizers.Tokenizer:
    """Return a tokenizer without the merges whose results have ids from ``first`` on."""
    values = json.loads(serialised)
    vocabulary, kept = values["model"]["vocab"], []
    for pair in values["model"]["merges"]:
        one, other = pair if isinstance(pair, list) else pair.split(" ")
        if all(vocabulary[token] < first for token in (one, other, one + other)):
            kept.append(pair)
    values["model"]["merges"] = kept
    backend = tokenizers.Tokenizer.from_str(json.dumps(values, ensure_ascii=False))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _json(path: Path) -> dict[str, Json]:
    try:
        values = read_json_value(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def _ids(values: Mapping[str, Json], source: Path) -> dict[str, int]:
    """Return tokens with their ids, after checking them."""
    for token, number in values.items():
        if type(number) is not int or not 0 <= number < MOST_TOKENS:
            raise CheckpointError(
                f"{source}: {token!r:.80} has the id {number!r:.80}; it must be a number below {MOST_TOKENS:,}"
            )
    return dict(values)


def _added(values: Mapping[str, Json], source: Path) -> tuple[dict[str, int], dict[str, dict[str, bool]]]:
    """Return ids and flags of the tokens that a ``tokenizer_config.json`` adds."""
    added, ids, flags = values.get("added_tokens_decoder") or {}, {}, {}
    if not isinstance(added, dict):
        raise CheckpointError(f"{source}: added_tokens_decoder is {added!r:.80}; it must be an object of tokens by id")
    for number, one in added.items():
        token = one.get("content") if isinstance(one, dict) else None
        if not re.fullmatch("[0-9]{1,7}", number) or not isinstance(token, str):
            raise CheckpointError(f"{source}: added_tokens_decoder.{number:.80} is {one!r:.80}, not a token by its id")
        ids[token], flags[token] = int(number), {name: bool(one[name]) for name in FLAGS if name in one}
    return ids, flags


def _following(values: Mapping[str, Json], source: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """Return the tokens that a ``special_tokens_map.json`` adds to ``ids``, with the ids that follow."""
    listed = values.get("additional_special_tokens") or []
    named = [one.get("content") if isinstance(one, dict) else one for one in listed] if type(listed) is list else [None]
    tokens = [token for token in named if isinstance(token, str)]
    if len(tokens) < len(named):
        raise CheckpointError(f"{source}: additional_special_tokens is {listed!r:.80}; it must be a list of tokens")
    new = dict.fromkeys(token for token in tokens if token not in ids)
    return dict(zip(new, itertools.count(max(ids.values(), default=-1) + 1), strict=False))


def _merges(path: Path) -> list[tuple[str, str]] | None:
    """Return the pairs of a ``merges.txt``; None where there is no such file."""
    try:
        lines = read_limited(path, MOST_TOKENIZER_BYTES).decode().split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#version"):
            continue
        one, _, other = line.rstrip("\r").partition(" ")
        if not one or not other or " " in other:
            raise CheckpointError(f"{path}:{number}: {line!r:.80} is not a pair of tokens with one space between them")
        pairs.append((one, other))
    return pairs
