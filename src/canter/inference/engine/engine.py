"""The decoding engine: a queue of audio in, hypotheses out as they finish.

Audio is encoded in batches filled to a budget of padded frames. Each encoded row waits until the decoder has a free
slot; then its cross-attention keys and values are projected once, and the decoder reads its prompt. Every step
advances all live rows by one token, or by several where drafts say what they may be. A row that ends leaves at once and
the next one enters, so the decoder computes live rows only, and no row waits for the longest of its batch.

B: rows, N: beams, S: samples, T: encoder frames, V: vocabulary.
"""

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from canter.errors import ConfigError
from canter.inference.engine import language
from canter.inference.engine.alignment import align
from canter.inference.engine.ctc import Joint, PrefixScorer, Spelling, ctc_greedy, spelling_of
from canter.inference.engine.drafts import CtcDrafts, Draft, Drafter, StepWidths, ctc_drafts
from canter.inference.engine.forced import (
    CtcPath,
    ForcedText,
    Span,
    attention_spans,
    ctc_spans,
    ctc_viterbi,
    forced_logprobs,
    symbols_of,
)
from canter.inference.engine.graphs import FixedSteps
from canter.inference.engine.requests import Counters, EngineConfig, Hypothesis, Request, Underway, encoder_batches
from canter.inference.engine.search import BeamSearch, Greedy, RepetitionGuard, Row, Rules, Search
from canter.models.cache import DecoderCache, swap_out
from canter.models.model import SpeechModel
from canter.models.protocol import AnyModel
from canter.runtime import on_stream, upload

SPEECH_RATE = 12.5  # tokens per second of the fastest speech, in the usual tokenizers
TYPICAL_RATE = 4.0  # tokens per second of speech, until finished rows give a better estimate
EVENT_SECONDS = 0.2  # between two reports of progress
CPU_CACHE = 192 * 2**20  # bytes of cross-attention keys and values; more rows are hardly faster on a CPU
MIN_ROWS, MAX_ROWS, MAX_ROWS_GPU = 8, 64, 128


def default_window(model: AnyModel) -> float:
    """Return the longest chunk in seconds to decode at once: the model's training length where known, else 40 s, and at
    most what it has positions for."""
    return min(cast(float, model.generation.get("window_seconds", 40.0)), model.longest_seconds)


def default_frames(model: AnyModel, device: torch.device) -> int:
    """Return the encoder frames in a batch; larger batches are memory-bound on a CPU."""
    frames = 16384 if device.type == "cuda" else 1024
    return frames // cast(SpeechModel, model).encoder.inner_frames if "cached_decoding" in model.supports else frames


