"""The queue in front of the engine, without HTTP."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.serving.scheduler import EngineFailure, Outcome, Scheduler, Stored

from .conftest import PATIENCE, came_about, held, noise


class Recorder(Engine):
    """Engine that records the lengths of the batches that it encodes, and waits at a door before each."""

    def __init__(self, model, **settings):
        super().__init__(model, model.tokenizer.end, EngineConfig(**settings))
        self.batches: list[list[int]] = []
        self.door = threading.Event()

    def _encode(self, batch, **options):
        self.batches.append([len(request.audio) for request in batch])
        self.door.wait(PATIENCE)
        return super()._encode(batch, **options)


class Collected:
    """Outcomes of tickets by chunk, and an event for the last one."""

    def __init__(self, chunks: int):
        self.outcomes: dict[int, Outcome] = {}
        self.all, self._pieces = threading.Event(), chunks

    def __call__(self, outcome: Outcome) -> None:
        self.outcomes[outcome.chunk] = outcome
        if len(self.outcomes) == self._pieces:
            self.all.set()


@pytest.fixture
def scheduler_of(model) -> Iterator:
    made: list[Scheduler] = []

    def make(**settings) -> Scheduler:
        made.append(Scheduler(Recorder(model, **settings)))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.engine.door.set()
        scheduler.close()


def requests(model, seconds: list[float]) -> list[Request]:
    prompt = model.prompt(source_lang="en", target_lang="en")
    return [Request(noise(length, seed), prompt) for seed, length in enumerate(seconds)]


def test_hypotheses_are_the_engines(model, scheduler_of):
    wanted = Engine(model, model.tokenizer.end).decode(requests(model, [1.0, 0.5, 2.0, 3.0]))
    scheduler, got = scheduler_of(), Collected(4)
    scheduler.engine.door.set()
    scheduler.submit(requests(model, [1.0, 0.5, 2.0, 3.0]), got)
    assert got.all.wait(PATIENCE)
    assert [got.outcomes[chunk].hypothesis.tokens for chunk in range(4)] == [found.tokens for found in wanted]
    timings = [got.outcomes[chunk].timing for chunk in range(4)]
    assert all(timing.decoder > 0 and timing.encoder > 0 and timing.queue >= 0 for timing in timings)


def test_stored_audio_is_read_when_it_is_taken(model, scheduler_of, tmp_path):
    """Neither waiting nor decoded requests hold samples; only the request whose audio cannot be read fails."""
    clips = requests(model, [1.0, 0.5, 2.0])
    wanted = Engine(model, model.tokenizer.end).decode(clips)
    scheduler, got = scheduler_of(), Collected(4)
    with open(tmp_path / "samples", "w+b", buffering=0) as file:
        stored = []
        for clip in clips:
            stored.append(replace(clip, audio=Stored(file, file.tell(), len(clip.audio))))
            file.write(clip.audio.tobytes())
        beyond = replace(clips[0], audio=Stored(file, file.tell(), 8000))
        scheduler.submit([*stored, beyond], got)
        scheduler.engine.door.set()
        assert got.all.wait(PATIENCE)
    assert [got.outcomes[chunk].hypothesis.tokens for chunk in range(3)] == [found.tokens for found in wanted]
    assert "the audio cannot be read" in str(got.outcomes[3].error)
    for chunk in range(3):
        assert isinstance(got.outcomes[chunk].hypothesis.key.request.audio, Stored)


def test_stored_audio_is_shared_while_it_is_in_use(tmp_path):
    with open(tmp_path / "samples", "w+b", buffering=0) as file:
        file.write(noise(1.0).tobytes())
        stored = Stored(file, 0, 16000)
        first = stored.read()
        assert stored.read() is first
        assert np.array_equal(first, noise(1.0))
        first[0] = 5.0
        del first
        assert np.array_equal(stored.read(), noise(1.0))


def test_who_waits_is_batched_by_length_and_the_oldest_goes_first(model, scheduler_of):
    """Ten chunks arrive while the engine is busy; with a budget of 40 frames the oldest one's batch is first."""
    scheduler = scheduler_of(frames=40, rows=16)
    first, rest = Collected(1), Collected(10)
    scheduler.submit(requests(model, [0.3]), first)
    assert came_about(lambda: bool(scheduler.engine.batches))
    lengths = [1.0, 3.0, 1.1, 3.1, 0.9, 3.2, 1.05, 0.2, 0.25, 0.3]
    scheduler.submit(requests(model, lengths), rest)
    scheduler.engine.door.set()
    assert rest.all.wait(PATIENCE)
    batches = [[round(samples / 16000, 2) for samples in batch] for batch in scheduler.engine.batches]
    assert batches[0] == [0.3]
    assert 1.0 in batches[1]
    assert sorted(length for batch in batches[1:] for length in batch) == sorted(lengths)
    frames = [model.encoder_frames(max(batch)) * len(batch) for batch in batches]
    assert max(frames) <= 40 or all(len(batch) == 1 for batch in batches if frames[batches.index(batch)] > 40)
    assert len(batches) < 9


