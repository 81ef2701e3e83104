"""The decoding engine: a queue of audio in, hypotheses out as they finish.

Audio is encoded in batches filled to a budget of padded frames. Each encoded row waits until the decoder
has a free slot; there its cross-attention keys and values are projected once and its prompt is read. At
every step all live rows advance by one token. A row that ends leaves at once and the next one enters, so
the decoder works on live rows alone and no row waits for the longest of its batch.

B: rows, N: beams, S: samples, T: encoder frames, V: vocabulary.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from canter.errors import ConfigError
from canter.inference.engine.capacity import decoder_rows, encoder_batches, encoder_frames
from canter.inference.engine.ctc import Joint, PrefixScorer, ctc_greedy, spelling_of
from canter.inference.engine.graphs import FixedSteps
from canter.inference.engine.repetition import RepetitionGuard
from canter.inference.engine.requests import Counters, EngineConfig, Hypothesis, Request, Underway
from canter.inference.engine.rules import Rules
from canter.inference.engine.search import BeamSearch, Greedy, Row, Search
from canter.inference.engine.timer import Timer
from canter.inference.transcript import language
from canter.inference.transcript.alignment import align
from canter.models.cache import swap_out
from canter.models.model import SpeechModel
from canter.runtime import on_stream, upload

SPEAKABLE = 12.5  # tokens a second that the fastest speech has, by the usual tokenizers
EVENT_SECONDS = 0.2  # between two values of progress
USUAL_TOKENS = 4.0  # a second of speech, until finished rows tell


@dataclass(frozen=True)
class _Encoded:
    """A row that the encoder is done with, or, on a GPU, will be at ``ready``."""

    request: Request
    states: Tensor  # (T, D), projected to the decoder's width
    ctc: list[int] | None
    limit: int  # tokens
    prompt: list[int]
    temperature: float = 0.0
    attempt: int = 0
    no_speech: float = 0.0
    heard: tuple[tuple[Hypothesis, float], ...] = ()
    """Of the audio before this: each with where, in seconds, what comes after it begins."""
    ready: "torch.cuda.Event | None" = None
    ctc_log_probs: Tensor | None = None
    """(T x upsampling, C), for joint decoding."""
    detected: bool = False
    """The prompt has the language that was detected."""
    languages: tuple[float, ...] = ()
    """Probabilities of the request's languages."""
    until: float | None = None
    """Seconds of the request's audio that this row has; another language begins there. None: all of it."""

    def seconds(self, rate: int) -> float:
        """Return the seconds of audio that this row has."""
        return len(self.request.audio) / rate if self.until is None else self.until


class _Live:
    """The decoder's live rows, in the order of their slots."""

    def __init__(self, cache, search: Search):
        self.cache, self.search = cache, search
        self.rows: list[_Encoded] = []
        self.drawn: list[Row] = []  # the same rows, as the search sees them

    def add(self, rows: list[_Encoded], drawn: list[Row]) -> None:
        self.rows += rows
        self.drawn += drawn
        self.search.add(drawn)

    def remove(self, slots: list[int]) -> None:
        """Rows leave; the last ones take their slots, as in the cache."""
        self.cache.remove(slots)
        self.search.remove(slots)
        swap_out(self.rows, slots)
        swap_out(self.drawn, slots)