def default_rows(model: AnyModel, device: torch.device, joint: bool = False) -> int:
    """Return the number of rows that decode together; in ``joint`` decoding each keeps its CTC scores too.

    More rows read the decoder's weights less often, but each adds the keys and values of its window, which every step
    reads. On a CPU, Whisper decodes no faster with 64 rows than with 24, and needs three times the memory.
    """
    on_gpu = device.type == "cuda"
    most = MAX_ROWS_GPU if on_gpu else MAX_ROWS
    if "cached_decoding" not in model.supports:
        return most
    room = torch.cuda.get_device_properties(device).total_memory // 4 if on_gpu else CPU_CACHE
    ours = cast(SpeechModel, model)
    shape, size = ours.decoder.config, ours.decoder.embedding.weight.element_size()
    row = 2 * shape.layers * shape.width * size
    if joint:
        row += 4 * ours.config.ctc_vocabulary * ours.config.ctc_upsampling
    row *= model.encoder_frames(default_window(model))
    return max(MIN_ROWS, min(most, room // row))


def suppressed_tokens(model: AnyModel, end: int, asked: Sequence[int]) -> list[int]:
    """Return the ids of tokens that a model never chooses, from those that a user asks for (see `EngineConfig`).

    Raises ConfigError for ids that are none of a token, and for the end token.
    """
    usual = cast("list[int]", model.generation.get("suppress_tokens") or [])
    for token in asked:
        if token != -1 and not 0 <= token < model.vocabulary:
            raise ConfigError(f"suppress_tokens: {token} is no token; the model's are 0 to {model.vocabulary - 1:,}")
        if token == end and token >= 0:  # an engine may have no end token, -1
            raise ConfigError(f"suppress_tokens: {token} ends a transcript and cannot be suppressed")
    tokenizer = model.tokenizer
    special = [] if tokenizer is None else [one for one in usual if not tokenizer.decode([one])]
    given = [token for token in asked if token != -1]
    return sorted({*given, *special, *(usual if -1 in asked else ())})


class Timer:
    """Stopwatch of the engine's stages. On a GPU it takes the time between two CUDA events, and does not wait for the
    device before `collect`."""

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.spans: deque[tuple[Counters, str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def timed(self, counters: Counters, name: str) -> Iterator[None]:
        """Add the seconds in this context to the counter ``name``; on a GPU, `collect` adds them."""
        if self.gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.spans.append((counters, name, start, end))
            return
        begun = time.perf_counter()
        yield
        setattr(counters, name, getattr(counters, name) + time.perf_counter() - begun)

    def collect(self, wait: bool = False) -> None:
        """Add the seconds of the work that the device has finished."""
        while self.spans and (wait or self.spans[0][-1].query()):
            counters, name, start, end = self.spans.popleft()
            end.synchronize()
            setattr(counters, name, getattr(counters, name) + start.elapsed_time(end) / 1000)


@dataclass(frozen=True)
class _Encoding:
    """Encoder output of one row; on a GPU it is complete once ``ready`` has happened."""

    states: Tensor  # (T, D), projected to the decoder's width
    ctc: list[int] | None
    limit: int  # of tokens
    ready: "torch.cuda.Event | None" = None
    ctc_log_probs: Tensor | None = None  # (T x upsampling, C), for joint decoding
    draft: list[int] | None = None  # by another model


@dataclass(frozen=True)
class _Encoded:
    """A request with its encoder output, waiting for a slot or decoding."""

    request: Request
    encoding: _Encoding
    prompt: list[int]
    temperature: float = 0.0
    attempt: int = 0
    no_speech: float = 0.0
    earlier: tuple[tuple[Hypothesis, float], ...] = ()
    """Hypotheses of the audio before this, each with the seconds after which the next part begins."""
    detected: bool = False
    """True once the prompt has the detected language."""
    languages: tuple[float, ...] = ()
    """Probabilities of the request's languages."""
    until: float | None = None
    """Seconds of the request's audio in this row, where another language begins there; None: all of it."""

    def seconds(self, rate: int) -> float:
        return len(self.request.audio) / rate if self.until is None else self.until


class _Live:
    """The decoder's live rows, in the order of their slots."""

    def __init__(self, cache: DecoderCache, search: Search):
        self.cache, self.search = cache, search
        self.rows: list[_Encoded] = []
        self.drawn: list[Row] = []  # the same rows for the search

    def add(self, rows: list[_Encoded], drawn: list[Row]) -> None:
        self.rows += rows
        self.drawn += drawn
        self.search.add(drawn)

    def remove(self, slots: list[int]) -> None:
        """Remove rows; the last ones take their slots, as in the cache."""
        self.cache.remove(slots)
        self.search.remove(slots)
        swap_out(self.rows, slots)
        swap_out(self.drawn, slots)


class Engine:
    """Decoder of audio by one model. The token ``end`` ends a row; tokens that the model's generation settings suppress
    are never chosen."""

    aligns = True
    """True if it can compute the times of tokens."""

    def __init__(
        self,
        model: SpeechModel,
        end: int,
        config: EngineConfig | None = None,
        *,
        ctc: bool = False,
        drafter: Drafter | None = None,
    ):
        """Make an engine.

        ctc: add the greedy outputs of the CTC head, if the model has one. drafter: engine of a smaller model with the
        same tokenizer, whose transcripts are drafts in greedy search.

        Raises ConfigError where the configuration asks for joint decoding or drafts and the model does not support
        them.
        """
        self.model, self.end, self.config = model, end, config or EngineConfig()
        weight = self.config.ctc_weight
        if not 0 <= weight <= 1:
            raise ConfigError(f"--ctc-weight {weight:g} must lie between 0 (attention only) and 1 (CTC only)")
        if self.config.beams > max(1, model.vocabulary // 2):
            raise ConfigError(
                f"--beam-size {self.config.beams} is more than half of the model's {model.vocabulary:,} tokens"
            )
        self.spelling = spelling_of(model) if weight else None
        self.drafter = drafter
        self.drafts = self._drafts()
        self.widths = StepWidths(fixed=self.config.draft_width)
        self.ctc = ctc and model.ctc is not None
        self.device = next(model.parameters()).device
        self.rows = self.config.rows or default_rows(model, self.device, joint=weight > 0)
        self.frames = self.config.frames or default_frames(model, self.device)
        self.counters = Counters(slots=self.rows)
        self.gpu = self.device.type == "cuda"
        never = suppressed_tokens(model, end, self.config.suppress_tokens)
        self.rules = Rules({**model.generation, "suppress_tokens": never}, end, self.device)
        # The encoder's kernels fill the device; in its stream, each short one of the decoder would queue behind them.
        self.side = torch.cuda.Stream(self.device) if self.gpu else None
        self.front = torch.cuda.Stream(self.device, priority=-1) if self.gpu else None
        self.timer = Timer(self.gpu)
        self._done_tokens, self._done_seconds = 10 * TYPICAL_RATE, 10.0  # of finished rows

    def _drafts(self) -> CtcDrafts | None:
        """Return the reading of drafts by the CTC head, if they are asked for or pay."""
        config, asked = self.config, self.config.draft == "ctc"
        if config.beams > 1 or config.ctc_weight:
            if asked or self.drafter:
                raise ConfigError("--draft: drafts are for greedy search by attention; leave out the beam size and CTC")
            return None
        if self.drafter or config.draft == "off" or "cached_decoding" not in self.model.supports:
            return None
        return ctc_drafts(self.model, asked)

    @property
    def drafting(self) -> bool:
        """True if rows have drafts."""
        return self.drafter is not None or self.drafts is not None

    def decode(self, requests: Iterable[Request]) -> list[Hypothesis]:
        """Return the hypotheses of ``requests``, in their order; they are batched by length."""
        requests = list(requests)
        numbered = [replace(item, key=number) for number, item in enumerate(requests)]
        rate = self.model.sample_rate
        frames = [self.model.encoder_frames(len(item.audio) / rate) for item in numbered]
        batches = encoder_batches(frames, self.frames)
        found = {result.key: result for result in self.run([numbered[i] for i in batch] for batch in batches)}
        return [replace(found[number], key=item.key) for number, item in enumerate(requests)]

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Context manager in which the model is in evaluation mode; the decoder's stream begins after the current
        one, and at the end all stages are timed."""
        training = self.model.training
        self.model.eval()
        if self.front:
            self.front.wait_stream(torch.cuda.current_stream(self.device))
        try:
            yield
        finally:
            self.model.train(training)
            self.timer.collect(wait=True)

    @torch.inference_mode()
    def detect(self, batches: Iterable[list[Request]]) -> Iterator[Hypothesis]:
        """Yield hypotheses with the probabilities of the requests' languages and without tokens: each takes the encoder
        and one step of the decoder."""
        with self._running():
            for batch in filter(None, batches):
                begun = time.perf_counter()
                rows = self._encode(batch)
                with on_stream(self.front):
                    self._await(rows)
                    found = self._detect([(row, row.encoding.states) for row in rows])
                self.counters.utterances += len(batch)
                self.counters.audio_seconds += sum(len(one.audio) for one in batch) / self.model.sample_rate
                self.counters.seconds += time.perf_counter() - begun
                for row, probabilities in zip(rows, found):
                    yield Hypothesis(row.request.key, [], True, languages=tuple(probabilities))

    def run(
        self, batches: Iterable[list[Request]], cancelled: Callable[[Hashable], bool] | None = None
    ) -> Iterator[Hypothesis]:
        """Yield hypotheses as they finish: `events` without the progress reports."""
        with contextlib.closing(self.events(batches, cancelled)) as events:
            for event in events:
                if isinstance(event, Hypothesis):
                    yield event

    def events(
        self, batches: Iterable[list[Request]], cancelled: Callable[[Hashable], bool] | None = None
    ) -> Generator[Hypothesis | Underway]:
        """Yield hypotheses as they finish, and a few times per second the progress of the other rows.

        batches: requests in batches for the encoder, best sorted by length, longest first. The next batch is taken
            whenever there is room. An empty batch means that there is none yet: live rows advance, and without live
            rows the next batch is taken at once, so the iterator should block then.
        cancelled: called with the key of every row before every step; a row for which it returns True leaves without a
            hypothesis.
        """
        begun = time.perf_counter()
        source, waiting, more = iter(batches), deque[_Encoded](), True
        search = self._search()
        live = _Live(self.model.decoder.cache(search.beams, self.rows), search)
        steps = self._fixed_steps()
        # On a GPU the next batch is encoded while the decoder steps.
        enough = self.rows + (self.rows + 1) // 2 if self.gpu else self.rows
        reported = begun
        with self._running():
            while True:
                while more and len(live.rows) + len(waiting) < enough:
                    batch = next(source, None)
                    more = batch is not None
                    if not batch:
                        break
                    waiting += self._encode(batch, draft=True)
                    self.counters.utterances += len(batch)
                    samples = sum(len(item.audio) for item in batch)
                    self.counters.audio_seconds += samples / self.model.sample_rate
                    if (now := time.perf_counter()) - reported >= EVENT_SECONDS:
                        reported = now
                        self.counters.seconds += now - begun
                        yield self._underway(live, waiting)
                        begun = time.perf_counter()
                if cancelled:
                    with on_stream(self.front):
                        self._drop(live, waiting, cancelled)
                if not live.rows and not waiting:
                    if not more:
                        return
                    continue
                with on_stream(self.front):
                    finished = self._advance(live, waiting, steps)
                now = time.perf_counter()
                self.counters.seconds += now - begun
                yield from finished
                if now - reported >= EVENT_SECONDS:
                    reported = now
                    yield self._underway(live, waiting)
                begun = time.perf_counter()

    @torch.inference_mode()
    def force(
        self, requests: Sequence[Request], texts: Sequence[Sequence[int]], spelling: Spelling | None = None
    ) -> list[ForcedText]:
        """Return the probabilities of given ``texts``, token ids without prompt and end token, one for each request.

        Requests that are ``aligned`` get the times of the tokens too: from the CTC head, whose ``spelling`` is given,
        or without one, and where a text has no CTC path because it is too long for its audio, from cross-attention.
        The results do not depend on the batch.

        Raises ValueError for a text that does not fit into the decoder's positions.
        """
        most = self.model.config.decoder.positions
        for request, text in zip(requests, texts, strict=True):
            if len(request.prompt) + len(text) + 1 > most:
                raise ValueError(f"a prompt and text of {len(request.prompt) + len(text)} tokens: at most {most - 1}")
        rate = self.model.sample_rate
        frames = [self.model.encoder_frames(len(request.audio) / rate) for request in requests]
        found: dict[int, ForcedText] = {}
        with self._running():
            for batch in encoder_batches(frames, self.frames, self.rows):
                rows = self._encode([requests[index] for index in batch], with_ctc=spelling is not None)
                with on_stream(self.front):
                    self._await(rows)
                    forced = self._forced(self._with_languages(rows), [texts[index] for index in batch], spelling)
                    found.update(zip(batch, forced))
        return [found[index] for index in range(len(requests))]

    def _forced(
        self, rows: list[_Encoded], texts: Sequence[Sequence[int]], spelling: Spelling | None
    ) -> Iterator[ForcedText]:
        model, states = self.model, [row.encoding.states for row in rows]
        logprobs = forced_logprobs(model, states, [row.prompt for row in rows], texts, self.end)
        paths: Sequence[CtcPath | None] = [None] * len(rows)
        symbols = [symbols_of(text, spelling) for text in texts] if spelling else []
        if spelling:
            scores = [row.encoding.ctc_log_probs for row in rows if row.encoding.ctc_log_probs is not None]
            padded = pad_sequence(scores, batch_first=True)
            paths = ctc_viterbi(padded, [len(one) for one in scores], [one for one, _ in symbols], spelling.blank)
        for number, (row, text, path) in enumerate(zip(rows, texts, paths)):
            prompt, spans = tuple(row.prompt), tuple[Span | None, ...]()
            if row.request.aligned and spelling and path:
                seconds = model.frame_seconds / model.config.ctc_upsampling
                spans = ctc_spans(path, *symbols[number], len(text), spelling, seconds)
            elif row.request.aligned:
                spans = attention_spans(model, states[number], prompt, text, self.end, len(row.request.audio))
            yield ForcedText(prompt, tuple(logprobs[number]), spans, path.logprob if path else None)

    def _underway(self, live: _Live, waiting: Iterable[_Encoded]) -> Underway:
        rate, pace = self.model.sample_rate, self._done_tokens / self._done_seconds

        def fraction(row: _Encoded, tokens: int) -> float:
            seconds = len(row.request.audio) / rate
            begins = sum(before for _, before in row.earlier)
            here = seconds * (0.5 + 0.5 * min(0.95, tokens / max(1.0, pace * seconds)))
            return (begins + here) / max(begins + seconds, 1e-9)

        rows = [(row, len(drawn.tokens)) for row, drawn in zip(live.rows, live.drawn)]
        rows += [(row, 0) for row in waiting]
        return Underway(tuple((row.request.key, fraction(row, tokens)) for row, tokens in rows))

    def _fixed_steps(self) -> FixedSteps | None:
        return FixedSteps(self.model.decoder) if self.gpu and self.config.graphs else None

    def _search(self) -> Search:
        config, joint = self.config, None
        if self.spelling:
            joint = Joint(PrefixScorer(self.spelling, self.end, config.beams, self.device), config.ctc_weight)
        if config.beams == 1:
            guard = RepetitionGuard(config.repeat_ngram, config.max_repeats)
            return Greedy(self.rules, guard, self.model.config.decoder.pad, joint)
        whisper = self.rules.no_timestamps is not None
        style = self.model.generation.get("beam_search") or ("huggingface" if whisper else "nemo")
        penalty = config.length_penalty
        return BeamSearch(
            self.rules,
            config.beams,
            (1.0 if style == "huggingface" else 0.0) if penalty is None else penalty,
            config.early_stopping,
            style,
            pad=self.model.config.decoder.pad,
            joint=joint,
        )

    @torch.inference_mode()
    def _encode(self, batch: list[Request], with_ctc: bool = False, draft: bool = False) -> list[_Encoded]:
        """Compute features, encoder and the projection to the decoder's width, on a GPU in a separate stream.

        with_ctc: keep the CTC head's log probabilities, as joint decoding does. draft: let another model write drafts.
        """
        model, with_ctc = self.model, with_ctc or self.spelling is not None
        shortest = model.config.features.hop  # samples of one frame
        lengths = [max(shortest, len(item.audio)) for item in batch]
        ready = None
        with on_stream(self.side):
            with self.timer.timed(self.counters, "feature_seconds"):
                audio = torch.empty(len(batch), max(lengths), pin_memory=self.gpu)
                for row, item in zip(audio, batch):
                    row[: len(item.audio)] = torch.from_numpy(item.audio)
                    row[len(item.audio) :] = 0
                features, frames = model.features(
                    audio.to(self.device, non_blocking=True), upload(lengths, self.device)
                )
            with self.timer.timed(self.counters, "encoder_seconds"):
                encoded, encoded_lengths = model.encode(features, frames, adapters=[item.adapter for item in batch])
                ctc: Sequence[list[int] | None] = [None] * len(batch)
                ctc_log_probs: Tensor | None = None
                drafted = self.drafts is not None and self.widths.active
                if self.ctc or with_ctc or drafted:
                    ctc_log_probs, ctc_lengths = model.ctc_log_probs(encoded, encoded_lengths)
                    if self.ctc or drafted:
                        ctc = ctc_greedy(ctc_log_probs, ctc_lengths)
                encoded = model.projection(encoded)
                if self.gpu:  # computed here, to avoid waiting for the device
                    sizes = [int(model.encoder.frames(model.features.frames(size))) for size in lengths]
                else:
                    sizes = encoded_lengths.tolist()
            if self.side:
                ready = torch.cuda.Event()
                ready.record(self.side)
        kept: Sequence[Tensor | None] = [None] * len(batch)
        if with_ctc and ctc_log_probs is not None:
            rate = model.config.ctc_upsampling
            kept = [row[: size * rate] for row, size in zip(ctc_log_probs, sizes)]
        drafts = self._written_by_drafter(batch) if draft else [None] * len(batch)
        return [
            _Encoded(item, _Encoding(states[:size], outputs, self._limit(item, size), ready, scores, written),
                     list(item.prompt), item.temperature)
            for item, states, size, outputs, scores, written in zip(batch, encoded, sizes, ctc, kept, drafts)
        ]  # fmt: skip

    def _written_by_drafter(self, batch: Sequence[Request]) -> list[list[int] | None]:
        """Return the drafts that another model writes."""
        found: list[list[int] | None] = [None] * len(batch)
        asking = [index for index, one in enumerate(batch) if not one.temperature and not one.hotwords]
        if not self.drafter or not asking or not self.widths.active:
            return found
        begun = time.perf_counter()
        plain = [
            replace(batch[index], policy=None, scored=False, aligned=False, guarded=True, adapter=0) for index in asking
        ]
        for index, hypothesis in zip(asking, self.drafter.decode(plain)):
            found[index] = hypothesis.tokens
        self.counters.draft_seconds += time.perf_counter() - begun
        return found

    def _draft(self, row: _Encoded) -> Draft | None:
        """Return what the text of a row that enters may be."""
        if row.temperature or row.request.hotwords or not self.drafting or not self.widths.enters():
            return None
        tokens = row.encoding.draft
        if self.drafts and row.encoding.ctc is not None:
            tokens = self.drafts.tokens(row.encoding.ctc, row.prompt)
        return None if tokens is None else Draft([token for token in tokens if token != self.end])

    def _limit(self, request: Request, frames: int) -> int:
        """Return the maximum number of tokens after the prompt."""
        positions = self.model.config.decoder.positions
        if not 0 < len(request.prompt) < positions:
            raise ValueError(f"a prompt of {len(request.prompt)} tokens: the decoder has {positions} positions")
        if request.temperature and self.spelling:
            raise ValueError("joint decoding takes the best tokens: a request must not have a temperature")
        if request.hotwords and self.spelling:
            raise ValueError("joint decoding has no hot words")
        most = self.model.generation.get("max_new_tokens") or positions
        return min(positions - len(request.prompt), self.config.most_tokens(frames, self.model.generation), most)

    def _allowed(self, row: _Encoded) -> float:
        """Return the number of tokens that fit in the row's time; infinite where the row is not guarded."""
        if not row.request.guarded:
            return math.inf
        tokens = self.config.most_tokens(len(row.encoding.states), self.model.generation)
        if "tokens_per_frame" in self.model.generation:  # a rate that accounts for small tokens
            return tokens
        spoken = SPEECH_RATE * row.seconds(self.model.sample_rate) + self.config.extra_tokens
        return spoken if self.config.tokens_per_frame is not None else min(tokens, spoken)

    @torch.inference_mode()
    def _drop(self, live: _Live, waiting: deque[_Encoded], cancelled: Callable[[Hashable], bool]) -> None:
        """Remove cancelled rows."""
        slots = [slot for slot, row in enumerate(live.rows) if cancelled(row.request.key)]
        if slots:
            live.remove(slots)
        kept = [row for row in waiting if not cancelled(row.request.key)]
        if len(kept) < len(waiting):
            waiting.clear()
            waiting.extend(kept)

    @torch.inference_mode()
    def _advance(self, live: _Live, waiting: deque[_Encoded], steps: FixedSteps | None) -> list[Hypothesis]:
        """Run one decoder step: let waiting rows enter if enough slots are free, else add a token to each live row."""
        begun = time.perf_counter()
        ready = self._ready(live, waiting)
        free = min(self.rows - len(live.rows), ready)
        # Reading prompts takes about as long as a step, so several rows enter together; free slots cost nothing.
        enter = free and (not live.rows or free >= min(ready, max(1, self.rows // 8)))
        first, width = len(live.rows) if enter else 0, 1
        drafts = [row.draft for row in live.drawn]
        if enter:
            logits = self._enter(live, [waiting.popleft() for _ in range(free)])
        else:
            if any(drafts):
                width = self.widths.choose(drafts)
            tokens = upload(live.search.inputs(width), self.device)
            step = steps.step if steps else self.model.decoder.step
            logits = step(tokens, live.cache)
            self.counters.steps += 1
            self.counters.row_steps += steps.rows if steps else len(tokens)
            self.counters.useful_row_steps += len(live.rows)
        choice = live.search.choose(logits, first, opening=bool(enter))
        if choice.parents is not None:
            live.cache.choose(choice.parents, first)
        if any(drafts) and not enter:
            seconds = time.perf_counter() - begun
            self.widths.record(len(drafts), width, seconds, choice.accepted, choice.rejected)
        taken_back = [choice.taken_back.get(slot, 0) for slot in range(len(live.rows))]
        self.counters.tokens += len(live.rows) - first + choice.accepted
        self.counters.drafted += choice.drafted
        self.counters.accepted += choice.accepted
        finished: list[Hypothesis] = []
        unfinished: list[tuple[_Encoded, Hypothesis, float]] = []
        for slot in choice.ended:
            row, hypothesis = live.rows[slot], self._hypothesis(live, slot)
            policy = row.request.policy
            temperature = policy.retry(hypothesis) if policy else None
            if temperature is not None:
                waiting.appendleft(replace(row, temperature=temperature, attempt=row.attempt + 1))
                self.counters.retries += 1
                continue
            place = policy.continue_at(hypothesis, row.seconds(self.model.sample_rate)) if policy else None
            place = row.until if place is None else place
            if place is not None:
                unfinished.append((row, hypothesis, place))
                continue
            self._done_tokens += len(hypothesis.tokens)
            self._done_seconds += len(row.request.audio) / self.model.sample_rate
            for before, begins in reversed(row.earlier):
                hypothesis = replace(before, continuation=hypothesis, continues_at=begins)
            finished.append(hypothesis)
        if choice.ended:
            live.remove(choice.ended)
            swap_out(taken_back, choice.ended)
        if any(taken_back):
            live.cache.rewind(taken_back, width)
        self.counters.decoder_seconds += time.perf_counter() - begun
        self.timer.collect()
        waiting += self._encode_continuations(unfinished)
        return finished

    def _ready(self, live: _Live, waiting: deque[_Encoded]) -> int:
        """Return the number of rows that can enter. On a GPU these are rows whose encoding is complete, because live
        rows would wait for the encoder too; without live rows the first batch counts as complete."""
        if not self.gpu:
            return len(waiting)
        count, done = 0, None if live.rows or not waiting else waiting[0].encoding.ready
        for row in itertools.islice(waiting, self.rows):
            ready = row.encoding.ready
            if ready and ready is not done and not ready.query():
                break
            done = ready
            count += 1
        return count

    def _encode_continuations(self, unfinished: list[tuple[_Encoded, Hypothesis, float]]) -> list[_Encoded]:
        """Return rows of the audio after rows that have ended, from the given seconds on. The language stays that of
        the row, unless another one begins there."""
        found: list[_Encoded] = []
        for row, hypothesis, place in unfinished:
            asked, same = row.request, row.until is None or place < row.until
            spans = tuple((start - place, end - place) for start, end in asked.speech_spans if start >= place)
            audio = asked.audio[round(place * self.model.sample_rate) :]
            new = replace(
                row,
                request=replace(asked, audio=audio, speech_spans=spans),
                until=row.until - place if same and row.until is not None else None,
                attempt=0,
                temperature=asked.temperature,
                earlier=(*row.earlier, (hypothesis, place)),
            )
            found.append(new if same else replace(new, prompt=list(asked.prompt), detected=False))
        return self._encode_again(found, draft=True)

    def _encode_again(self, rows: list[_Encoded], draft: bool = False) -> list[_Encoded]:
        """Return the rows with the encoder output of their present audio; ``draft`` as in `_encode`."""
        rate, found = self.model.sample_rate, [*rows]
        requests = [replace(row.request, audio=row.request.audio[: round(row.seconds(rate) * rate)]) for row in rows]
        lengths = [self.model.encoder_frames(len(one.audio) / rate) for one in requests]
        for batch in encoder_batches(lengths, self.frames, self.rows):
            for index, new in zip(batch, self._encode([requests[index] for index in batch], draft=draft)):
                found[index] = replace(rows[index], encoding=new.encoding)
        return found

    def _enter(self, live: _Live, new: list[_Encoded]) -> Tensor:
        """Put new rows into the next free slots, read their prompts, and return logits (m, 1, V)."""
        decoder = self.model.decoder
        self._await(new)
        new = self._with_languages(new)
        prompts = [row.prompt for row in new]
        states = pad_sequence([row.encoding.states for row in new], batch_first=True)
        lengths, adapters = [len(row.encoding.states) for row in new], [row.request.adapter for row in new]
        hidden = decoder.read(prompts, states, lengths, live.cache, adapters)
        new = self._with_no_speech(new, hidden)
        drawn = [
            Row(
                row.encoding.limit,
                row.temperature,
                stamped=self.rules.has_timestamps(row.prompt),
                seed=row.attempt,
                prompt=len(row.prompt),
                scored=row.request.scored,
                allowed=self._allowed(row),
                ctc=row.encoding.ctc_log_probs,
                hotwords=row.request.hotwords,
                draft=self._draft(row),
                never=self._never(row.request),
            )
            for row in new
        ]
        live.add(new, drawn)
        return decoder.head(hidden[:, -1:])

    def _never(self, request: Request) -> Tensor | None:
        """Return the tokens that a request suppresses instead of the engine's."""
        if request.suppress_tokens is None:
            return None
        return upload(suppressed_tokens(self.model, self.end, request.suppress_tokens), self.device)

    def _await(self, rows: Iterable[_Encoded]) -> None:
        """Let the decoder's stream wait for the encoder output of the rows."""
        if not self.front:
            return
        for one in (row.encoding for row in rows):
            assert one.ready is not None
            self.front.wait_event(one.ready)
            one.states.record_stream(self.front)
            if one.ctc_log_probs is not None:
                one.ctc_log_probs.record_stream(self.front)

    def _with_languages(self, new: list[_Encoded]) -> list[_Encoded]:
        """Return the rows, with the detected language where one was asked for. A row in which the language changes
        keeps the audio before the change."""
        asking = [index for index, row in enumerate(new) if row.request.languages and not row.detected]
        if not asking:
            return new
        new, rate = self._before_a_change(list(new), asking), self.model.sample_rate
        found = dict(zip(asking, self._detect([(new[index], new[index].encoding.states) for index in asking])))
        decided = dict(found)
        unsure = [
            index
            for index in asking
            if max(found[index]) < language.CERTAIN and new[index].request.nearby_audio is not None
        ]
        if unsure:
            others = self._encode_again([_of_nearby_audio(new[index]) for index in unsure])
            self._await(others)
            nearby = self._detect([(row, row.encoding.states) for row in others])
            for index, row, probabilities in zip(unsure, others, nearby):
                both = [(new[index].seconds(rate), found[index]), (row.seconds(rate), probabilities)]
                decided[index] = language.weighted_mean(both).tolist()
        for index, known in decided.items():
            row = new[index]
            prompt = [*row.prompt]
            prompt[row.request.language_at] = row.request.languages[max(range(len(known)), key=known.__getitem__)]
            new[index] = replace(row, prompt=prompt, detected=True, languages=tuple(found[index]))
        return new

    def _before_a_change(self, new: list[_Encoded], asking: list[int]) -> list[_Encoded]:
        """Return the rows; where the language changes within one, it keeps the audio before the change.

        The language of a span of speech is detected from its frames in the encoder output of the complete window, so
        no further encoder pass is needed.
        """
        frame = self.model.frame_seconds
        asked: list[tuple[_Encoded, Tensor]] = []
        counts: dict[int, int] = {}
        for index in asking:
            row = new[index]
            if len(row.request.speech_spans) < 2:
                continue
            spans = language.with_pauses(row.request.speech_spans, row.seconds(self.model.sample_rate))
            parts = [row.encoding.states[int(start / frame) : int(end / frame) + 1] for start, end in spans]
            if all(map(len, parts)):
                counts[index] = len(parts)
                asked += [(row, part) for part in parts]
        found = iter(self._detect(asked))
        changed: list[int] = []
        for index, count in counts.items():
            place = language.change(new[index].request.speech_spans, [next(found) for _ in range(count)])
            if place is not None:
                new[index] = replace(new[index], until=place)
                changed.append(index)
        again = self._encode_again([new[index] for index in changed])
        self._await(again)
        for index, row in zip(changed, again):
            new[index] = row
        return new

    def _detect(self, rows: list[tuple[_Encoded, Tensor]]) -> list[list[float]]:
        """Return the probabilities of the languages in encoder output (T, D): the decoder's prediction after
        <|startoftranscript|>."""
        if not rows:
            return []
        logits = self.model.decoder.admit(
            [[row.prompt[row.request.language_at - 1]] for row, _ in rows],
            pad_sequence([states for _, states in rows], batch_first=True),
            [len(states) for _, states in rows],
            self.model.decoder.cache(),
            [row.request.adapter for row, _ in rows],
        )
        return [
            scores[list(row.request.languages)].float().softmax(-1).tolist() for (row, _), scores in zip(rows, logits)
        ]

    def _with_no_speech(self, new: list[_Encoded], hidden: Tensor) -> list[_Encoded]:
        """Return the rows; scored ones of a Whisper have the probability of no speech after <|startoftranscript|>.

        hidden (m, P, D): decoder output of the prompts, right-aligned.
        """
        token, begin = self.rules.no_speech, self.model.generation.get("decoder_start_token_id")
        if token is None or begin is None:
            return new
        wanted = [index for index, row in enumerate(new) if row.request.scored and begin in row.prompt]
        if not wanted:
            return new
        places = [hidden.shape[1] - len(new[i].prompt) + new[i].prompt.index(begin) for i in wanted]
        probabilities = self.model.decoder.head(hidden[wanted, places]).float().softmax(-1)[:, token]
        new = list(new)
        for index, probability in zip(wanted, probabilities.tolist()):
            new[index] = replace(new[index], no_speech=probability)
        return new

    def _hypothesis(self, live: _Live, slot: int) -> Hypothesis:
        row, drawn = live.rows[slot], live.drawn[slot]
        alignment = None
        if row.request.aligned:
            cross = live.cache.cross[:, :, slot, :, : len(row.encoding.states)]
            samples = round(row.seconds(self.model.sample_rate) * self.model.sample_rate)
            given = (row.prompt, drawn.tokens, self.end, samples, row.request.adapter)
            alignment = align(self.model, cross, *given)
        return Hypothesis(
            row.request.key,
            drawn.tokens,
            drawn.finished,
            row.encoding.ctc if self.ctc else None,
            drawn.logprob,
            tuple(drawn.logprobs[: len(drawn.tokens)]),
            row.no_speech,
            row.temperature,
            tuple(row.prompt),
            row.languages,
            tuple(drawn.alternatives),
            alignment,
        )


def _of_nearby_audio(row: _Encoded) -> _Encoded:
    assert row.request.nearby_audio is not None
    return replace(row, request=replace(row.request, audio=row.request.nearby_audio), until=None)


class _WithEngine(Protocol):
    """Model of another library, which brings its engine."""

    def engine(self, end: int, config: EngineConfig) -> Engine: ...


def engine_for(model: AnyModel, end: int, config: EngineConfig, drafter: Drafter | None = None) -> Engine:
    """Return the engine that decodes ``model``: a model of another library has its own.

    Raises ConfigError where that one is asked for joint decoding or drafts.
    """
    if "cached_decoding" in model.supports:
        return Engine(cast(SpeechModel, model), end, config, drafter=drafter)
    if drafter or config.draft == "ctc":
        raise ConfigError("--draft: another library decodes this model, one token at a time; leave it out")
    if config.suppress_tokens != EngineConfig.suppress_tokens:
        raise ConfigError("--suppress-tokens: another library decodes this model, by its own rules; leave it out")
    if config.ctc_weight:
        raise ConfigError("--ctc-weight: another library decodes this model, by attention only; leave it out")
    return cast(_WithEngine, model).engine(end, config)
