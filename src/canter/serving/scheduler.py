"""One thread that owns the engine: it takes whatever waits, gives hypotheses back as they finish, and drops
what nobody waits for any more."""

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

from canter.errors import CanterError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Hypothesis, Request, encoder_batches

log = logging.getLogger("canter.serving")
Spent = tuple[float, float, float]  # seconds in features, encoder and decoder


class EngineFailure(CanterError, RuntimeError):
    """The engine failed on a request: not the client's fault."""


@dataclass(frozen=True)
class Timing:
    """Where a ticket's time went so far, in seconds. Batches are shared: the stages' seconds are those that the
    engine spent in each while the ticket was in it, whoever they were for."""

    queue: float = 0.0
    features: float = 0.0
    encoder: float = 0.0
    decoder: float = 0.0


class Stored:
    """Samples on disk, in place of an array in a request that waits; the scheduler reads them when the engine takes the
    request."""

    def __init__(self, file: BinaryIO, place: int, samples: int):
        """``place``: the first byte of so many float32 ``samples``."""
        self._file, self._place, self._samples = file, place, samples
        self._array: weakref.ref[np.ndarray] | None = None  # requests that wait for the same audio share it

    def __len__(self) -> int:
        return self._samples

    def read(self) -> np.ndarray:
        """Return the samples (S,). Raises OSError or ValueError where the file is damaged or closed."""
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
    """What became of one piece of a ticket."""

    piece: int
    hypothesis: Hypothesis | None
    error: Exception | None
    timing: Timing
    """The ticket's, up to now."""


class Ticket:
    """The pieces that one client waits for."""

    def __init__(self, pieces: int, deliver: Callable[[Outcome], None]):
        self.deliver = deliver
        """Called in the engine's thread, once for every piece unless the ticket is cancelled."""
        self.left = pieces
        self.cancelled = False
        self.arrived = time.perf_counter()
        self.entered: tuple[float, Spent] | None = None
        """When the engine took its first piece, and what it had spent in its stages until then."""
        self.turn = 0
        """The batch that had its last piece, or after which it came."""


class _Entry:
    """One piece on its way; the engine's key of it."""

    def __init__(self, ticket: Ticket, piece: int, request: Request, frames: int):
        self.ticket, self.piece, self.frames = ticket, piece, frames
        self.request = request
        self.attempts = 0

    def loaded(self) -> Request:
        """Return the request with its audio in memory. Only the engine holds that: a hypothesis that waits for its
        client holds none. Raises what `Stored.read` does."""
        stored = {name: one.read() for name, one in vars(self.request).items() if isinstance(one, Stored)}
        return replace(self.request, key=self, **stored)


