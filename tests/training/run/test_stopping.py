"""Requests to stop a run, and another process in its folder."""

import dataclasses
import json
import os
import signal
import time

import pytest

from canter.errors import ConfigError
from canter.training.loop import finish_step_on_signals
from canter.training.recipe import run_training
from canter.training.run.folder import claimed

from ...helpers import gone
from ..conftest import Reports
from .test_checkpoints import losses

# Python 3.12 warns of forking where threads are
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def test_signals_that_come_together_are_one_and_a_later_one_stops_at_once(monkeypatch):
    with finish_step_on_signals() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.is_set()
        monkeypatch.setattr("canter.training.loop.SAME_SIGNAL", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def ended_in_step(rank, config, last):
    """Trains until, with ``last`` steps taken, all processes of the job get SIGTERM twice."""
    os.setsid()

    def report(taken):
        if taken.step == last:
            os.killpg(0, signal.SIGTERM)
            os.killpg(0, signal.SIGTERM)

    return run_training(config, Reports(report)).progress.step


def test_a_job_that_is_ended_saves_the_step_in_hand(config, tmp_path, on_ranks):
    """Also where that step waits for data still to be loaded, and where there are several ranks."""
    config = dataclasses.replace(config, valid=(), track=(), batch_seconds=4.0, micro_batches_per_step=12, steps=6)
    run_training(config)
    for ranks in (1, 2):
        ended = dataclasses.replace(config, output=tmp_path / f"ended-{ranks}", workers=1)
        assert on_ranks(ranks, ended_in_step, ended, 3) == [(None, "KeyboardInterrupt: ")] * ranks
        state = ended.output / "checkpoints" / "step-000004" / "training" / "state.json"
        assert json.loads(state.read_text())["step"] == 4
        assert on_ranks(ranks, ended_in_step, ended, 0) == [(6, "")] * ranks
        assert losses(ended) == pytest.approx(losses(config), rel=2e-4)


def killed_in_step(rank, config, note):
    os.setsid()
    note.write_text(str(os.getpid()))

    def report(taken):
        if taken.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    run_training(config, Reports(report))


def test_data_workers_end_with_a_run_that_is_killed(config, tmp_path, on_ranks):
    config = dataclasses.replace(config, valid=(), track=(), workers=1)
    assert on_ranks(1, killed_in_step, config, tmp_path / "pid") == [None]
    group, end = int((tmp_path / "pid").read_text()), time.monotonic() + 1800
    while not gone(group) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone(group)


def claiming(rank, folder):
    with claimed(folder, 0.2):
        return "claimed"


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path, on_ranks):
    folder = tmp_path / "new" / "run"
    with claimed(folder):
        [(result, error)] = on_ranks(1, claiming, folder)
        assert result is None
        assert error.startswith(f"ConfigError: {folder}: another process ({os.getpid()} on ")
    assert on_ranks(1, claiming, folder) == [("claimed", "")]
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"file/run: cannot write there \(Not a directory\)"),
        claimed(tmp_path / "file" / "run"),
    ):
        pass
