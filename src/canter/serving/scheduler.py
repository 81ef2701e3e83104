"""Queue of the engine: one thread decodes the audio of all requests in fair turns, and drops cancelled ones."""

import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from canter.errors import AudioError, CanterError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Hypothesis, Request, encoder_batches

log = logging.getLogger("canter.serving")
StageSeconds = tuple[float, float, float]  # of features, encoder and decoder


class EngineFailure(CanterError, RuntimeError):
    """Failure of the engine on a request, which is not the client's fault."""


@dataclass(frozen=True)
class Timing:
    """Seconds that a ticket has spent in each stage so far.

    Batches are shared: a stage's seconds are all those that the engine spent in it while the ticket was in the engine.
    """

    queue: float = 0.0
    features: float = 0.0
    encoder: float = 0.0
    decoder: float = 0.0


class Stored:
    """Samples on disk that stand for the array of a waiting request; the scheduler reads them when its turn comes.

    ``place`` is the first of the bytes that hold the ``samples``, in float32.
    """

    def __init__(self, file: BinaryIO, place: int, samples: int):
        self._file, self._place, self._samples = file, place, samples
        self._array: weakref.ref[np.ndarray] | None = None  # requests that wait for the same audio share it

    def __len__(self) -> int:
        return self._samples

    def read(self) -> np.ndarray:
        """Return the samples (S,). Raise OSError or ValueError if the file is damaged or closed."""
        found = self._array() if self._array else None
        if found is None:
            found = np.frombuffer(self._bytes(), np.float32)
            self._array = weakref.ref(found)
        return found

    def _bytes(self) -> bytearray:
        data, size = bytearray(), 4 * self._samples
        while len(data) < size:
            more = os.pread(self._file.fileno(), size - len(data), self._place + len(data))
            if not more:
                raise OSError("the file ends early")
            data += more
        return data


@dataclass(frozen=True)
class Outcome:
    """Hypothesis of one chunk of a ticket, or the error that ended it."""

    chunk: int
    hypothesis: Hypothesis | None
    error: Exception | None
    timing: Timing


class Ticket:
    """Chunks of one request's audio."""

    def __init__(self, chunks: int, deliver: Callable[[Outcome], None]):
        self.deliver = deliver
        """Called in the engine's thread, once for every chunk, unless the ticket is cancelled."""
        self.left = chunks
        """Number of chunks without an outcome, those that are to be added included."""
        self.queued = 0
        """Number of chunks added so far."""
        self.cancelled = False
        self.arrived = time.perf_counter()
        self.entered: tuple[float, StageSeconds] | None = None
        """Time at which the engine took the first chunk, and its seconds in each stage until then."""
        self.turn = 0
        """Number of the batch that held its latest chunk, or after which it arrived."""


class _Entry:
    """A chunk in the queue or the engine; the key of its request."""

    def __init__(self, ticket: Ticket, chunk: int, request: Request, frames: int):
        self.ticket, self.chunk, self.frames = ticket, chunk, frames
        self.request = request
        self.attempts = 0

    def loaded(self) -> Request:
        """Return the request with its audio in memory, for the engine only: this entry keeps the stored samples.

        Raises what `Stored.read` raises.
        """
        stored = {name: one.read() for name, one in vars(self.request).items() if isinstance(one, Stored)}
        return replace(self.request, key=self, **stored)