class Scheduler:
    """The engine's queue. ``submit`` and ``cancel`` may be called from any thread."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._waiting: list[_Entry] = []
        self._inside: set[_Entry] = set()
        self._alone: _Entry | None = None
        self._turn = 0  # batches so far
        self._last: Spent = (0.0, 0.0, 0.0)  # what the engine had spent when it took the last one
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="canter-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """Pieces that the engine has not taken yet."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        """Pieces that the engine works on."""
        return len(self._inside)

    def submit(self, requests: Sequence[Request], deliver: Callable[[Outcome], None]) -> Ticket:
        """Queues the pieces of one client; their outcomes come as they finish, in any order."""
        rate = self.engine.model.config.features.sample_rate
        ticket = Ticket(len(requests), deliver)
        entries = [
            _Entry(ticket, piece, request, self.engine.model.encoder_frames(len(request.audio) / rate))
            for piece, request in enumerate(requests)
        ]
        with self._changed:
            if not self.alive:
                raise EngineFailure("the service is shutting down")
            ticket.turn = self._turn
            self._waiting += entries
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nothing more is delivered for ``ticket``; what waits is forgotten, what the engine has leaves it
        at the next step."""
        with self._changed:
            ticket.cancelled = True
            self._waiting = [entry for entry in self._waiting if entry.ticket is not ticket]
            self._inside = {entry for entry in self._inside if entry.ticket is not ticket}
            self._changed.notify()

    def close(self, seconds: float = 10.0) -> None:
        """Ends the thread; what is not finished fails."""
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
                    if expected:
                        self._deliver(entry, hypothesis, None)
            except Exception as error:
                self._recover(error)

    def _batches(self) -> Iterator[list[Request]]:
        """What the engine is to take next: [] while there is only what it has; waits where there is nothing."""
        while True:
            with self._changed:
                while not self._closed and not self._waiting and not self._inside:
                    self._changed.wait()
                if self._closed:
                    return
                batch = self._take()
                if batch:
                    now = time.perf_counter(), self._spent()
                    self._turn, self._last = self._turn + 1, now[1]
                    for entry in batch:
                        entry.ticket.entered = entry.ticket.entered or now
                        entry.ticket.turn = self._turn
                        entry.attempts += 1
                    self._inside |= {*batch}
            yield self._loaded(batch)

    def _loaded(self, batch: list[_Entry]) -> list[Request]:
        """Return the requests of a batch with their audio; an entry whose audio cannot be read fails by itself."""
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
        """The batch of the piece whose turn it is, its neighbours in length with it. A piece that was there
        when the engine failed goes through it alone."""
        if self._alone in self._inside:
            return []
        self._alone = next((entry for entry in self._waiting if entry.attempts), None)
        if self._alone:
            if self._inside:
                self._alone = None
                return []
            self._waiting.remove(self._alone)
            return [self._alone]
        queue = self._in_turn()
        if not queue or self._others_first(queue[0].ticket):
            return []
        lengths = [entry.frames for entry in queue]
        batches = encoder_batches(lengths, self.engine.frames, self.engine.rows)
        batch = [queue[index] for index in next(batch for batch in batches if 0 in batch)]
        taken = {*batch}
        self._waiting = [entry for entry in self._waiting if entry not in taken]
        return batch

    def _in_turn(self) -> list[_Entry]:
        """What waits: the next piece of every ticket, then the one after it of each, and so on; among them first
        who has waited longest since a turn, and of those who came since then the oldest."""
        before: Counter[Ticket] = Counter()
        places = []
        for entry in self._waiting:
            ticket = entry.ticket
            places.append((before[ticket], ticket.turn, ticket.entered is not None, ticket.arrived))
            before[ticket] += 1
        order = sorted(range(len(places)), key=places.__getitem__)
        return [self._waiting[index] for index in order]

    def _others_first(self, ticket: Ticket) -> bool:
        """Whether a further piece of ``ticket`` lets the decoder go on first, for as long as the encoder took
        for the last batch: the last pieces of others are there, which would stand still while it is encoded."""
        ending = {entry.ticket for entry in self._inside} - {entry.ticket for entry in self._waiting}
        features, encoder, decoder = (now - then for now, then in zip(self._spent(), self._last))
        return ticket.entered is not None and bool(ending) and decoder < features + encoder

    def _is_cancelled(self, key: object) -> bool:
        return isinstance(key, _Entry) and key.ticket.cancelled

    def _spent(self) -> Spent:
        counters = self.engine.counters
        return counters.feature_seconds, counters.encoder_seconds, counters.decoder_seconds

    def _deliver(self, entry: _Entry, hypothesis: Hypothesis | None, error: Exception | None) -> None:
        if entry.ticket.cancelled:
            return
        ticket, spent = entry.ticket, self._spent()
        entered, before = ticket.entered or (time.perf_counter(), spent)
        timing = Timing(entered - ticket.arrived, *(now - then for now, then in zip(spent, before)))
        ticket.left -= 1
        ticket.deliver(Outcome(entry.piece, hypothesis, error, timing))

    def _recover(self, error: Exception) -> None:
        """The engine failed: whoever was in it alone is told so, the others go through it one by one."""
        log.error("the engine failed: %s", error, exc_info=error)
        with self._changed:
            failed = [entry for entry in self._inside if entry.attempts > 1]
            again = [entry for entry in self._inside if entry.attempts == 1]
            again.sort(key=lambda entry: entry.ticket.arrived)
            self._waiting = again + self._waiting
            self._inside, self._alone = set(), None
        for entry in failed:
            self._deliver(entry, None, EngineFailure(f"the model failed on this audio: {error}"))
