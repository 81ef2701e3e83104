"""Segments and words of a transcript, with their times."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
"""Characters of scripts without spaces between words."""


@dataclass(frozen=True)
class Word:
    """Word with its times, in seconds from the start of the utterance's audio."""

    start: float
    end: float
    text: str
    """Text with its punctuation, without surrounding space."""
    probability: float
    """Mean probability of its tokens."""
    probabilities: tuple[float, ...] = ()
    """Probability of each of its tokens, given those before; empty for words that the model timed itself."""

    @property
    def confidence(self) -> float | None:
        """Confidence that the word is right, the least probability of its tokens; None without these."""
        return min(self.probabilities, default=None)


@dataclass(frozen=True)
class TokenScore:
    """Token of a transcript; tokens that share a character are one."""

    text: str
    """Text with the space before it."""
    logprob: float
    """Natural-log probability, given the text before."""


@dataclass(frozen=True)
class Alternatives:
    """The most probable texts of one chunk of the audio, by beam search."""

    start: float
    """Seconds from the start of the utterance's audio."""
    end: float
    hypotheses: tuple[tuple[str, float], ...]
    """(text, sum of natural-log probabilities of its tokens), in the order of the search, best first."""
    channel: int | None = None
    """Channel of the recording, from 0, where every channel is transcribed by itself."""


@dataclass(frozen=True)
class Segment:
    """Segment of a transcript, as divided by the model's timestamps or by the chunks of long audio."""

    start: float
    """Seconds from the start of the utterance's audio."""
    end: float
    text: str
    tokens: tuple[int, ...] = ()
    """Tokens, with timestamps where the model wrote them."""
    words: tuple[Word, ...] = ()
    """Words; empty unless their times were asked for."""
    avg_logprob: float = 0.0
    """Mean natural-log probability of the tokens of its window, end token included."""
    temperature: float = 0.0
    """Temperature of the attempt that was kept; 0 is greedy or beam search."""
    no_speech_prob: float = 0.0
    """Probability of Whisper's no-speech token at the start of its window; 0 for models without one."""
    token_scores: tuple[TokenScore, ...] = ()
    """Tokens of the text; empty unless log probabilities were asked for."""
    channel: int | None = None
    """Channel of the recording, from 0, where every channel is transcribed by itself."""

    def shifted(self, seconds: float) -> "Segment":
        """Return the segment with its times moved by ``seconds``."""
        words = tuple(replace(word, start=word.start + seconds, end=word.end + seconds) for word in self.words)
        return replace(self, start=self.start + seconds, end=self.end + seconds, words=words)


def spaced(text: str, parts: Sequence[str]) -> list[str]:
    """Return the parts of ``text``, each with the white space before it in the text, as in Whisper's files.

    The first part, and one that does not occur in the text, gets a space where its script has spaces.
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
