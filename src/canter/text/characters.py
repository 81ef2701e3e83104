"""Characters as the targets of the auxiliary CTC loss; id 0 is the blank."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from canter.errors import CheckpointError
from canter.files import write_text
from canter.untrusted import read_json_value

FILE = "characters.json"


class Characters:
    """An alphabet: ``symbols[i]`` has id i + 1. Other characters are left out of targets."""

    def __init__(self, symbols: Sequence[str]):
        self.symbols = tuple(symbols)
        self._ids = {symbol: number for number, symbol in enumerate(self.symbols, 1)}

    @classmethod
    def of(cls, texts: Iterable[str], at_least: int = 1) -> "Characters":
        """Return the alphabet of the characters that occur ``at_least`` times, sorted, and the space."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        return cls(sorted({c for c, count in counts.items() if count >= at_least} | {" "}))

    @classmethod
    def load(cls, folder: str | Path) -> "Characters":
        """Read the file that `save` writes. Raises CheckpointError if it is missing or malformed."""
        file = Path(folder) / FILE
        try:
            symbols = read_json_value(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
        if not isinstance(symbols, list) or not all(isinstance(s, str) and len(s) == 1 for s in symbols):
            raise CheckpointError(f"{file} is not a list of characters")
        return cls(symbols)

    def save(self, folder: str | Path) -> None:
        """Write ``characters.json`` into the folder."""
        write_text(Path(folder) / FILE, json.dumps(self.symbols, ensure_ascii=False) + "\n")

    @property
    def size(self) -> int:
        """Number of outputs of the CTC head, the blank included."""
        return len(self.symbols) + 1

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b("".join(self.symbols).encode(), digest_size=8).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of the characters of ``text`` that the alphabet has."""
        return [self._ids[character] for character in text if character in self._ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, which hold no blank."""
        return "".join(self.symbols[number - 1] for number in ids)
