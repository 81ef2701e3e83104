"""Target lengths without a tokenizer: characters or bytes, for a first look or for models that spell."""

from dataclasses import dataclass

from canter.errors import ConfigError

UNITS = ("chars", "bytes")


@dataclass(frozen=True)
class UnitCounter:
    """Stands for a tokenizer where only the number of tokens matters: one for each Unicode character, or
    byte."""

    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"{self.unit!r} cannot be counted; choose one of {', '.join(UNITS)}")

    @property
    def fingerprint(self) -> str:
        """Names the unit."""
        return self.unit

    def encode(self, text: str, lang: str | None = None) -> range:
        """As many numbers as there are units in the text."""
        return range(len(text) if self.unit == "chars" else len(text.encode()))