class Engine:
    """Decodes with ``model``; a token of id ``end`` ends a row. Tokens that the model's ``generation``
    settings suppress are never chosen."""

    aligns = True
    """Whether it can tell when a token was said."""

    def __init__(self, model: SpeechModel, end: int, config: EngineConfig | None = None, *, ctc: bool = False):
        """``ctc`` also gives the CTC head's greedy outputs, if the model has one. Raises ConfigError where the
        configuration asks for joint decoding and the model cannot do it."""
        self.model, self.end, self.config = model, end, config or EngineConfig()
        weight = self.config.ctc_weight
        if not 0 <= weight <= 1:
            raise ConfigError(f"--ctc-weight {weight:g} must lie between 0 (attention only) and 1 (CTC only)")
        self.spelling = spelling_of(model) if weight else None
        self.ctc = ctc and model.ctc is not None
        self.device = next(model.parameters()).device
        self.rows = self.config.rows or decoder_rows(model, self.device)
        self.frames = self.config.frames or encoder_frames(self.device)
        self.counters = Counters(slots=self.rows)
        self.gpu = self.device.type == "cuda"
        self.rules = Rules(model.generation, end, self.device)
        # The encoder's kernels fill the whole device: the decoder's short ones would queue behind each.
        self.side = torch.cuda.Stream(self.device) if self.gpu else None
        self.front = torch.cuda.Stream(self.device, priority=-1) if self.gpu else None
        self.timer = Timer(self.gpu)
        self._done_tokens, self._done_seconds = 10 * USUAL_TOKENS, 10.0  # of finished rows

    def decode(self, requests: Iterable[Request]) -> list[Hypothesis]:
        """Hypotheses in the order of ``requests``, which are sorted and batched here."""
        requests = list(requests)
        numbered = [replace(item, key=number) for number, item in enumerate(requests)]
        rate = self.model.sample_rate
        frames = [self.model.encoder_frames(len(item.audio) / rate) for item in numbered]
        batches = encoder_batches(frames, self.frames)
        found = {result.key: result for result in self.run([numbered[i] for i in batch] for batch in batches)}
        return [replace(found[number], key=item.key) for number, item in enumerate(requests)]

    def run(
        self,
        batches: Iterable[list[Request]],
        cancelled: Callable[[Hashable], bool] | None = None,
    ) -> Iterator[Hypothesis]:
        """Yield hypotheses as they finish; ``events`` without the progress in between."""
        with closing(self.events(batches, cancelled)) as events:
            for event in events:
                if isinstance(event, Hypothesis):
                    yield event

    def events(
        self,
        batches: Iterable[list[Request]],
        cancelled: Callable[[Hashable], bool] | None = None,
    ) -> Generator[Hypothesis | Underway]:
        """Encode one batch after another, as rows become free, and yield hypotheses as they finish, and a few times a
        second how far the others are.

        Batches should be sorted by length, longest first: neighbours share slots, and buffers are made once.
        The next one is asked for whenever there is room; an empty one means that there is nothing yet, and
        live rows go on. Without live rows ``batches`` is asked again and again, so it should wait then.
        ``cancelled(key)`` is asked for every row before every step; one of which it is true leaves without
        a hypothesis.
        """
        begun = time.perf_counter()
        training = self.model.training
        self.model.eval()
        source, waiting, more = iter(batches), deque[_Encoded](), True
        search = self._search()
        live = _Live(self.model.decoder.cache(search.beams, self.rows), search)
        steps = self._fixed_steps()
        if self.front:
            self.front.wait_stream(torch.cuda.current_stream(self.device))
        # On a GPU the next batch is encoded beside the decoder's steps.
        enough = self.rows + (self.rows + 1) // 2 if self.gpu else self.rows
        told = begun
        try:
            while True:
                while more and len(live.rows) + len(waiting) < enough:
                    batch = next(source, None)
                    more = batch is not None
                    if not batch:
                        break
                    waiting += self._encode(batch)
                    self.counters.utterances += len(batch)
                    samples = sum(len(item.audio) for item in batch)
                    self.counters.audio_seconds += samples / self.model.sample_rate
                    if (now := time.perf_counter()) - told >= EVENT_SECONDS:
                        told = now
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
                if now - told >= EVENT_SECONDS:
                    told = now
                    yield self._underway(live, waiting)
                begun = time.perf_counter()
        finally:
            self.model.train(training)
            self.timer.collect(wait=True)

    def _underway(self, live: _Live, waiting: Iterable[_Encoded]) -> Underway:
        rate, pace = self.model.sample_rate, self._done_tokens / self._done_seconds

        def fraction(row: _Encoded, tokens: int) -> float:
            seconds = len(row.request.audio) / rate
            begins = sum(before for _, before in row.heard)  # of the audio that this row is the rest of
            here = seconds * (0.5 + 0.5 * min(0.95, tokens / max(1.0, pace * seconds)))
            return (begins + here) / max(begins + seconds, 1e-9)

        rows = [(row, len(drawn.tokens)) for row, drawn in zip(live.rows, live.drawn)]
        rows += [(row, 0) for row in waiting]
        return Underway(tuple((row.request.key, fraction(row, tokens)) for row, tokens in rows))

    def _fixed_steps(self) -> FixedSteps | None:
        """How the decoder steps, if not as it comes."""
        return FixedSteps(self.model.decoder) if self.gpu and self.config.graphs else None

    def _search(self) -> Search:
        config, joint = self.config, None
        if self.spelling:
            joint = Joint(PrefixScorer(self.spelling, self.end, config.beams, self.device), config.ctc_weight)
        if config.beams == 1:
            guard = RepetitionGuard(config.repeat_ngram, config.max_repeats)
            return Greedy(self.rules, guard, joint)
        whisper = self.rules.no_timestamps is not None
        penalty = config.length_penalty
        return BeamSearch(
            self.rules,
            config.beams,
            (1.0 if whisper else 0.0) if penalty is None else penalty,
            config.early_stopping,
            in_place=not whisper,
            pad=self.model.config.decoder.pad,
            joint=joint,
        )

    @torch.inference_mode()
    def _encode(self, batch: list[Request]) -> list[_Encoded]:
        """Features, encoder and projection to the decoder's width; on a GPU in a stream of its own."""
        model = self.model
        shortest = model.config.features.hop  # of which comes one frame
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
                encoded, encoded_lengths = model.encode(features, frames)
                ctc: Sequence[list[int] | None] = [None] * len(batch)
                ctc_log_probs: Tensor | None = None
                if self.ctc or self.spelling:
                    ctc_log_probs, ctc_lengths = model.ctc_log_probs(encoded, encoded_lengths)
                    if self.ctc:
                        ctc = ctc_greedy(ctc_log_probs, ctc_lengths)
                encoded = model.projection(encoded)
                if self.gpu:  # without waiting for the device
                    sizes = [int(model.encoder.frames(model.features.frames(size))) for size in lengths]
                else:
                    sizes = encoded_lengths.tolist()
            if self.side:
                ready = torch.cuda.Event()
                ready.record(self.side)
        kept: Sequence[Tensor | None] = [None] * len(batch)
        if self.spelling and ctc_log_probs is not None:
            rate = model.config.ctc_upsampling
            kept = [row[: size * rate] for row, size in zip(ctc_log_probs, sizes)]
        return [
            _Encoded(item, states[:size], outputs, self._limit(item, size), list(item.prompt),
                     item.temperature, ready=ready, ctc_log_probs=scores)
            for item, states, size, outputs, scores in zip(batch, encoded, sizes, ctc, kept)
        ]  # fmt: skip

    def _limit(self, request: Request, frames: int) -> int:
        """Tokens that a row may have after its prompt."""
        positions = self.model.config.decoder.positions
        if not 0 < len(request.prompt) < positions:
            raise ValueError(f"a prompt of {len(request.prompt)} tokens: the decoder has {positions} positions")
        if request.temperature and self.spelling:
            raise ValueError("joint decoding takes the best tokens: a request may have no temperature")
        return min(positions - len(request.prompt), self._tokens_of(frames))

    def _tokens_of(self, frames: int) -> int:
        """Return the tokens that so many encoder frames may have, whatever the decoder has room for."""
        rate = self.config.tokens_per_frame
        if rate is None:
            rate = self.model.generation.get("tokens_per_frame", 1.0)
        return math.ceil(rate * frames) + self.config.extra_tokens

    def _allowed(self, row: _Encoded) -> float:
        """Return how many tokens the row's audio has time for; infinite where the row is not guarded."""
        if not row.request.guarded:
            return math.inf
        tokens = self._tokens_of(len(row.states))
        if "tokens_per_frame" in self.model.generation:  # which knows how small the tokens are
            return tokens
        spoken = SPEAKABLE * row.seconds(self.model.sample_rate) + self.config.extra_tokens
        return spoken if self.config.tokens_per_frame is not None else min(tokens, spoken)

    @torch.inference_mode()
    def _drop(self, live: _Live, waiting: deque[_Encoded], cancelled: Callable[[Hashable], bool]) -> None:
        """What nobody waits for any more leaves."""
        slots = [slot for slot, row in enumerate(live.rows) if cancelled(row.request.key)]
        if slots:
            live.remove(slots)
        kept = [row for row in waiting if not cancelled(row.request.key)]
        if len(kept) < len(waiting):
            waiting.clear()
            waiting.extend(kept)

    @torch.inference_mode()
    def _advance(self, live: _Live, waiting: deque[_Encoded], steps: FixedSteps | None) -> list[Hypothesis]:
        """One decoder step: waiting rows enter if enough slots are free, else live rows get a token each."""
        begun = time.perf_counter()
        ready = self._ready(live, waiting)
        free = min(self.rows - len(live.rows), ready)
        # Reading prompts costs about a step, so a few rows enter together; meanwhile
        # their slots cost nothing.
        enter = free and (not live.rows or free >= min(ready, max(1, self.rows // 8)))
        first = len(live.rows) if enter else 0
        if enter:
            logits = self._enter(live, [waiting.popleft() for _ in range(free)])
        else:
            tokens = upload(live.search.inputs(), self.device)
            step = steps.step if steps else self.model.decoder.step
            logits = step(tokens, live.cache)
            self.counters.steps += 1
            self.counters.row_steps += steps.rows if steps else len(tokens)
            self.counters.useful_row_steps += len(live.rows)
        ended, parents = live.search.choose(logits, first, opening=bool(enter))
        if parents is not None:
            live.cache.choose(parents, first)
        self.counters.tokens += len(live.rows) - first
        finished: list[Hypothesis] = []
        cut: list[tuple[_Encoded, Hypothesis, float]] = []
        for slot in ended:
            row, hypothesis = live.rows[slot], self._hypothesis(live, slot)
            asked = row.request
            temperature = asked.retry(hypothesis) if asked.retry else None
            if temperature is not None:
                waiting.appendleft(replace(row, temperature=temperature, attempt=row.attempt + 1))
                self.counters.retries += 1
                continue
            place = asked.rest(hypothesis, row.seconds(self.model.sample_rate)) if asked.rest else None
            place = row.until if place is None else place
            if place is not None:
                cut.append((row, hypothesis, place))
                continue
            self._done_tokens += len(hypothesis.tokens)
            self._done_seconds += len(asked.audio) / self.model.sample_rate
            for before, begins in reversed(row.heard):
                hypothesis = replace(before, rest=hypothesis, rest_begins=begins)
            finished.append(hypothesis)
        if ended:
            live.remove(ended)
        self.counters.decoder_seconds += time.perf_counter() - begun
        self.timer.collect()
        waiting += self._encode_rests(cut)
        return finished

    def _ready(self, live: _Live, waiting: deque[_Encoded]) -> int:
        """How many rows could enter: on a GPU none that the encoder is still at, or live rows would wait for it too;
        where none lives, its first batch is waited for."""
        if not self.gpu:
            return len(waiting)
        count, done = 0, None if live.rows or not waiting else waiting[0].ready
        for row in itertools.islice(waiting, self.rows):
            if row.ready and row.ready is not done and not row.ready.query():
                break
            done = row.ready
            count += 1
        return count

    def _encode_rests(self, cut: list[tuple[_Encoded, Hypothesis, float]]) -> list[_Encoded]:
        """Return rows of the audio that rows leave, after their hypotheses and from the given seconds on. The language
        is that of the row, unless another one begins there."""
        rests: list[_Encoded] = []
        for row, hypothesis, place in cut:
            asked, same = row.request, row.until is None or place < row.until
            later = tuple((start - place, end - place) for start, end in asked.stretches if start >= place)
            rest = replace(asked, audio=asked.audio[round(place * self.model.sample_rate) :], stretches=later)
            until = row.until - place if same and row.until is not None else None
            new = replace(row, request=rest, until=until, attempt=0, temperature=asked.temperature)
            new = replace(new, heard=(*row.heard, (hypothesis, place)))
            rests.append(new if same else replace(new, prompt=list(asked.prompt), detected=False))
        return self._encode_again(rests)

    def _encode_again(self, rows: list[_Encoded]) -> list[_Encoded]:
        """Return the rows with the encoder's output of the audio that they have now."""
        rate, found = self.model.sample_rate, [*rows]
        requests = [replace(row.request, audio=row.request.audio[: round(row.seconds(rate) * rate)]) for row in rows]
        lengths = [self.model.encoder_frames(len(one.audio) / rate) for one in requests]
        for batch in encoder_batches(lengths, self.frames, self.rows):
            for index, new in zip(batch, self._encode([requests[index] for index in batch])):
                fresh = {name: getattr(new, name) for name in ("states", "ctc", "limit", "ready", "ctc_log_probs")}
                found[index] = replace(rows[index], **fresh)
        return found

    def _enter(self, live: _Live, new: list[_Encoded]) -> Tensor:
        """New rows take the next free slots and read their prompts -> logits (m, 1, V)."""
        decoder = self.model.decoder
        self._await(new)
        new = self._with_languages(new)
        prompts = [row.prompt for row in new]
        states = pad_sequence([row.states for row in new], batch_first=True)
        hidden = decoder.read(prompts, states, [len(row.states) for row in new], live.cache)
        new = self._with_no_speech(new, hidden)
        drawn = [
            Row(
                row.limit,
                row.temperature,
                stamped=self.rules.has_timestamps(row.prompt),
                seed=row.attempt,
                prompt=len(row.prompt),
                scored=row.request.scored,
                allowed=self._allowed(row),
                ctc=row.ctc_log_probs,
            )
            for row in new
        ]
        live.add(new, drawn)
        return decoder.head(hidden[:, -1:])

    def _await(self, rows: Iterable[_Encoded]) -> None:
        """Let the decoder's stream wait for the encoder's output of the rows."""
        if not self.front:
            return
        for row in rows:
            assert row.ready is not None
            self.front.wait_event(row.ready)
            row.states.record_stream(self.front)
            if row.ctc_log_probs is not None:
                row.ctc_log_probs.record_stream(self.front)

    def _with_languages(self, new: list[_Encoded]) -> list[_Encoded]:
        """Return the rows with the language that Whisper detects in those that ask for it; a row in which another
        language begins keeps the audio before it."""
        asking = [index for index, row in enumerate(new) if row.request.languages and not row.detected]
        if not asking:
            return new
        new = self._before_a_change(list(new), asking)
        shares = self._detect([(new[index], new[index].states) for index in asking])
        unsure = [
            place
            for place, index in enumerate(asking)
            if max(shares[place]) < language.SURE and new[index].request.nearby is not None
        ]
        decided = [*shares]
        if unsure:
            rows = [new[asking[place]] for place in unsure]
            others = self._encode_again([_of_nearby(row) for row in rows])
            self._await(others)
            for place, row, found in zip(unsure, others, self._detect([(row, row.states) for row in others])):
                own = new[asking[place]].seconds(self.model.sample_rate)
                both = [(own, shares[place]), (row.seconds(self.model.sample_rate), found)]
                decided[place] = language.weighted(both).tolist()
        for place, index in enumerate(asking):
            row, known = new[index], decided[place]
            prompt, at = [*row.prompt], row.request.language_at
            prompt[at] = row.request.languages[max(range(len(known)), key=known.__getitem__)]
            new[index] = replace(row, prompt=prompt, detected=True, languages=tuple(shares[place]))
        return new

    def _before_a_change(self, new: list[_Encoded], asking: list[int]) -> list[_Encoded]:
        """Return the rows; those in which the language changes with the audio before the change alone.

        The language of a stretch of speech is that which the decoder detects in the encoder's output of the whole
        window, in the frames of the stretch: that costs no further pass of the encoder.
        """
        frame = self.model.frame_seconds
        asked: list[tuple[_Encoded, Tensor]] = []
        counts: dict[int, int] = {}
        for index in asking:
            row = new[index]
            if len(row.request.stretches) < 2:
                continue
            places = language.with_pauses(row.request.stretches, row.seconds(self.model.sample_rate))
            parts = [row.states[int(start / frame) : int(end / frame) + 1] for start, end in places]
            if all(map(len, parts)):
                counts[index] = len(parts)
                asked += [(row, part) for part in parts]
        found = iter(self._detect(asked))
        cut: list[int] = []
        for index, count in counts.items():
            place = language.change(new[index].request.stretches, [next(found) for _ in range(count)])
            if place is not None:
                new[index] = replace(new[index], until=place)
                cut.append(index)
        again = self._encode_again([new[index] for index in cut])
        self._await(again)
        for index, row in zip(cut, again):
            new[index] = row
        return new

    def _detect(self, rows: list[tuple[_Encoded, Tensor]]) -> list[list[float]]:
        """Return the probabilities of the languages in encoder output (T, D), by what the decoder says at once after
        <|startoftranscript|>."""
        if not rows:
            return []
        logits = self.model.decoder.admit(
            [[row.prompt[row.request.language_at - 1]] for row, _ in rows],
            pad_sequence([states for _, states in rows], batch_first=True),
            [len(states) for _, states in rows],
            self.model.decoder.cache(),
        )
        return [
            scores[list(row.request.languages)].float().softmax(-1).tolist() for (row, _), scores in zip(rows, logits)
        ]

    def _with_no_speech(self, new: list[_Encoded], hidden: Tensor) -> list[_Encoded]:
        """Of scored rows of a Whisper the probability that nobody speaks, from what is predicted after
        <|startoftranscript|>; hidden (m, P, D) of the prompts, right-aligned."""
        token, begin = self.rules.no_speech, int(self.model.generation.get("decoder_start_token_id", -1))
        wanted = [
            index for index, row in enumerate(new) if token is not None and row.request.scored and begin in row.prompt
        ]
        if not wanted:
            return new
        places = [hidden.shape[1] - len(new[i].prompt) + new[i].prompt.index(begin) for i in wanted]
        shares = self.model.decoder.head(hidden[wanted, places]).float().softmax(-1)[:, token]
        new = list(new)
        for index, share in zip(wanted, shares.tolist()):
            new[index] = replace(new[index], no_speech=share)
        return new

    def _hypothesis(self, live: _Live, slot: int) -> Hypothesis:
        row, drawn = live.rows[slot], live.drawn[slot]
        alignment = None
        if row.request.aligned:
            cross = live.cache.cross[:, :, slot, :, : len(row.states)]
            samples = round(row.seconds(self.model.sample_rate) * self.model.sample_rate)
            alignment = align(self.model, cross, row.prompt, drawn.tokens, self.end, samples)
        return Hypothesis(
            row.request.key,
            drawn.tokens,
            drawn.finished,
            row.ctc,
            drawn.logprob,
            row.no_speech,
            row.temperature,
            tuple(row.prompt),
            row.languages,
            tuple((tuple(tokens), total) for tokens, total, _ in drawn.alternatives),
            alignment,
        )


def _of_nearby(row: _Encoded) -> _Encoded:
    """Return the row with the other audio of its recording in place of its own."""
    assert row.request.nearby is not None
    return replace(row, request=replace(row.request, audio=row.request.nearby), until=None)


def engine_for(model: Any, end: int, config: EngineConfig) -> Engine:
    """Return what decodes ``model``: another library's model brings an engine of its own.

    Raises ConfigError where that one is asked for joint decoding.
    """
    if "cached_decoding" in model.supports:
        return Engine(model, end, config)
    if config.ctc_weight:
        raise ConfigError("--ctc-weight: another library decodes this model, by attention only; leave it out")
    return model.engine(end, config)
