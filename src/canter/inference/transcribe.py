"""Transcription of utterances: audio is read ahead, divided into chunks, batched by length and decoded."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np

from canter.corpus.audio import AudioBlocks, DecodedAudio, audio_blocks, audio_info, decode_utterance
from canter.corpus.manifest import Utterance
from canter.errors import AudioError, CanterError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Request, Underway, encoder_batches
from canter.inference.recording import (
    ChunkKey,
    Recording,
    TranscribeConfig,
    Transcriber,
    Transcription,
    merged_channels,
)
from canter.text.tokenizer import Tokenizer

READERS = 2  # threads that decode audio while the model works
AHEAD = 2  # batches read ahead
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One utterance to transcribe."""

    utterance: Utterance
    seconds: float = math.inf
    """Length by which batches are made; infinite if it is unknown before reading."""
    audio: np.ndarray | None = None
    """(S,) or, for each channel by itself, (S, C) float32 at the model's sample rate; None: read from the utterance's
    file."""


@dataclass(frozen=True)
class Decoded:
    """Seconds of audio decoded so far, those of unfinished utterances included."""

    seconds: float


def transcribe(
    engine: Engine,
    tokenizer: Tokenizer,
    utterances: Sequence[Utterance],
    max_seconds: float = math.inf,
    config: TranscribeConfig | None = None,
) -> list[Transcription]:
    """Return the transcriptions of ``utterances``, in their order. One that cannot be read has an ``error``."""
    results: list[Transcription] = [Transcription("")] * len(utterances)
    for event in transcribe_events(engine, tokenizer, utterances, max_seconds, config):
        if not isinstance(event, Decoded):
            results[event[0]] = event[1]
    return results


def transcribe_events(
    engine: Engine,
    tokenizer: Tokenizer,
    utterances: Sequence[Utterance],
    max_seconds: float = math.inf,
    config: TranscribeConfig | None = None,
) -> Iterator[tuple[int, Transcription] | Decoded]:
    """Yield each transcription with the utterance's index as soon as it is finished, long utterances first, and a few
    times per second the amount of audio decoded.

    Batches follow the stated durations. Only a few batches of audio are in memory at a time, and a few windows of an
    utterance that is longer than the window. Utterances longer than ``max_seconds`` are refused.
    """
    jobs = [(index, Job(utterance, utterance.duration)) for index, utterance in enumerate(utterances)]
    queue = _Queue(Transcriber(engine, tokenizer, config), [jobs], max_seconds)
    tally = Tally([utterance.duration for utterance in utterances])
    for event in queue.events():
        if isinstance(event, Underway):
            yield tally.decoded((key, done) for key, done in event.rows if isinstance(key, ChunkKey))
        elif isinstance(event, ChunkKey):
            tally.add(event)
        else:
            tally.finish(event[0])
            yield event
    yield tally.decoded()


def transcribe_jobs(
    transcriber: Transcriber, groups: Iterable[Iterable[tuple[int, Job]]], max_seconds: float = math.inf
) -> Iterator[tuple[int, Transcription]]:
    """Yield the transcription of every job, with the job's number, as soon as it is finished.

    ``groups`` may be endless. Each group is taken once the decoder has room for it, and batched by itself: utterances
    longer than the window first, chunk by chunk, then the others, longest first.
    """
    for event in _Queue(transcriber, groups, max_seconds).events():
        if isinstance(event, tuple):
            yield event


