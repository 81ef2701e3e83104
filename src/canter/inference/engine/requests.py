"""Input and output of the engine: settings, requests, hypotheses, progress and counters."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np

from canter.inference.engine.alignment import Alignment
from canter.inference.engine.hotwords import HotWords

DraftSource = Literal["auto", "ctc", "off"]


@dataclass(frozen=True)
class EngineConfig:
    """Settings of the engine. ``rows``, ``frames``, ``graphs`` and drafts do not change any transcript."""

    rows: int | None = None
    """Maximum number of rows that the decoder advances together (None: chosen by model and device)."""
    frames: int | None = None
    """Maximum number of encoder frames in a batch of the encoder, padding included; a single longer utterance still
    makes a batch (None: chosen by device)."""
    tokens_per_frame: float | None = None
    """Maximum number of tokens per encoder frame, plus ``extra_tokens``; a row ends there without an end token (None:
    the rate in the model's generation settings, else 1)."""
    extra_tokens: int = 10
    """Number of tokens that every row may have in addition to ``tokens_per_frame``."""
    max_repeats: int = 3
    """Number of repeats to keep when greedy search repeats an n-gram of tokens for longer than the audio lasts; 0 turns
    the guard off. No token is replaced: the text is that of unguarded decoding, or its beginning."""
    repeat_ngram: int = 32
    """Maximum length of the n-grams that the guard against repetition checks."""
    beams: int = 1
    """Beam size; 1 is greedy search."""
    length_penalty: float | None = None
    """Exponent of the length by which the score of a beam is divided (None: 1 for models of Hugging Face, as in
    `transformers`, else 0, as in NeMo)."""
    early_stopping: bool = False
    """End a row as soon as it has as many finished beams as the beam size (Whisper's search; see BeamSearch)."""
    ctc_weight: float = 0.0
    """Weight w of CTC in joint decoding, (1 - w) log p_attention + w log p_CTC; 0 is attention only. It needs a model
    with a CTC head and requests without a temperature."""
    suppress_tokens: tuple[int, ...] = (-1,)
    """Ids of tokens that are never chosen; -1 stands for those in the model's generation settings. Special tokens among
    these are suppressed in any case."""
    graphs: bool = True
    """Capture decoder steps as CUDA graphs on a GPU."""
    draft: DraftSource = "auto"
    """Source of drafts, which let greedy search check several tokens in a step and change no text: "ctc" is the CTC
    head, "auto" the same where it pays (see `ctc_drafts`), and "off" is none."""
    draft_width: int | None = None
    """Number of tokens of a row in a step, its last one and drafted ones (None: chosen from measured step times)."""

    def most_tokens(self, frames: int, generation: Mapping[str, object]) -> int:
        """Return the maximum number of tokens of audio of ``frames`` encoder frames, by the rate here, else the one in
        a model's ``generation`` settings."""
        rate = generation.get("tokens_per_frame", 1.0) if self.tokens_per_frame is None else self.tokens_per_frame
        return math.ceil(cast(float, rate) * frames) + self.extra_tokens


class DecodingPolicy(Protocol):
    """Rule that decides, once a hypothesis has ended, whether the engine decodes its audio again or decodes on."""

    def retry(self, hypothesis: "Hypothesis", /) -> float | None:
        """Return the temperature at which to decode the same audio again; None keeps the hypothesis."""
        ...

    def continue_at(self, hypothesis: "Hypothesis", seconds: float, /) -> float | None:
        """Return the time in seconds from which to decode the audio again, as a separate request; None where the
        hypothesis covers all ``seconds`` of it."""
        ...


@dataclass(frozen=True)
class Request:
    """One chunk of audio to decode."""

    audio: np.ndarray
    """(S,) float32 at the model's sample rate."""
    prompt: Sequence[int]
    """The decoder's first tokens; at least one."""
    key: Hashable = None
    """Identifier that the hypothesis is returned with."""
    temperature: float = 0.0
    """0: the most probable tokens; else tokens are drawn from softmax(logits / temperature)."""
    policy: DecodingPolicy | None = None
    """Rule for decoding again and decoding on; None keeps every hypothesis as it is."""
    languages: tuple[int, ...] = ()
    """Tokens of the languages among which to detect the language; the most probable one replaces the token at
    ``language_at`` in the prompt. Empty: no detection."""
    language_at: int = 1
    """Position of the language token in the prompt, after <|startoftranscript|>."""
    speech_spans: tuple[tuple[float, float], ...] = ()
    """Spans of speech, in seconds. Where the language changes between two of them with certainty, the audio is divided
    there, and each part is decoded in its own language."""
    nearby_audio: np.ndarray | None = None
    """Other audio (S,) of the same recording, which counts in language detection where this chunk is uncertain."""
    scored: bool = False
    """Compute log probabilities and the probability of no speech."""
    hotwords: HotWords | None = None
    """Phrases to prefer; without effect at a temperature."""
    adapter: int = 0
    """Number of its adapter in the model's bank; 0: none."""
    aligned: bool = False
    """Compute the times of tokens."""
    guarded: bool = True
    """Apply the guard against repetition (``max_repeats``); False where ``policy`` detects repetition."""
    suppress_tokens: tuple[int, ...] | None = None
    """Ids of tokens that are never chosen, in place of the engine's (see `EngineConfig`); None: those."""


@dataclass(frozen=True)
class Alternative:
    """One of the hypotheses of a beam search."""

    tokens: tuple[int, ...]
    """Tokens without the prompt and the end token."""
    logprob: float
    """Sum of natural-log probabilities, end token included."""
    finished: bool
    """True where the model wrote an end token."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each token, and of the end token; in joint decoding, of CTC and attention."""


@dataclass(frozen=True)
class Hypothesis:
    """The decoder's output for one request."""

    key: Hashable
    tokens: list[int]
    """Tokens without the prompt and the end token."""
    finished: bool
    """True where the model wrote an end token, False where the limit on tokens ended the row."""
    ctc: list[int] | None = None
    """Greedy outputs of the CTC head, collapsed, if they were asked for."""
    logprob: float = 0.0
    """Sum of natural-log probabilities, end token included, of beams and scored requests."""
    logprobs: tuple[float, ...] = ()
    """Natural-log probability of each of ``tokens``, of beams and scored requests."""
    no_speech: float = 0.0
    """Probability of Whisper's no-speech token after its first token, of scored requests."""
    temperature: float = 0.0
    """Temperature of the attempt that was kept."""
    prompt: tuple[int, ...] = ()
    """Prompt with the detected language."""
    languages: tuple[float, ...] = ()
    """Probability of each of the request's languages, if the language was detected."""
    alternatives: tuple[Alternative, ...] = ()
    """All beams, best first."""
    alignment: Alignment | None = None
    continuation: "Hypothesis | None" = None
    """Hypothesis of the audio from ``continues_at`` seconds on, where this one ended before its audio did, or where
    another language begins."""
    continues_at: float = 0.0
    error: str | None = None
    """Reason why there are no tokens, where another library's model fails on this audio."""

    @property
    def parts(self) -> "list[Hypothesis]":
        """Hypothesis and its continuations, in order."""
        return [self, *(self.continuation.parts if self.continuation else ())]

    @property
    def avg_logprob(self) -> float:
        """Mean log probability of a token, with the end token counted, as in Whisper."""
        return self.logprob / (len(self.tokens) + 1)


@dataclass(frozen=True)
class Underway:
    """Progress of the rows that the engine has taken but not finished."""

    rows: tuple[tuple[Hashable, float], ...]
    """Key and finished fraction of each row: half once it is encoded, then in proportion to its tokens, by the tokens
    per second of finished rows."""


@dataclass
class Counters:
    """Work of the engine and wall-clock seconds of its stages. On a GPU the encoder's seconds are measured on the
    device and may overlap with the decoder's."""

    utterances: int = 0
    audio_seconds: float = 0.0
    feature_seconds: float = 0.0
    encoder_seconds: float = 0.0
    decoder_seconds: float = 0.0
    seconds: float = 0.0
    """Total seconds, from the first request to the last hypothesis."""
    tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    """Number of rows computed, summed over decoder steps."""
    useful_row_steps: int = 0
    """Number of rows among them that had not ended."""
    retries: int = 0
    """Number of rows that were decoded again."""
    drafted: int = 0
    """Number of drafted tokens that steps have checked."""
    accepted: int = 0
    """Number of these that are text."""
    draft_seconds: float = 0.0
    """Seconds of the model that writes drafts."""
    slots: int = 0
    """Maximum number of rows in the decoder."""

    @property
    def rtfx(self) -> float:
        """Seconds of audio per second of work."""
        return self.audio_seconds / max(self.seconds, 1e-9)

    @property
    def useful_rows(self) -> float:
        """Useful fraction of the rows computed."""
        return self.useful_row_steps / max(self.row_steps, 1)

    @property
    def acceptance(self) -> float:
        """Accepted fraction of the drafted tokens."""
        return self.accepted / max(self.drafted, 1)

    @property
    def steps_per_token(self) -> float:
        """Mean number of decoder steps of a row for each of its tokens."""
        return self.useful_row_steps / max(self.tokens, 1)

    @property
    def mean_rows(self) -> float:
        """Mean number of useful rows in a step."""
        return self.useful_row_steps / max(self.steps, 1)


def encoder_batches(lengths: Sequence[float], budget: float, rows: int | None = None) -> list[list[int]]:
    """Return batches of indices of ``lengths``, longest first.

    A batch has at most ``rows`` rows, and its padded length is at most ``budget``, in the unit of ``lengths``; a single
    longer item makes a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        batch = batches[-1] if batches else None
        if batch is None or (len(batch) + 1) * lengths[batch[0]] > budget or len(batch) == rows:
            batches.append([index])
        else:
            batch.append(index)
    return batches
