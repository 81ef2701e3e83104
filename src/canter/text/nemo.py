"""The tokenizer in a NeMo archive of Canary (``.nemo``: a plain tar); nothing is extracted to disk."""

from collections.abc import Callable, Mapping
from pathlib import Path

import sentencepiece

from canter.errors import CheckpointError
from canter.text.archive import Archive, open_archive
from canter.text.sentencepiece import MOST_TOKENIZER_BYTES, SentencePieceTokenizer, read_models
from canter.untrusted import Json

SPECIAL = "spl_tokens"  # NeMo's name for the vocabulary of special tokens


def nemo_tokenizer(config: Mapping[str, Json], read: Callable[[str, int], bytes]) -> SentencePieceTokenizer:
    """Return the tokenizer of a NeMo configuration; ``read(name, most)`` returns a member of its archive.

    It is an aggregate of special tokens and languages (canary-1b and flash), or one SentencePiece model with the
    special tokens among its pieces (canary-1b-v2). Raises CheckpointError if it is neither.
    """
    try:
        turns = config.get("prompt_defaults") or []
        slots = next((turn["slots"] for turn in turns if turn.get("role") == "user"), {})
        defaults = {name: str(value) for name, value in slots.items()}
        if not config["tokenizer"].get("langs"):
            model = read(_member(config["tokenizer"]["model_path"]), MOST_TOKENIZER_BYTES)
            return SentencePieceTokenizer.of_model(model, config.get("prompt_format"), defaults)
        paths = {lang: entry["model_path"] for lang, entry in config["tokenizer"]["langs"].items()}
        if next(iter(paths)) != SPECIAL:
            raise ValueError(f"its first vocabulary is {next(iter(paths))}, not {SPECIAL}")
        models = read_models(paths, lambda path: read(_member(path), MOST_TOKENIZER_BYTES))
        pieces = sentencepiece.SentencePieceProcessor(model_proto=models.pop(SPECIAL))
        special = [pieces.id_to_piece(number) for number in range(pieces.vocab_size())]
        return SentencePieceTokenizer(special, models, str(config.get("prompt_format", "canary")), defaults)
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration, RuntimeError) as error:
        raise CheckpointError(f"not the tokenizer of a Canary ({type(error).__name__}: {error})") from None


def _member(path: str) -> str:
    """Return the member's name in the archive, which the configuration writes as ``nemo:NAME``."""
    return str(path).removeprefix("nemo:").removeprefix("./")


def read_nemo_tokenizer(path: str | Path) -> SentencePieceTokenizer:
    """Return the tokenizer of the archive at ``path``. Raises CheckpointError if it cannot be read."""
    path = Path(path)
    with open_archive(path, Archive) as archive:
        return nemo_tokenizer(archive.config(), archive.read)