class Scheduler:
    """The engine with its queue and thread. Any thread may call ``submit`` and ``cancel``."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._waiting: list[_Entry] = []
        self._inside: set[_Entry] = set()
        self._retried: _Entry | None = None
        self._turn = 0  # number of batches taken
        self._last: StageSeconds = (0.0, 0.0, 0.0)  # when the engine took the latest batch
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="canter-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """Number of chunks that the engine has not taken yet."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        """Number of chunks in the engine."""
        return len(self._inside)

    def submit(
        self, requests: Sequence[Request], deliver: Callable[[Outcome], None], chunks: int | None = None
    ) -> Ticket:
        """Queue the chunks of one request; their outcomes are delivered as they finish, in any order.

        chunks: number of all chunks, where others follow by `add`.
        """
        ticket = Ticket(len(requests) if chunks is None else chunks, deliver)
        ticket.turn = self._turn
        self.add(ticket, requests)
        return ticket

    def add(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        """Queue more chunks of a request, which are numbered in the order of their arrival."""
        model = self.engine.model
        entries = [
            _Entry(ticket, chunk, request, model.encoder_frames(len(request.audio) / model.sample_rate))
            for chunk, request in enumerate(requests, ticket.queued)
        ]
        with self._changed:
            if not self.alive:
                raise EngineFailure("the service is shutting down")
            ticket.queued += len(entries)
            self._waiting += entries
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Drop a ticket: deliver nothing more, and remove its rows from the engine at the next decoder step."""
        with self._changed:
            ticket.cancelled = True
            self._waiting = [entry for entry in self._waiting if entry.ticket is not ticket]
            self._inside = {entry for entry in self._inside if entry.ticket is not ticket}
            self._changed.notify()

    def close(self, seconds: float = 10.0) -> None:
        """End the thread within ``seconds``; unfinished chunks fail."""
        with self._changed:
            self._closed = True
            left = [*self._waiting, *self._inside]
            self._waiting, self._inside = [], set()
            self._changed.notify()
        for entry in left:
            self._deliver(entry, None, EngineFailure("the service is shutting down"))
        self._thread.join(seconds)

    def _work(self) -> None:
        while not self._closed:
            try:
                for hypothesis in self.engine.run(self._batches(), cancelled=self._is_cancelled):
                    entry = hypothesis.key
                    assert isinstance(entry, _Entry)
                    with self._changed:
                        expected = entry in self._inside
                        self._inside.discard(entry)
                    if expected and hypothesis.error is not None:
                        self._deliver(entry, None, AudioError(hypothesis.error))
                    elif expected:
                        self._deliver(entry, hypothesis, None)
            except Exception as error:
                self._recover(error)

    def _batches(self) -> Iterator[list[Request]]:
        """Yield the engine's next batches: [] while none may enter; block while there is nothing to do."""
        while True:
            with self._changed:
                while not self._closed and not self._waiting and not self._inside:
                    self._changed.wait()
                if self._closed:
                    return
                batch = self._take()
                if batch:
                    now = time.perf_counter(), self._stage_seconds()
                    self._turn, self._last = self._turn + 1, now[1]
                    for entry in batch:
                        entry.ticket.entered = entry.ticket.entered or now
                        entry.ticket.turn = self._turn
                        entry.attempts += 1
                    self._inside |= {*batch}
            yield self._loaded(batch)

    def _loaded(self, batch: list[_Entry]) -> list[Request]:
        """Return the requests of a batch with their audio; only entries whose audio cannot be read fail."""
        found: list[Request] = []
        for entry in batch:
            try:
                found.append(entry.loaded())
            except (OSError, ValueError) as error:  # ValueError: the file is closed, its client has left
                with self._changed:
                    expected = entry in self._inside
                    self._inside.discard(entry)
                if expected:
                    self._deliver(entry, None, EngineFailure(f"the audio cannot be read: {error}"))
        return found

    def _take(self) -> list[_Entry]:
        """Remove the next batch from the queue: the chunk whose turn it is, with chunks of similar length.

        A chunk that was in the engine when it failed is decoded in a batch of its own.
        """
        if self._retried in self._inside:
            return []
        self._retried = next((entry for entry in self._waiting if entry.attempts), None)
        if self._retried:
            if self._inside:
                self._retried = None
                return []
            self._waiting.remove(self._retried)
            return [self._retried]
        queue = self._in_turn()
        if not queue or self._must_yield(queue[0].ticket):
            return []
        lengths = [entry.frames for entry in queue]
        batches = encoder_batches(lengths, self.engine.frames, self.engine.rows)
        batch = [queue[index] for index in next(batch for batch in batches if 0 in batch)]
        taken = {*batch}
        self._waiting = [entry for entry in self._waiting if entry not in taken]
        return batch

    def _in_turn(self) -> list[_Entry]:
        """Return the queue round robin: the first chunk of every ticket, then the second of each, and so on.

        Within a round the ticket with the earliest turn comes first, and among equal ones the oldest.
        """
        before: Counter[Ticket] = Counter()
        places = []
        for entry in self._waiting:
            ticket = entry.ticket
            places.append((before[ticket], ticket.turn, ticket.entered is not None, ticket.arrived))
            before[ticket] += 1
        order = sorted(range(len(places)), key=places.__getitem__)
        return [self._waiting[index] for index in order]

    def _must_yield(self, ticket: Ticket) -> bool:
        """Return whether the last chunks of other tickets should be decoded before more of ``ticket`` is encoded.

        They would wait for the encoder; the decoder gets as much time for them as the encoder took for the last batch.
        """
        ending = {entry.ticket for entry in self._inside} - {entry.ticket for entry in self._waiting}
        features, encoder, decoder = (now - then for now, then in zip(self._stage_seconds(), self._last))
        return ticket.entered is not None and bool(ending) and decoder < features + encoder

    def _is_cancelled(self, key: object) -> bool:
        return isinstance(key, _Entry) and key.ticket.cancelled

    def _stage_seconds(self) -> StageSeconds:
        counters = self.engine.counters
        return counters.feature_seconds, counters.encoder_seconds, counters.decoder_seconds

    def _deliver(self, entry: _Entry, hypothesis: Hypothesis | None, error: Exception | None) -> None:
        if entry.ticket.cancelled:
            return
        ticket, spent = entry.ticket, self._stage_seconds()
        entered, before = ticket.entered or (time.perf_counter(), spent)
        timing = Timing(entered - ticket.arrived, *(now - then for now, then in zip(spent, before)))
        ticket.left -= 1
        ticket.deliver(Outcome(entry.chunk, hypothesis, error, timing))

    def _recover(self, error: Exception) -> None:
        """Fail chunks that were in the engine individually; queue the others again, to be decoded one at a time."""
        log.error("the engine failed: %s", error, exc_info=error)
        with self._changed:
            failed = [entry for entry in self._inside if entry.attempts > 1]
            again = [entry for entry in self._inside if entry.attempts == 1]
            again.sort(key=lambda entry: entry.ticket.arrived)
            self._waiting = again + self._waiting
            self._inside, self._retried = set(), None
        for entry in failed:
            self._deliver(entry, None, EngineFailure(f"the model failed on this audio: {error}"))
