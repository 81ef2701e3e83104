"""What goes into the engine and comes out of it: settings, requests, hypotheses, and counts of the work done."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from canter.inference.engine.alignment import Alignment


@dataclass(frozen=True)
class EngineConfig:
    """How the engine works. ``rows``, ``frames`` and ``graphs`` change no transcript."""

    rows: int | None = None
    """Rows the decoder advances together, at most (None: what suits model and device)."""
    frames: int | None = None
    """Encoder frames in a batch of the encoder, padding included, at most (one utterance may have more; None: what
    suits the device)."""
    tokens_per_frame: float | None = None
    """A row ends without an end token after this many tokens for each of its encoder frames (None: what the model's
    generation settings say, of the fastest speech that it was trained on; else 1) ..."""
    extra_tokens: int = 10
    """... and this many more (and in any case where the decoder's positions end)."""
    max_repeats: int = 3
    """Greedy search ends a row that repeats an n-gram of tokens for longer than its audio lasts, and keeps so many
    repeats; 0: no guard. No token is replaced, so the text is that without a guard, or its beginning."""
    repeat_ngram: int = 32
    """The longest n-gram that the guard against repetition looks at."""
    beams: int = 1
    """Hypotheses that are kept for each row; 1: greedy."""
    length_penalty: float | None = None
    """Exponent of the length that a beam's score is divided by; None: 1 as `transformers` for Whisper, 0 as
    NeMo for others."""
    early_stopping: bool = False
    """Ends a row's beams as soon as there are as many finished ones (Whisper's search; see BeamSearch)."""
    ctc_weight: float = 0.0
    """Weight w of CTC in joint decoding, (1 - w) log p_attention + w log p_CTC; 0: attention only. The model needs a
    CTC head, and requests have no temperature."""
    graphs: bool = True
    """On a GPU, whether decoder steps are captured as CUDA graphs."""


@dataclass(frozen=True)
class Request:
    """One utterance to decode."""

    audio: np.ndarray
    """(S,) float32 at the model's rate."""
    prompt: Sequence[int]
    """The decoder's first tokens; at least one."""
    key: Hashable = None
    """Comes back with the hypothesis."""
    temperature: float = 0.0
    """0: the best tokens; else drawn from softmax(logits / temperature)."""
    retry: "Callable[[Hypothesis], float | None] | None" = None
    """Looks at a hypothesis; a number is the temperature to decode the same audio at once more."""
    rest: "Callable[[Hypothesis, float], float | None] | None" = None
    """Looks at the hypothesis that is kept and the seconds of its audio; a number is where, in seconds, it ended early:
    the audio from there on is decoded on its own."""
    languages: tuple[int, ...] = ()
    """Tokens among which the language is detected; the likeliest replaces the token at ``language_at`` in the
    prompt."""
    language_at: int = 1
    """Place in the prompt of the language token, which follows <|startoftranscript|>."""
    stretches: tuple[tuple[float, float], ...] = ()
    """Stretches of speech, in seconds. Where the language changes from one to the next for certain, the audio is cut
    and the rest is decoded on its own."""
    nearby: np.ndarray | None = None
    """Other audio (S,) of the same recording, whose language counts too where that of this audio is not certain."""
    scored: bool = False
    """Whether log probabilities and the probability of no speech are wanted."""
    aligned: bool = False
    """Whether the times of tokens are wanted."""
    guarded: bool = True
    """End it where it runs in circles (``max_repeats``); False where ``retry`` judges repetition."""


@dataclass(frozen=True)
class Hypothesis:
    """What was decoded for one request."""

    key: Hashable
    tokens: list[int]
    """Without the prompt and the end token."""
    finished: bool
    """Whether the model ended it, not the limit on tokens."""
    ctc: list[int] | None = None
    """The CTC head's greedy outputs, collapsed, where they were asked for."""
    logprob: float = 0.0
    """Sum of natural-log probabilities, end token included; of beams and scored requests."""
    no_speech: float = 0.0
    """Probability of Whisper's no-speech token after its first token; of scored requests."""
    temperature: float = 0.0
    prompt: tuple[int, ...] = ()
    """With the language that was detected."""
    languages: tuple[float, ...] = ()
    """Probability of each of the request's languages, where the language was detected."""
    alternatives: tuple[tuple[tuple[int, ...], float], ...] = ()
    """Tokens and sums of log probabilities of all beams, best first."""
    alignment: Alignment | None = None
    rest: "Hypothesis | None" = None
    """Hypothesis of the audio from ``rest_begins`` seconds on, where this one ended before its audio did, or another
    language begins there."""
    rest_begins: float = 0.0

    @property
    def parts(self) -> "list[Hypothesis]":
        """This one and those of the rest, in order."""
        return [self, *(self.rest.parts if self.rest else ())]

    @property
    def avg_logprob(self) -> float:
        """A token, the end token counted, as Whisper counts it."""
        return self.logprob / (len(self.tokens) + 1)


@dataclass(frozen=True)
class Underway:
    """Progress of the rows that the engine has taken and not finished."""

    rows: tuple[tuple[Hashable, float], ...]
    """Key of each row and the fraction that is done: half once it is encoded, the rest in proportion to its tokens, by
    the tokens a second that finished rows had."""


@dataclass
class Counters:
    """What the engine did and where the time went; seconds are wall-clock, on a GPU the encoder's are the
    device's own, which may overlap with the decoder's."""

    utterances: int = 0
    audio_seconds: float = 0.0
    feature_seconds: float = 0.0
    encoder_seconds: float = 0.0
    decoder_seconds: float = 0.0
    seconds: float = 0.0
    """From the first request taken to the last hypothesis given, all else included."""
    tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    """Rows computed, summed over decoder steps."""
    useful_row_steps: int = 0
    """Those among them that had not ended."""
    retries: int = 0
    """Rows that were decoded once more."""
    slots: int = 0
    """Rows the decoder had room for."""

    @property
    def rtfx(self) -> float:
        """Seconds of audio for each second of work."""
        return self.audio_seconds / max(self.seconds, 1e-9)

    @property
    def useful_rows(self) -> float:
        """Share of the rows computed that were useful."""
        return self.useful_row_steps / max(self.row_steps, 1)

    @property
    def mean_rows(self) -> float:
        """Useful rows a step."""
        return self.useful_row_steps / max(self.steps, 1)