class Tally:
    """Seconds of audio decoded, which never decrease and end at the sum of the utterances' stated ``durations``."""

    def __init__(self, durations: Sequence[float]):
        self.durations = durations
        self._finished: set[int] = set()
        self._finished_seconds = 0.0
        self._chunks: dict[int, dict[tuple[int, int], tuple[float, float, int]]] = {}
        """End in seconds, fraction and number of parts of each chunk of an utterance, by part and number."""
        self._most = 0.0

    def add(self, chunk: ChunkKey, fraction: float = 1.0) -> None:
        """Record the decoded fraction of a chunk, unless its utterance is finished."""
        if chunk.recording in self._finished:
            return
        chunks = self._chunks.setdefault(chunk.recording, {})
        place = chunk.part, chunk.number
        if chunks.get(place, (0.0, 0.0))[1] < 1:
            chunks[place] = chunk.start + chunk.seconds, fraction, chunk.parts

    def finish(self, utterance: int) -> None:
        """Record that an utterance is finished, or has failed."""
        self._chunks.pop(utterance, None)
        self._finished.add(utterance)
        self._finished_seconds += self.durations[utterance]

    def decoded(self, underway: Iterable[tuple[ChunkKey, float]] = ()) -> Decoded:
        """Return the seconds decoded, with the fractions of the chunks that are ``underway``. The pause before a chunk
        counts with it, its overlap with the chunk before does not."""
        for chunk, fraction in underway:
            self.add(chunk, fraction)
        seconds = self._finished_seconds
        for utterance, chunks in self._chunks.items():
            done, before = 0.0, dict[int, float]()
            for part, number in sorted(chunks):
                end, fraction, parts = chunks[part, number]
                done += (end - before.get(part, 0.0)) * fraction / parts
                before[part] = end
            seconds += min(done, self.durations[utterance])
        self._most = max(self._most, seconds)
        return Decoded(self._most)


@dataclass
class _Open:
    """A job that is being read or decoded."""

    job: Job
    recordings: list[Recording]  # one, or one for each channel
    channels: list[Utterance]  # what to read for each of them
    samples: int = 0  # read so far, of one channel
    lost_seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    error: str | None = None  # of the first chunk that the model could not decode


