"""Segments and words of a transcript, with their times."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
"""Characters of scripts that put no space between words."""


@dataclass(frozen=True)
class Word:
    """One word. Times are seconds from the start of the utterance's audio."""

    start: float
    end: float
    text: str
    """As it stands in the text: with its punctuation, without space around."""
    probability: float
    """Mean probability of its tokens."""


@dataclass(frozen=True)
class Segment:
    """A stretch of speech that the model, or a cut of long audio, set apart."""

    start: float
    """Seconds from the start of the utterance's audio."""
    end: float
    text: str
    tokens: tuple[int, ...] = ()
    """Timestamps included, where the model wrote them."""
    words: tuple[Word, ...] = ()
    """Empty unless times of words were asked for."""
    avg_logprob: float = 0.0
    """Mean natural-log probability of the tokens of the window that it was decoded in, end token included."""
    temperature: float = 0.0
    """Of sampling, in the attempt at that window that was kept; 0: greedy or beam search."""
    no_speech_prob: float = 0.0
    """Probability of Whisper's no-speech token at the start of that window; 0 for models without one."""

    def shifted(self, seconds: float) -> "Segment":
        """The same, so many seconds later."""
        words = tuple(replace(word, start=word.start + seconds, end=word.end + seconds) for word in self.words)
        return replace(self, start=self.start + seconds, end=self.end + seconds, words=words)


def spaced(text: str, parts: Sequence[str]) -> list[str]:
    """Return the parts of ``text``, each with the white space that stands before it there, as Whisper has them.

    The first part, and one that does not occur in the text, has a space before it where its script has spaces.
    """
    found: list[str] = []
    place = 0
    for part in map(str.strip, parts):
        start = text.find(part, place)
        if start < 0 or text[place:start].strip():
            found.append(f" {part}")
            continue
        found.append(text[place : start + len(part)])
        place = start + len(part)
    if found and found[0][:1].strip() and not UNSPACED.match(found[0]):
        found[0] = f" {found[0]}"
    return found
