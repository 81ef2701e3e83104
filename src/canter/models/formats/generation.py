"""Check ``generation_config.json``, Hugging Face's description of how a model is to be decoded."""

from __future__ import annotations

from pathlib import Path

from canter.errors import CheckpointError
from canter.models.formats.files import Settings
from canter.text import OwsmTokenizer, Tokenizer, WhisperTokenizer

MOST_IDS = 100_000
"""Entries of a list of token ids."""
MOST_LENGTH = 1_000_000
# Setting -> least and greatest value; both limits are allowed.
RANGES: dict[str, tuple[float, float]] = {
    "max_length": (0, MOST_LENGTH),
    "max_new_tokens": (0, MOST_LENGTH),
    "min_length": (0, MOST_LENGTH),
    "min_new_tokens": (0, MOST_LENGTH),
    "num_beams": (1, 1000),
    "num_return_sequences": (1, 1000),
    "length_penalty": (-100, 100),
    "repetition_penalty": (0, 100),
    "temperature": (0, 100),
    "top_k": (0, 10_000_000),
    "top_p": (0, 1),
    "no_repeat_ngram_size": (0, 10_000),
    "max_initial_timestamp_index": (0, 100_000),
    "window_seconds": (0.1, 3600),
    "tokens_per_frame": (0, 1000),
}
WHOLE = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k",
         "no_repeat_ngram_size", "max_initial_timestamp_index")  # fmt: skip
FLAGS = ("use_cache", "is_multilingual", "return_timestamps")
TABLES = ("lang_to_id", "task_to_id", "text_decoder_lang_to_code_id")
IDS = (
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "no_timestamps_token_id",
    "first_timestamp_token_id",
    "last_timestamp_token_id",
    "forced_bos_token_id",
    "prev_sot_token_id",
)
"""Ids that decoding reads; others, such as ``bos_token_id``, have defaults of larger vocabularies in many files."""
ONE_OR_MORE = ("eos_token_id", "decoder_start_token_id")
CHOICES = {"timestamp_rules": ("whisper", "espnet"), "beam_search": ("nemo", "huggingface", "espnet")}
LISTS = ("suppress_tokens", "begin_suppress_tokens")


def check_generation(
    values: Settings, source: str | Path, vocabulary: int, heads: tuple[int, int] | None = None
) -> Settings:
    """Return the settings, after checking those that decoding reads; others are kept as they are.

    ``vocabulary`` is the number of the model's tokens, ``heads`` the layers of its decoder and the heads of each.
    Raises CheckpointError naming ``source``, the setting and its value: token ids beyond the vocabulary, numbers out of
    range, lists without end, attention heads that the decoder lacks.
    """

    def refuse(name: str, value: object, what: str) -> CheckpointError:
        return CheckpointError(f"{source}: {name} is {value!r:.80}; it must be {what}")

    def is_id(value: object) -> bool:
        return isinstance(value, int) and _is_number(value) and value < vocabulary

    for name, value in values.items():
        if value is None:
            continue
        ids = f"a token id below the model's vocabulary of {vocabulary}"
        if name in RANGES:
            least, most = RANGES[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not least <= value <= most:
                raise refuse(name, value, f"a number from {least:,} to {most:,}")
            if name in WHOLE and not isinstance(value, int):
                raise refuse(name, value, "a whole number")
        elif name in LISTS or (name in ONE_OR_MORE and isinstance(value, list)):
            if not isinstance(value, list) or len(value) > MOST_IDS:
                raise refuse(name, value, f"a list of at most {MOST_IDS:,} token ids")
            for one in value:
                if not is_id(one):
                    raise refuse(f"an entry of {name}", one, ids)
        elif name in CHOICES:
            if value not in CHOICES[name]:
                raise refuse(name, value, f"one of {', '.join(CHOICES[name])}")
        elif name in FLAGS:
            if not isinstance(value, bool):
                raise refuse(name, value, "true or false")
        elif name in TABLES:
            if not isinstance(value, dict) or len(value) > MOST_IDS or not all(map(is_id, value.values())):
                raise refuse(name, value, f"an object of names, each with {ids}")
        elif name == "alignment_heads":
            layers, each = heads or (MOST_IDS, MOST_IDS)
            if not isinstance(value, list) or len(value) > MOST_IDS or not all(map(_is_pair, value)):
                raise refuse(name, value, "a list of [layer, head]")
            if not all(0 <= layer < layers and 0 <= head < each for layer, head in value):
                raise refuse(name, value, f"a list of [layer, head] of {layers} layers with {each} heads")
        elif name in IDS and not is_id(value):
            raise refuse(name, value, ids)
        elif name.endswith("_token_id") and not _is_number(value):
            raise refuse(name, value, "a token id")
    first, last = (values.get(f"{name}_timestamp_token_id") for name in ("first", "last"))
    if isinstance(first, int) and isinstance(last, int) and last < first:
        raise refuse("last_timestamp_token_id", last, f"at least first_timestamp_token_id, {first}")
    return dict(values)


def with_defaults(tokenizer: Tokenizer | None, *given: Settings) -> Settings:
    """Return the settings of ``given``, later ones over earlier ones, over those that follow from the tokens of
    Whisper and OWSM.

    None counts as unset, as in transformers; an empty list of suppressed tokens does not.
    """
    found = tokenizer.generation() if isinstance(tokenizer, WhisperTokenizer | OwsmTokenizer) else {}
    for settings in given:
        found |= {name: value for name, value in settings.items() if value is not None or name not in found}
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)