class _Queue:
    """Jobs that wait for the engine, read ahead in threads, and those whose hypotheses are not all back."""

    def __init__(self, transcriber: Transcriber, groups: Iterable[Iterable[tuple[int, Job]]], max_seconds: float):
        self.transcriber, self.groups, self.max_seconds = transcriber, groups, max_seconds
        self.open: dict[int, _Open] = {}
        self.failed: deque[tuple[int, Transcription]] = deque()
        self.read: deque[int] = deque()  # jobs whose number of chunks is known
        # Requests of recordings whose chunks are decoded in turn, by job and part: those whose next chunk can be
        # decoded, and those that wait for the text of the chunk before.
        self.ready: dict[tuple[int, int], Iterator[Request]] = {}
        self.underway: dict[tuple[int, int], Iterator[Request]] = {}

    def events(self) -> Iterator[tuple[int, Transcription] | ChunkKey | Underway]:
        """Decode the queue. Yield the key of every decoded chunk, every finished transcription with the number of its
        job, and a few times per second the rows that are under way."""
        engine, config = self.transcriber.engine, self.transcriber.config
        batches = self.turns() if config.condition_on_previous_text else self.batches()
        for event in engine.detect(batches) if config.detect_only else engine.events(batches):
            if isinstance(event, Underway):
                yield event
                continue
            key = event.key
            assert isinstance(key, ChunkKey)
            if key.recording in self.open:
                opened = self.open[key.recording]
                opened.error = opened.error or event.error
                opened.recordings[key.part].add(key.number, event)
                if (turn := (key.recording, key.part)) in self.underway:
                    self.ready[turn] = self.underway.pop(turn)
                yield key
            yield from self.finished()
        yield from self.finished()

    def batches(self) -> Iterator[list[Request]]:
        """Yield requests in batches for the engine, while threads read the audio of the next ones."""
        with ThreadPoolExecutor(READERS) as pool:
            ahead: deque[Callable[[], list[list[Request]]]] = deque()
            try:
                for batch in self._batches(pool):
                    ahead.append(batch)
                    if len(ahead) > AHEAD:
                        yield from ahead.popleft()()
                while ahead:
                    yield from ahead.popleft()()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def turns(self) -> Iterator[list[Request]]:
        """Yield batches of the next chunk of each recording, once the one before is decoded, with the text so far in
        its prompt. As many recordings as the decoder has rows are decoded at the same time, the longest first."""
        engine = self.transcriber.engine
        jobs = (pair for group in self.groups for pair in sorted(group, key=lambda pair: -pair[1].seconds))
        more = True
        while more or self.ready or self.underway:
            while more and len(self.ready) + len(self.underway) < engine.rows:
                pair = next(jobs, None)
                more = pair is not None
                if pair:
                    self._take_turns(*pair)
            requests = [request for turn in [*self.ready] if (request := self._next(turn))]
            frames = [engine.model.encoder_frames(len(one.audio) / self.transcriber.rate) for one in requests]
            for batch in encoder_batches(frames, engine.frames, engine.rows):
                yield [requests[place] for place in batch]
            if not requests and self.underway:
                yield []

    def _take_turns(self, index: int, job: Job) -> None:
        try:
            opened = self._begin(index, job)
        except CanterError as error:
            self.failed.append((index, Transcription("", error=str(error))))
            return
        for recording, utterance in zip(opened.recordings, opened.channels):
            self.ready[index, recording.part] = self._streamed(opened, recording, utterance)

    def _next(self, turn: tuple[int, int]) -> Request | None:
        """Return the request of a recording's next chunk; None after the last one, and where reading fails."""
        index, part = turn
        requests = self.ready.pop(turn, None)
        if requests is None:
            return None
        opened = self.open[index]
        try:
            request = next(requests, None)
        except CanterError as error:
            self.failed.append((index, Transcription("", error=str(error))))
            for others in (self.ready, self.underway):
                for other in [one for one in others if one[0] == index]:
                    del others[other]
            return None
        if request is None:
            if not any(other[0] == index for other in (*self.ready, *self.underway)):
                self.read.append(index)
            return None
        self.underway[turn] = requests
        assert isinstance(request.key, ChunkKey)
        slots = self.transcriber.slots(opened.job.utterance)
        return opened.recordings[part].conditioned(request.key.number, request, slots)

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[Callable[[], list[list[Request]]]]:
        """Yield functions that wait for audio, and return the next batches of a group: usually one, but more where
        channels are transcribed by themselves."""
        engine, window = self.transcriber.engine, self.transcriber.window
        size = max(1, int(engine.frames // engine.model.encoder_frames(window)))
        for group in self.groups:
            jobs = list(group)
            long = [pair for pair in jobs if pair[1].seconds > window]
            short = [pair for pair in jobs if pair[1].seconds <= window]
            for requests in _ahead(_grouped(self._long(long), size)):
                yield partial(list, [requests])
            frames = [engine.model.encoder_frames(job.seconds) for _, job in short]
            for batch in encoder_batches(frames, engine.frames, engine.rows):
                yield partial(_divided, [pool.submit(self._short, *short[place]) for place in batch])

    def _short(self, index: int, job: Job) -> list[Request]:
        """Return the requests of an utterance that is read at once: one per channel, unless it is longer than
        stated."""
        try:
            opened = self._begin(index, job)
            found: list[Request] = []
            for recording, utterance in zip(opened.recordings, opened.channels):
                if job.audio is None:
                    track = self.transcriber.config.audio_track
                    decoded = decode_utterance(utterance, self.transcriber.rate, track=track)
                    audio = decoded.samples
                    self._note(opened, decoded)
                else:
                    audio = _channel(job.audio, utterance)
                chunks = self.transcriber.chunks([self._count(opened, recording, audio)])
                found += recording.requests(chunks)
        except CanterError as error:
            self.failed.append((index, Transcription("", error=str(error))))
            return []
        self.read.append(index)
        return found

    def _long(self, jobs: Sequence[tuple[int, Job]]) -> Iterator[Request]:
        """Yield the requests of utterances that are read chunk by chunk, one channel after another."""
        for index, job in jobs:
            try:
                opened = self._begin(index, job)
                for recording, utterance in zip(opened.recordings, opened.channels):
                    yield from self._streamed(opened, recording, utterance)
            except CanterError as error:
                self.failed.append((index, Transcription("", error=str(error))))
            else:
                self.read.append(index)

    def _streamed(self, opened: _Open, recording: Recording, utterance: Utterance) -> Iterator[Request]:
        """Yield the requests of one channel, which is read chunk by chunk."""
        decoded, audio = None, opened.job.audio
        if audio is None:
            track = self.transcriber.config.audio_track
            decoded = audio_blocks(utterance, self.transcriber.rate, keep_damaged=True, track=track)
        blocks = [_channel(audio, utterance)] if audio is not None else decoded or ()
        chunks = self.transcriber.chunks(self._count(opened, recording, block) for block in blocks)
        yield from recording.requests(chunks)
        if decoded is not None:
            self._note(opened, decoded)

    def _begin(self, index: int, job: Job) -> _Open:
        """Return a job that is open from now on. Raises AudioError if its stated length is too long, or it is not
        audio."""
        if job.seconds < math.inf:
            self._check_length(job, job.seconds)
        request = self.transcriber.request(self.transcriber.slots(job.utterance))
        channels = [job.utterance]
        if self.transcriber.config.each_channel and job.utterance.channel_selector is None:
            if job.audio is None:
                count = audio_info(job.utterance.audio_filepath, track=self.transcriber.config.audio_track).channels
            else:
                count = 1 if job.audio.ndim == 1 else job.audio.shape[1]
            channels = [replace(job.utterance, channel_selector=channel) for channel in range(count)]
        labelled = self.transcriber.config.each_channel
        recordings = [
            Recording(self.transcriber, request, index, one.channel_selector if labelled else None, part, len(channels))
            for part, one in enumerate(channels)
        ]
        self.open[index] = opened = _Open(job, recordings, channels)
        return opened

    def _check_length(self, job: Job, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise AudioError(
                f"{job.utterance.audio_filepath} is {seconds:.0f} s long, over the limit of {self.max_seconds:g} s "
                "(--max-seconds): cut it"
            )

    def _note(self, opened: _Open, decoded: DecodedAudio | AudioBlocks) -> None:
        opened.lost_seconds = max(opened.lost_seconds, decoded.lost_seconds)
        opened.warnings = tuple(dict.fromkeys((*opened.warnings, *decoded.warnings)))

    def _count(self, opened: _Open, recording: Recording, block: np.ndarray) -> np.ndarray:
        """Count the samples of ``block`` and return it. Raises AudioError where they are too many."""
        if recording.part == 0:
            opened.samples += len(block)
            self._check_length(opened.job, opened.samples / self.transcriber.rate)
        return block

    def finished(self) -> Iterator[tuple[int, Transcription]]:
        """Yield the jobs that have been completed or have failed since the last call."""
        while self.failed:
            index, transcription = self.failed.popleft()
            self.open.pop(index, None)
            yield index, transcription
        for _ in range(len(self.read)):
            index = self.read.popleft()
            if not all(one.complete for one in self.open[index].recordings):
                self.read.append(index)
                continue
            opened = self.open.pop(index)
            if opened.error is not None:
                yield index, Transcription("", error=opened.error)
                continue
            utterance = opened.job.utterance
            yield (
                index,
                replace(
                    merged_channels(opened.recordings, utterance.target_lang or utterance.lang),
                    seconds=opened.samples / self.transcriber.rate,
                    lost_seconds=round(opened.lost_seconds, 3),
                    warnings=opened.warnings,
                ),
            )


def _channel(audio: np.ndarray, utterance: Utterance) -> np.ndarray:
    """Return the utterance's channel of an array (S,) or (S, C)."""
    return audio if audio.ndim == 1 else np.ascontiguousarray(audio[:, utterance.channel_selector or 0])


def _divided(futures: Sequence[Future[list[Request]]]) -> list[list[Request]]:
    """Return the requests of utterances in batches of at most their number."""
    return [*_grouped((request for future in futures for request in future.result()), len(futures))]


def _grouped(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while group := list(islice(items, size)):
        yield group


def _ahead(items: Iterator[list[T]]) -> Iterator[list[T]]:
    """Yield the items, of which a thread makes AHEAD in advance."""
    with ThreadPoolExecutor(1) as pool:
        futures = deque(pool.submit(next, items, None) for _ in range(AHEAD))
        while (item := futures.popleft().result()) is not None:
            futures.append(pool.submit(next, items, None))
            yield item
