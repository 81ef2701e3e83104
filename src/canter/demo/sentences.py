"""Generate sentences in two languages from a small grammar, with one word to about fifty.

No two words of a language sound alike, and the languages share none (about 60 words each). A hash of the text decides
whether a sentence belongs to the test part, so a test sentence is never in training, whatever seed, size or order.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

TEST_EVERY = 8  # one text in eight belongs to the test part
MEDIAN_WORDS, SPREAD, MAX_WORDS = 8.0, 0.85, 38  # log-normal length of a sentence in words


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _nouns(article: str, nouns: str) -> tuple[tuple[str, str], ...]:
    return tuple((article, noun) for noun in nouns.split())


@dataclass(frozen=True)
class Grammar:
    """The words of one language by their role; nouns come with their article."""

    people: tuple[tuple[str, str], ...]
    things: tuple[tuple[str, str], ...]
    places: tuple[tuple[str, str], ...]
    every: str
    adjectives: tuple[str, ...]
    adjective_first: bool
    verbs: tuple[str, ...]
    prepositions: tuple[str, ...]
    times: tuple[str, ...]
    numbered: str
    numbers: tuple[str, ...]
    conjunctions: tuple[str, ...]
    greetings: tuple[str, ...]

    @property
    def nouns(self) -> tuple[tuple[str, str], ...]:
        return self.people + self.things + self.places

    @property
    def content_words(self) -> tuple[str, ...]:
        """Words that may form a sentence by themselves."""
        nouns = tuple(noun for _, noun in self.nouns)
        return nouns + self.adjectives + self.verbs + self.times + self.numbers + self.greetings

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every word of the language."""
        function_words = self.prepositions + self.conjunctions + (self.every, self.numbered)
        return frozenset(self.content_words + function_words + tuple(article for article, _ in self.nouns))

    def sentence(self, rng: np.random.Generator) -> str:
        """Return a sentence as it is spoken: lower case, a comma for each pause."""
        length = min(round(rng.lognormal(np.log(MEDIAN_WORDS), SPREAD)), MAX_WORDS)
        if length <= 1:
            return _choice(rng, self.content_words)
        if length <= 3:
            return " ".join(self._phrase(rng))
        words = self._clause(rng)
        while len(words) < length:
            words[-1] += ","
            words += [_choice(rng, self.conjunctions), *self._clause(rng)]
        return " ".join(words)

    def _phrase(self, rng: np.random.Generator) -> list[str]:
        kind = rng.random()
        if kind < 0.25:
            return [_choice(rng, self.greetings), _choice(rng, self.people)[1]]
        if kind < 0.5:
            return self._number(rng)
        return self._noun(rng, self.nouns)

    def _clause(self, rng: np.random.Generator) -> list[str]:
        time = [_choice(rng, self.times)] if rng.random() < 0.35 else []
        words = time if rng.random() < 0.5 else []
        words = words + self._noun(rng, self.people) + [_choice(rng, self.verbs)]
        words += self._number(rng) if rng.random() < 0.15 else self._noun(rng, self.things)
        if rng.random() < 0.45:
            words += [_choice(rng, self.prepositions), *self._noun(rng, self.places)]
        return words if words[: len(time)] == time else words + time

    def _noun(self, rng: np.random.Generator, nouns: tuple[tuple[str, str], ...]) -> list[str]:
        article, noun = _choice(rng, nouns)
        article = self.every if rng.random() < 0.2 else article
        if rng.random() > 0.3:
            return [article, noun]
        adjective = _choice(rng, self.adjectives)
        return [article, adjective, noun] if self.adjective_first else [article, noun, adjective]

    def _number(self, rng: np.random.Generator) -> list[str]:
        return [self.numbered] + [_choice(rng, self.numbers) for _ in range(rng.integers(1, 4))]


GRAMMARS = {
    "en": Grammar(
        people=_nouns("the", "doctor farmer teacher captain sister grandfather musician"),
        things=_nouns("the", "window basket guitar umbrella elephant machine letter orange bicycle sandwich"),
        places=_nouns("the", "garden kitchen river mountain hospital airport village"),
        every="every",
        adjectives=_words("yellow little heavy broken quiet wonderful"),
        adjective_first=True,
        verbs=_words("carried painted opened followed discovered forgot watched brought"),
        prepositions=_words("behind inside under across"),
        times=_words("yesterday tonight suddenly always"),
        numbered="number",
        numbers=_words("three seven forty hundred"),
        conjunctions=_words("because while but and"),
        greetings=_words("hello please goodbye"),
    ),
    "es": Grammar(
        people=_nouns("el", "médico vecino abuelo cocinero") + _nouns("la", "profesora hermana reina"),
        things=_nouns("el", "caballo paraguas zapato libro sombrero")
        + _nouns("la", "ventana bandera naranja cuchara carta"),
        places=_nouns("el", "jardín bosque pueblo mercado castillo") + _nouns("la", "cocina playa"),
        every="cada",
        adjectives=_words("grande verde alegre azul importante triste"),
        adjective_first=False,
        verbs=_words("abrió compró escondió pintaba miraba buscaba olvidó encontró"),
        prepositions=_words("hacia desde sobre bajo"),
        times=_words("ayer anoche siempre temprano"),
        numbered="página",
        numbers=_words("cuatro siete quince ochenta"),
        conjunctions=_words("porque mientras pero luego"),
        greetings=_words("gracias bienvenido adiós"),
    ),
}


def reference_text(spoken: str) -> str:
    """Return the reference text of a spoken sentence: no punctuation."""
    return spoken.replace(",", "")


def is_test_text(text: str) -> bool:
    """Return True where a reference text belongs to the test part."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % TEST_EVERY == 0


def _choice(rng: np.random.Generator, options: tuple):
    return options[rng.integers(len(options))]
