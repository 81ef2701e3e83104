"""The decoding engine: a queue of audio in, hypotheses out as they finish.

Audio is encoded in batches filled to a budget of padded frames. Each encoded row waits until the decoder
has a free slot; there its cross-attention keys and values are projected once and its prompt is read. At
every step all live rows advance by one token. A row that ends leaves at once and the next one enters, so
the decoder works on live rows alone and no row waits for the longest of its batch.

B: rows, S: samples, T: encoder frames, V: vocabulary.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from canter.inference.repetition import RepetitionGuard
from canter.models.decoder import DecoderCache
from canter.models.model import SpeechModel


@dataclass(frozen=True)
class EngineConfig:
    """How the engine works; none of it but the limits on tokens and repeats changes a transcript."""

    rows: int = 64
    """Rows the decoder advances together, at most."""
    frames: int = 1024
    """Encoder frames in a batch of the encoder, padding included, at most (one utterance may have more)."""
    tokens_per_frame: float = 1.0
    """A row ends without an end token after this many tokens for each of its encoder frames ..."""
    extra_tokens: int = 10
    """... and this many more (and in any case where the decoder's positions end)."""
    max_repeats: int = 3
    """No n-gram of tokens may follow itself more often than this, the next best token is taken; 0: no
    guard."""
    repeat_ngram: int = 8
    """The longest n-gram that the guard against repetition looks at."""


@dataclass(frozen=True)
class Request:
    """One utterance to decode."""

    audio: np.ndarray
    """(S,) float32 at the model's rate."""
    prompt: Sequence[int]
    """The decoder's first tokens; at least one."""
    key: Hashable = None
    """Comes back with the hypothesis."""


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


@dataclass
class Counters:
    """What the engine did and where the time went; seconds are wall-clock."""

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


def encoder_batches(lengths: Sequence[float], budget: float, rows: int | None = None) -> list[list[int]]:
    """Indices of ``lengths``, longest first, cut into batches whose padded length fits ``budget`` (in the
    same unit; a single longer one stands alone) and which hold at most ``rows``."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        batch = batches[-1] if batches else None
        if batch is None or (len(batch) + 1) * lengths[batch[0]] > budget or len(batch) == rows:
            batches.append([index])
        else:
            batch.append(index)
    return batches


def ctc_greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """log_probs (B, T, V), lengths (B,) -> the best output of every frame, repeats collapsed, blanks (0)
    dropped."""
    best = log_probs.argmax(-1)
    new = torch.ones_like(best, dtype=torch.bool)
    new[:, 1:] = best[:, 1:] != best[:, :-1]
    new &= (best != 0) & (torch.arange(best.shape[1], device=best.device) < lengths[:, None])
    return [row[kept].tolist() for row, kept in zip(best, new)]


@dataclass(frozen=True)
class _Encoded:
    """A row that the encoder is done with."""

    request: Request
    states: Tensor  # (T, D), projected to the decoder's width
    ctc: list[int] | None
    limit: int  # tokens


class _Live:
    """The decoder's live rows, in the order of their slots."""

    def __init__(self, cache: DecoderCache, guard: RepetitionGuard):
        self.cache, self.guard = cache, guard
        self.rows: list[_Encoded] = []
        self.tokens: list[list[int]] = []

    def add(self, rows: list[_Encoded]) -> None:
        self.rows += rows
        self.tokens += [[] for _ in rows]
        self.guard.add(len(rows))

    def remove(self, slots: list[int]) -> None:
        """Rows leave; the last ones take their slots, as in the cache."""
        self.cache.remove(slots)
        self.guard.remove(slots)
        for slot in sorted(slots, reverse=True):
            self.rows[slot], self.tokens[slot] = self.rows[-1], self.tokens[-1]
            self.rows.pop()
            self.tokens.pop()


class Engine:
    """Decodes greedily with ``model``; a token of id ``end`` ends a row. Tokens that the model's
    ``generation`` settings suppress are never chosen."""

    def __init__(
        self, model: SpeechModel, end: int, config: EngineConfig | None = None, *, ctc: bool = False
    ):
        """``ctc`` also gives the CTC head's greedy outputs, if the model has one."""
        self.model, self.end, self.config = model, end, config or EngineConfig()
        self.ctc = ctc and model.ctc is not None
        self.counters = Counters(slots=self.config.rows)
        self.device = next(model.parameters()).device
        never, at_first = (
            torch.tensor(model.generation.get(name) or [], dtype=torch.long, device=self.device)
            for name in ("suppress_tokens", "begin_suppress_tokens")
        )
        self.never, self.never_first = never, torch.cat([never, at_first])

    def decode(self, requests: Iterable[Request]) -> list[Hypothesis]:
        """Hypotheses in the order of ``requests``, which are sorted and batched here."""
        requests = list(requests)
        numbered = [Request(item.audio, item.prompt, number) for number, item in enumerate(requests)]
        rate = self.model.config.features.sample_rate
        frames = [self.model.encoder_frames(len(item.audio) / rate) for item in numbered]
        batches = encoder_batches(frames, self.config.frames)
        found = {result.key: result for result in self.run([numbered[i] for i in batch] for batch in batches)}
        return [
            Hypothesis(item.key, found[number].tokens, found[number].finished, found[number].ctc)
            for number, item in enumerate(requests)
        ]

    def run(self, batches: Iterable[list[Request]]) -> Iterator[Hypothesis]:
        """Encodes one batch after another, as rows become free, and gives hypotheses as they finish.

        Batches should be sorted by length, longest first: neighbours share slots, and buffers are made once.
        """
        begun = time.perf_counter()
        training = self.model.training
        self.model.eval()
        source, waiting = filter(None, batches), deque[_Encoded]()
        live = _Live(
            self.model.decoder.cache(), RepetitionGuard(self.config.repeat_ngram, self.config.max_repeats)
        )
        try:
            while True:
                while len(live.rows) + len(waiting) < self.config.rows and (batch := next(source, None)):
                    waiting += self._encode(batch)
                if not live.rows and not waiting:
                    return
                finished = self._advance(live, waiting)
                self.counters.seconds += time.perf_counter() - begun
                yield from finished
                begun = time.perf_counter()
        finally:
            self.model.train(training)

    @torch.inference_mode()
    def _encode(self, batch: list[Request]) -> list[_Encoded]:
        """Features, encoder and projection to the decoder's width."""
        with self._timed("feature_seconds"):
            shortest = self.model.config.features.hop  # of which comes one frame
            lengths = torch.tensor([max(shortest, len(item.audio)) for item in batch])
            audio = torch.zeros(len(batch), int(lengths.max()))
            for row, item in zip(audio, batch):
                row[: len(item.audio)] = torch.from_numpy(item.audio)
            features, frames = self.model.features(audio.to(self.device), lengths.to(self.device))
        with self._timed("encoder_seconds"):
            encoded, encoded_lengths = self.model.encode(features, frames)
            ctc: Sequence[list[int] | None] = [None] * len(batch)
            if self.ctc:
                ctc = ctc_greedy(*self.model.ctc_log_probs(encoded, encoded_lengths))
            encoded = self.model.projection(encoded)
            sizes = encoded_lengths.tolist()
        self.counters.utterances += len(batch)
        self.counters.audio_seconds += int(lengths.sum()) / self.model.config.features.sample_rate
        return [
            _Encoded(item, states[:size], outputs, self._limit(item, size))
            for item, states, size, outputs in zip(batch, encoded, sizes, ctc)
        ]

    def _limit(self, request: Request, frames: int) -> int:
        """Tokens that a row may have after its prompt."""
        positions = self.model.config.decoder.positions
        if not 0 < len(request.prompt) < positions:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens: the decoder has {positions} positions"
            )
        wanted = math.ceil(self.config.tokens_per_frame * frames) + self.config.extra_tokens
        return min(positions - len(request.prompt), wanted)

    @torch.inference_mode()
    def _advance(self, live: _Live, waiting: deque[_Encoded]) -> list[Hypothesis]:
        """One decoder step: waiting rows enter if enough slots are free, else live rows get a token each."""
        with self._timed("decoder_seconds"):
            new, first = [], 0
            free = min(self.config.rows - len(live.rows), len(waiting))
            # Reading prompts costs about a step, so a few rows enter together; meanwhile
            # their slots cost nothing.
            if free and (not live.rows or free >= min(len(waiting), max(1, self.config.rows // 8))):
                new = [waiting.popleft() for _ in range(free)]
                first = len(live.rows)
                logits = self.model.decoder.admit(
                    [list(row.request.prompt) for row in new],
                    pad_sequence([row.states for row in new], batch_first=True),
                    [len(row.states) for row in new],
                    live.cache,
                )
                live.add(new)
            else:
                last = torch.tensor([[tokens[-1]] for tokens in live.tokens], device=self.device)
                logits = self.model.decoder.step(last, live.cache)[:, 0]
                self.counters.steps += 1
                self.counters.row_steps += len(logits)
                self.counters.useful_row_steps += len(live.rows)
            logits[:, self.never_first if new else self.never] = -math.inf
            chosen = live.guard.choose(logits, first)
            self.counters.tokens += len(chosen)
            ended = []
            for slot, token in enumerate(chosen, first):
                tokens = live.tokens[slot]
                if token == self.end:
                    ended.append((slot, True))
                    continue
                tokens.append(token)
                if len(tokens) >= live.rows[slot].limit:
                    ended.append((slot, False))
            finished = [
                Hypothesis(live.rows[slot].request.key, live.tokens[slot], by_end, live.rows[slot].ctc)
                for slot, by_end in ended
            ]
            if ended:
                live.remove([slot for slot, _ in ended])
        return finished

    @contextlib.contextmanager
    def _timed(self, counter: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        setattr(self.counters, counter, getattr(self.counters, counter) + time.perf_counter() - begun)
