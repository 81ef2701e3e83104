"""Tokenizers and prompt formats."""

from pathlib import Path

from canter.corpus.counting import UNITS, UnitCounter
from canter.errors import CheckpointError
from canter.text import owsm, sentencepiece, whisper
from canter.text.characters import Characters
from canter.text.nemo import read_nemo_tokenizer
from canter.text.owsm import OwsmTokenizer
from canter.text.sentencepiece import SentencePieceTokenizer, train_tokenizer
from canter.text.tokenizer import Tokenizer
from canter.text.whisper import WhisperTokenizer
from canter.untrusted import read_limited

__all__ = [
    "Characters",
    "OwsmTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "WhisperTokenizer",
    "load_counter",
    "load_tokenizer",
    "train_tokenizer",
]


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer | WhisperTokenizer | OwsmTokenizer:
    """Return the tokenizer in a file or folder. Raises CheckpointError if there is none.

    It may be a folder (Canter's, OWSM's or Whisper's, the latter with ``vocab.json`` too), a ``tokenizer.json``, a
    ``.nemo`` archive, or a SentencePiece ``.model`` with Canary's special tokens.
    """
    path = Path(path)
    if path.suffix == ".nemo":
        return read_nemo_tokenizer(path)
    if path.suffix == ".model":
        try:
            return SentencePieceTokenizer.of_model(read_limited(path, sentencepiece.MOST_TOKENIZER_BYTES))
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"{path}: {error}") from None
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name == sentencepiece.FILE) and (folder / sentencepiece.FILE).exists():
        return SentencePieceTokenizer.load(folder)
    if (path.is_dir() or path.name == owsm.FILE) and (folder / owsm.FILE).exists():
        return OwsmTokenizer.load(folder)
    if (path.is_dir() or path.suffix == ".json") and (folder / whisper.FILE).exists():
        return WhisperTokenizer.load(path / whisper.FILE if path.is_dir() else path)
    if path.is_dir() and (path / whisper.VOCABULARY).exists():
        return WhisperTokenizer.load_lists(path)
    raise CheckpointError(
        f"{path}: no tokenizer; give a .nemo file or a folder with {sentencepiece.FILE} or {whisper.FILE}"
    )


def load_counter(name: str | Path) -> SentencePieceTokenizer | WhisperTokenizer | OwsmTokenizer | UnitCounter:
    """Return a token counter: that of a unit ("chars", "bytes"), or the tokenizer at the path ``name``.

    Raises CheckpointError for a path without a tokenizer.
    """
    return UnitCounter(str(name)) if str(name) in UNITS else load_tokenizer(name)
