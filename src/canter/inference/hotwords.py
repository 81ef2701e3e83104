"""Hot words as a user writes them: phrases, in a file or separated by commas, to the tokens that spell them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from canter.errors import ConfigError
from canter.inference.engine.hotwords import HotWords
from canter.inference.transcript.reading import raw_text
from canter.inference.transcript.segments import UNSPACED
from canter.text.tokenizer import Tokenizer

WEIGHT = 4.0
"""Default weight, in nats."""
MOST_PHRASES = 5000
LONGEST_PHRASE = 200  # characters


@dataclass(frozen=True)
class Phrases:
    """Phrases to prefer where the model finds them almost as probable as its own text.

    Raises ConfigError for too many or too long phrases, and a weight that is not above 0.
    """

    phrases: tuple[str, ...]
    weight: float = WEIGHT
    """Nats by which a phrase may be less probable than the model's own text, all its tokens together."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 100:
            raise ConfigError(f"the weight of hot words is {self.weight:g}; it must lie above 0 and at most at 100")
        if len(self.phrases) > MOST_PHRASES:
            raise ConfigError(f"there are {len(self.phrases):,} hot words; the limit is {MOST_PHRASES:,}")
        for phrase in self.phrases:
            if len(phrase) > LONGEST_PHRASE:
                raise ConfigError(f"the hot word {phrase[:40]!r}... has {len(phrase)} characters, over the limit of "
                                  f"{LONGEST_PHRASE}: give words or short phrases")  # fmt: skip
            if not any(character.isalnum() for character in phrase):
                raise ConfigError(f"the hot word {phrase!r} has neither letters nor digits")

    @classmethod
    def read(cls, given: str, weight: float = WEIGHT) -> "Phrases":
        """Return the phrases of a text file with one a line, or of a list separated by commas.

        Raises ConfigError for a file that cannot be read, or where there is no phrase.
        """
        parts = given.split(",")
        if Path(given).suffix == ".txt" or ("," not in given and Path(given).is_file()):
            try:
                parts = Path(given).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"hot words: {given} cannot be read: {getattr(error, 'strerror', error)}") from None
        return cls.of(parts, weight, given)

    @classmethod
    def of(cls, phrases: Iterable[str], weight: float = WEIGHT, source: str = "the list") -> "Phrases":
        """Return the phrases with white space normalised, each once; raise ConfigError where there is none."""
        found = tuple(dict.fromkeys(" ".join(phrase.split()) for phrase in phrases if phrase.strip()))
        if not found:
            raise ConfigError(f"hot words: {source} holds none; give words or phrases separated by commas")
        return cls(found, weight)


def hotwords_of(phrases: Phrases, tokenizer: Tokenizer, vocabulary: int, language: str | None = None) -> HotWords:
    """Return the phrases as a prefix tree of tokens, each as written and with a capital as at the start of a sentence.

    vocabulary: number of tokens of the model. language: of tokenizers with several vocabularies.

    Raises ConfigError for a phrase that the tokenizer cannot spell.
    """
    inside: list[list[int]] = []
    at_start: list[list[int]] = []
    for phrase in phrases.phrases:
        for written in _spellings(phrase, tokenizer, language):
            spaced, first = _after(tokenizer, written, language), tokenizer.encode(written, language)
            inside.append(spaced)
            if first != spaced:
                at_start.append(first)
    return HotWords(inside, phrases.weight, _begins_word(tokenizer, vocabulary), at_start)


def _spellings(phrase: str, tokenizer: Tokenizer, language: str | None) -> Iterator[str]:
    """Yield the forms of a phrase that the tokenizer can spell; a vocabulary without capitals spells the small one."""
    for forms in ((phrase, phrase[:1].upper() + phrase[1:]), (phrase.lower(),)):
        found = [form for form in forms if _plain(tokenizer.decode(tokenizer.encode(form, language))) == _plain(form)]
        if found:
            yield from dict.fromkeys(found)
            return
    raise ConfigError(f"the model's tokenizer cannot spell the hot word {phrase!r}")


def _plain(text: str) -> str:
    return "".join(text.split())


def _after(tokenizer: Tokenizer, phrase: str, language: str | None) -> list[int]:
    """Return the tokens of a phrase that follows other text."""
    before = "的" if UNSPACED.match(phrase) else "a"
    lead = tokenizer.encode(before, language)
    both = tokenizer.encode(f"{before}{'' if UNSPACED.match(phrase) else ' '}{phrase}", language)
    return both[len(lead) :] if both[: len(lead)] == lead else tokenizer.encode(phrase, language)


@lru_cache(maxsize=8)
def _begins_word(tokenizer: Tokenizer, vocabulary: int) -> Sequence[bool]:
    """Return, for each token, whether a word may end before it: not before a letter or digit that is joined to it."""
    texts = (raw_text(tokenizer, [token]) for token in range(min(tokenizer.vocab_size, vocabulary)))
    found = [not text[:1].isalnum() or bool(UNSPACED.match(text)) for text in texts]
    return found + [True] * (vocabulary - len(found))