def seconds_of(scheduler: Scheduler) -> list[float]:
    """Return the seconds of audio of each encoded batch, all of one chunk."""
    assert all(len(batch) == 1 for batch in scheduler.engine.batches)
    return [round(batch[0] / 16000, 2) for batch in scheduler.engine.batches]


def test_tickets_take_turns(model, scheduler_of):
    """Between two chunks of long audio each of the other tickets gets one chunk."""
    scheduler, got = scheduler_of(frames=1), [Collected(4), Collected(1), Collected(2)]
    scheduler.submit(requests(model, [0.3]), Collected(1))
    assert came_about(lambda: bool(scheduler.engine.batches))
    for lengths, outcomes in zip([[1.0, 1.1, 1.2, 1.3], [0.5], [2.0, 2.1]], got):
        scheduler.submit(requests(model, lengths), outcomes)
    scheduler.engine.door.set()
    assert all(one.all.wait(PATIENCE) for one in got)
    assert seconds_of(scheduler) == [0.3, 1.0, 0.5, 2.0, 1.1, 2.1, 1.2, 1.3]


def test_later_requests_do_not_starve_earlier_ones(model, scheduler_of):
    """Two more tickets arrive with every batch, more than are taken; long audio still gets its turns."""
    scheduler, got = scheduler_of(frames=1), Collected(3)
    encode = scheduler.engine._encode

    def encode_while_more_come(batch, **options):
        if len(scheduler.engine.batches) < 20:
            for _ in range(2):
                scheduler.submit(requests(model, [0.5]), lambda outcome: None)
        return encode(batch, **options)

    scheduler.engine._encode = encode_while_more_come
    scheduler.engine.door.set()
    scheduler.submit(requests(model, [1.0, 1.1, 1.2]), got)
    assert got.all.wait(PATIENCE)
    order = seconds_of(scheduler)
    assert [order.index(length) for length in (1.0, 1.1, 1.2)] == [0, 3, 10]


def test_a_last_chunk_is_decoded_before_more_of_long_audio(model, scheduler_of):
    """The order does not depend on how long an encoder batch takes."""
    scheduler, long, short = scheduler_of(frames=1), Collected(5), Collected(1)
    encode = scheduler.engine._encode

    def slow(batch, **options):
        scheduler.engine.counters.encoder_seconds += 1000.0
        return encode(batch, **options)

    scheduler.engine._encode = slow
    scheduler.submit(requests(model, [1.0, 1.1, 1.2, 1.3, 1.4]), long)
    assert came_about(lambda: bool(scheduler.engine.batches))
    seen: list[float] = []

    def answered(outcome: Outcome) -> None:
        seen.extend(seconds_of(scheduler))
        short(outcome)

    scheduler.submit(requests(model, [0.5]), answered)
    scheduler.engine.door.set()
    assert short.all.wait(PATIENCE)
    assert long.all.wait(PATIENCE)
    assert seen == [1.0, 0.5]
    assert seconds_of(scheduler) == [1.0, 0.5, 1.1, 1.2, 1.3, 1.4]


