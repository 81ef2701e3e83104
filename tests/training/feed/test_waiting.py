"""Data that does not come: what is said, when a run ends, and what it keeps."""

import dataclasses
import itertools
import json
import os
import resource
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from canter.corpus.manifest import write_manifest
from canter.errors import CanterError, ConfigError
from canter.events import Events
from canter.training.feed import data
from canter.training.feed.data import Address, Patience, Puller, StoppedWaitingError, load_ahead, prefetch_within_limit
from canter.training.loop import Trainer
from canter.training.recipe import prepare_training, run_training

from ...helpers import leased
from ..run.test_checkpoints import losses

# Python 3.12 warns of forking where threads are
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def soon(monkeypatch):
    """Everything that takes seconds takes tenths of them."""
    for name, seconds in (("NOTICE_SECONDS", 0.2), ("STOP_SECONDS", 0.2), ("POLL_SECONDS", 0.05)):
        monkeypatch.setattr(data, name, seconds)


@pytest.fixture
def slow(config, spoken, tmp_path):
    """A run of six steps, and the file of a row that only its fourth step needs."""
    rows = [json.loads(line) for line in spoken.train_manifest.read_text().splitlines()]
    for row in rows:
        row["audio_filepath"] = str(spoken.train_manifest.parent / row["audio_filepath"])
    config = dataclasses.replace(
        config, manifest=(tmp_path / "train.jsonl",), valid=(), track=(), steps=6, batch_seconds=4.0
    )
    config = dataclasses.replace(config, micro_batches_per_step=2)
    write_manifest(tmp_path / "train.jsonl", rows)
    straight = dataclasses.replace(config, output=tmp_path / "straight")
    run_training(straight)
    used = [json.loads(line) for line in (straight.output / "utterances.jsonl").read_text().splitlines()]
    row = used[3]["rows"][1][0]
    original = rows[row]["audio_filepath"]
    path = tmp_path / "slow.wav"
    with open(original, "rb") as file:
        path.write_bytes(file.read())
    rows[row]["audio_filepath"] = str(path)
    write_manifest(tmp_path / "train.jsonl", rows)
    return config, straight, path, row


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_never_answers_ends_the_run_saved_and_named(slow, soon, monkeypatch, workers):
    config, straight, path, row = slow
    config = dataclasses.replace(config, workers=workers)
    passed = 0.0
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed))
    monkeypatch.setattr(data, "LOOK_SECONDS", 1000.0)

    class Clock(Events):
        def message(self, line):  # the clock jumps once the file is waited for: how fast this machine is does not count
            nonlocal passed
            if f"while reading row {row} ({path}); the run ends after 300 s (--data-timeout)" in line:
                passed = 1000.0

    with leased(path), pytest.raises(CanterError, match=rf"no data for 10.. s, while reading row {row} \({path}\)"):
        run_training(config, Clock())
    assert [folder.name for folder in (config.output / "checkpoints").glob("step-*")] == ["step-000003"]
    run_training(config)
    assert losses(config) == losses(straight)


def asked_to_stop(rank, config):
    """SIGTERM goes only to the process that waits for its data."""

    def say_and_stop(self, line):
        if "waiting for data" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    data.NOTICE_SECONDS, data.STOP_SECONDS = 1.0, 0.3
    Trainer._warn = say_and_stop
    return run_training(config).progress.step


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_waits_for_data_obeys_sigterm(slow, on_ranks, ranks):
    config, _, path, _ = slow
    with leased(path):
        assert on_ranks(ranks, asked_to_stop, config) == [(None, "KeyboardInterrupt: ")] * ranks
    assert list((config.output / "checkpoints").glob("step-*"))
    assert on_ranks(ranks, asked_to_stop, config) == [(6, "")] * ranks


def test_a_named_pipe_is_skipped_as_audio(slow):
    config, _, path, row = slow
    path.unlink()
    os.mkfifo(path)
    run_training(config)
    (skipped,) = [json.loads(line) for line in (config.output / "skipped.jsonl").read_text().splitlines()]
    assert skipped["line"] == row
    assert skipped["reason"] == f"{path} cannot be read: a named pipe, not a regular file; write it to a file first"


def test_waiting_is_reported_and_ends():
    hold, said = threading.Event(), []

    def values():
        yield 1
        hold.wait(60)
        yield 2

    puller = Puller(values(), [], lambda: "row 7 (a.wav)")
    assert puller.next(Patience()) == 1
    with pytest.raises(CanterError, match=r"no data for \d s, while reading row 7"):
        puller.next(Patience(limit=0.3, warn=said.append))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "STOP_SECONDS", 0.0)
        with pytest.raises(StoppedWaitingError):
            puller.next(Patience(stopping=lambda: True))
    hold.set()
    puller.close()
    puller.thread.join(1800)
    assert not puller.thread.is_alive()


def test_time_in_which_the_process_is_stopped_is_not_waited(soon, monkeypatch):
    """As by Ctrl-Z: a clock that leaps between two looks at it says nothing of the storage."""
    hold, looks = threading.Event(), itertools.count(1)
    clock = itertools.count(0, 1000)
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))

    def values():
        hold.wait(60)
        yield 1

    def stopping():
        if next(looks) == 2:
            hold.set()
        return False

    puller = Puller(values(), [])
    assert puller.next(Patience(limit=300.0, stopping=stopping)) == 1
    assert next(looks) > 2
    puller.close()


def test_what_the_iterator_raises_is_raised_where_it_is_waited_for():
    def values():
        yield 1
        raise KeyError("gone")

    puller = Puller(values(), [])
    assert puller.next(Patience()) == 1
    with pytest.raises(KeyError, match="gone"):
        puller.next(Patience())
    with pytest.raises(StopIteration):
        puller.next(Patience())
    puller.close()


@pytest.mark.parametrize(
    ("limit", "workers", "held", "prefetch"),
    [(resource.RLIM_INFINITY, 64, 8, 8), (1024, 1, 1, 8), (1024, 16, 1, 7), (1024, 64, 8, 1), (256, 8, 2, 2)],
)
def test_workers_load_ahead_what_the_open_files_allow(monkeypatch, limit, workers, held, prefetch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(os, "listdir", lambda _: ["0"] * 20)
    said = []
    assert prefetch_within_limit(workers, held, said.append) == prefetch
    assert bool(said) == (prefetch < 8)


def test_too_few_open_files_are_refused_before_workers_start(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (128, 128))
    with pytest.raises(ConfigError, match=r"--workers 8 needs about 200 open files, and this process may have 128"):
        prefetch_within_limit(8, 1)


def test_open_files_that_run_out_are_no_fault_of_a_row(config):
    prepared = prepare_training(config)
    address = Address(0, 0, True, np.array([0, 1]), 0)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        loaded = prepared.data.micro_batches[address]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not loaded.skipped
    assert "Too many open files" in str(loaded.fatal)


def test_few_open_files_are_enough_for_a_worker(config):
    """Workers load as far ahead as the check allows."""
    prepared = prepare_training(config)
    addresses = [Address(step, 0, True, np.array([step]), 0) for step in range(20)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 64 + 3 * 8, before[1]))
    said = []
    try:
        patience = Patience(warn=said.append)
        steps = [
            one.address.step for one in load_ahead(prepared.data.micro_batches, iter(addresses), 1, patience=patience)
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert steps == list(range(20))
    assert "loads 1 instead of 8" in said[0]