def test_chunks_that_are_added_later_belong_to_the_ticket(model, scheduler_of):
    """They are numbered in the order in which they come; the ticket is complete with the last of them."""
    clips = requests(model, [1.0, 0.5, 2.0])
    wanted = Engine(model, model.tokenizer.end).decode(clips)
    scheduler, got = scheduler_of(), Collected(3)
    scheduler.engine.door.set()
    ticket = scheduler.submit(clips[:1], got, chunks=3)
    assert came_about(lambda: 0 in got.outcomes)
    assert ticket.left == 2
    scheduler.add(ticket, clips[1:])
    assert got.all.wait(PATIENCE)
    assert [got.outcomes[chunk].hypothesis.tokens for chunk in range(3)] == [found.tokens for found in wanted]
    assert ticket.left == 0
    assert got.outcomes[2].timing.decoder >= got.outcomes[0].timing.decoder


def test_cancelled_before_and_in_the_engine(model, scheduler_of):
    scheduler = scheduler_of(rows=1)
    gone, waiting, kept = Collected(1), Collected(2), Collected(1)
    tickets = [scheduler.submit(requests(model, [2.0]), gone), scheduler.submit(requests(model, [2.0, 1.0]), waiting)]
    scheduler.submit(requests(model, [1.0]), kept)
    assert came_about(lambda: bool(scheduler.inside))
    for ticket in tickets:
        scheduler.cancel(ticket)
    assert scheduler.waiting == 1
    assert not scheduler.inside
    scheduler.engine.door.set()
    assert kept.all.wait(PATIENCE)
    assert not gone.outcomes
    assert not waiting.outcomes
    assert [len(batch) for batch in scheduler.engine.batches] == [1, 1]
    assert scheduler.waiting == scheduler.inside == 0


def test_idle_costs_nothing(scheduler_of):
    """An idle engine waits without spinning."""
    scheduler = scheduler_of()
    scheduler.engine.door.set()
    before = scheduler.engine.counters.steps
    with scheduler._changed:
        notified = scheduler._changed.wait(0.2)
    assert not notified
    assert scheduler.engine.counters.steps == before


def test_closing_fails_what_is_left(model, scheduler_of):
    scheduler, got = scheduler_of(rows=1), Collected(3)
    scheduler.submit(requests(model, [1.0, 1.0, 1.0]), got)
    opening = threading.Thread(target=lambda: came_about(lambda: scheduler._closed) and scheduler.engine.door.set())
    opening.start()
    scheduler.close(PATIENCE)
    opening.join()
    assert got.all.wait(PATIENCE)
    assert all(isinstance(outcome.error, EngineFailure) for outcome in got.outcomes.values())
    assert not scheduler.alive
    with pytest.raises(EngineFailure, match="shutting down"):
        scheduler.submit(requests(model, [1.0]), got)


def test_one_of_several_live_rows_leaves(endless, caplog):
    """The other rows move up in the engine's caches, and their results are unchanged."""
    clips = requests(endless, [2.0, 3.0, 4.0])
    wanted = Engine(endless, endless.tokenizer.end).decode(clips)
    engine = Engine(endless, endless.tokenizer.end)
    scheduler = Scheduler(engine)
    try:
        gone, kept = Collected(1), Collected(2)
        with held(engine, after=3):
            ticket = scheduler.submit(clips[:1], gone)
            scheduler.submit(clips[1:], kept)
            assert came_about(lambda: engine.counters.steps >= 3)
            scheduler.cancel(ticket)
        assert kept.all.wait(PATIENCE)
        assert [kept.outcomes[chunk].hypothesis.tokens for chunk in range(2)] == [found.tokens for found in wanted[1:]]
        assert not gone.outcomes
        assert "the engine failed" not in caplog.text
    finally:
        scheduler.close()
