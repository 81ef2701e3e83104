"""Several ranks, as real processes over gloo: the same steps on any number of ranks, and no hanging."""

import dataclasses
import json
import os
import signal
import socket
from datetime import timedelta

import pytest

from canter.errors import CanterError, ConfigError
from canter.ranks import _place, process_group
from canter.training.config import OptimizerConfig
from canter.training.recipe import run_training
from canter.training.step import gradient

from ..conftest import memory_cap, stopping_after


def rows(config, name):
    return [json.loads(line) for line in (config.output / name).read_text().splitlines()]


def steps(config):
    """{step: (rows, loss)} of a run."""
    losses = {row["step"]: row["loss"] for row in rows(config, "metrics.jsonl") if row["kind"] == "train"}
    assert list(losses) == list(range(1, len(losses) + 1))
    return {row["step"]: (row["rows"], losses[row["step"]]) for row in rows(config, "utterances.jsonl")}


def assert_same_steps(ours, theirs):
    assert [step for step, _ in ours.values()] == [step for step, _ in theirs.values()]
    assert [loss for _, loss in ours.values()] == pytest.approx([loss for _, loss in theirs.values()], rel=2e-4)


def train_on(rank, config, stop=None):
    return run_training(config, *([stopping_after(stop)] if stop and rank == 0 else [])).progress.step


def killed_at_three(rank, config):
    """The last rank is killed in the middle of its third step."""
    compute = gradient.Gradient.compute

    def dying(self, loaded, counts, step, alone):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, loaded, counts, step, alone)

    gradient.Gradient.compute = dying
    return run_training(config).progress.step


def short_of_memory(rank, config, limit):
    """The last rank has less memory than the budget says."""
    if rank == 1:
        with memory_cap(limit):
            return run_training(config).progress.step
    return run_training(config).progress.step


@pytest.fixture
def shared(config):
    """Four micro-batches a step, two windows an epoch."""
    return dataclasses.replace(config, micro_batches_per_step=4, batching_window=20, save_every=2, valid=())


def test_any_number_of_ranks_and_workers_takes_the_same_steps(shared, tmp_path, on_ranks):
    run_training(shared)
    elastic = dataclasses.replace(shared, output=tmp_path / "elastic")
    for ranks, workers, stop in ((1, 0, 3), (2, 2, 5), (4, 0, 7), (1, 4, None)):
        answers = on_ranks(ranks, train_on, dataclasses.replace(elastic, workers=workers), stop)
        if stop is None:
            assert answers == [(8, "")]
        else:
            assert all(f"pulled the plug after step {stop}" in error for _, error in answers), answers
    assert_same_steps(steps(elastic), steps(shared))
    seen = [row for of_step, _ in list(steps(elastic).values())[:2] for some in of_step for row in some]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_packed_micro_batches_are_elastic(shared, tmp_path, on_ranks, parallel):
    shared = dataclasses.replace(shared, strategy="packed", optimizer=OptimizerConfig(name="adamw"), steps=4)
    run_training(shared)
    other = dataclasses.replace(shared, output=tmp_path / parallel, parallel=parallel)
    assert [result for result, _ in on_ranks(2, train_on, other, 3)] == [None, None]
    assert run_training(other).progress.step == 4
    assert_same_steps(steps(other), steps(shared))


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_state_may_be_sharded(shared, tmp_path, on_ranks, parallel):
    shared = dataclasses.replace(shared, optimizer=OptimizerConfig(name="adamw", ema=0.9), steps=4)
    run_training(shared)
    other = dataclasses.replace(shared, output=tmp_path / parallel, parallel=parallel)
    assert on_ranks(2, train_on, other, 3) == [
        (None, f"RuntimeError: {PLUG}"),
        (None, f"CanterError: rank 0 of 2 ended: {PLUG}"),
    ]
    assert on_ranks(2, train_on, other) == [(4, ""), (4, "")]
    assert_same_steps(steps(other), steps(shared))


# Python 3.12 warns of forking where threads are
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
PLUG = "pulled the plug after step 3"


def test_a_rank_without_work_takes_part(shared, tmp_path, on_ranks):
    one = dataclasses.replace(shared, micro_batches_per_step=1, steps=3)
    run_training(one)
    two = dataclasses.replace(one, output=tmp_path / "two")
    assert on_ranks(2, train_on, two) == [(3, ""), (3, "")]
    assert_same_steps(steps(two), steps(one))
    assert all(0 in map(round, [s * 1000 for s in row["rank_seconds"]]) for row in rows(two, "metrics.jsonl"))


def test_a_killed_rank_ends_the_others_with_a_message(shared, on_ranks):
    first, second = on_ranks(2, killed_at_three, shared)
    assert second is None
    assert first[1].startswith("CanterError: rank 0 of 2: another rank was lost")
    assert "resumes from what was saved last" in first[1]
    assert on_ranks(2, train_on, shared) == [(8, ""), (8, "")]


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_a_rank_out_of_memory_cuts_and_none_hangs(shared, tmp_path, on_ranks, parallel):
    shared = dataclasses.replace(shared, optimizer=OptimizerConfig(name="adamw"), steps=3, batching_window=50)
    run_training(shared)
    short = dataclasses.replace(shared, output=tmp_path / "short", parallel=parallel)
    assert on_ranks(2, short_of_memory, short, 4_000_000) == [(3, ""), (3, "")]
    cuts = [row for row in rows(short, "metrics.jsonl") if row["kind"] == "event"]
    assert cuts
    assert {row["what"] for row in cuts} == {"out of memory"}
    assert_same_steps(steps(short), steps(shared))


def test_ranks_that_do_not_meet_say_where(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        place = {
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("canter.ranks.MEETING", timedelta(seconds=1))
        says = pytest.raises(CanterError, match=rf"rank 1 of 2 did not meet the others at 127.0.0.1:{port}")
        with says, process_group("cpu"):
            pass


def train_in_separate_folders(rank, config):
    return run_training(dataclasses.replace(config, output=config.output / str(rank))).progress.step


def test_a_run_folder_that_machines_do_not_share_is_refused(shared, on_ranks):
    for _, error in on_ranks(2, train_in_separate_folders, shared):
        assert "does not hold the run that rank 0 has begun; the run folder must be on a disk that all" in error


def meet_after_restarts(rank):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(3 * rank)
    with process_group("cpu") as ranks:
        return ranks.gather_objects(f"of rank {rank}")


def test_ranks_of_torchruns_with_other_numbers_of_restarts_meet(on_ranks):
    """Each torchrun counts its restarts by itself, and that of a node that comes back starts at 0."""
    assert on_ranks(2, meet_after_restarts) == [(["of rank 0", "of rank 1"], ""), ([], "")]


def test_the_only_rank_ends_with_torchrun(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr("canter.ranks.end_with_launcher", messages.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as ranks:
        assert (ranks.size, messages) == (1, [])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with process_group("cpu") as ranks:
        assert ranks.size == 1
    assert messages == ["torchrun is gone; the same command resumes from what was saved last"]


def test_the_launcher_s_environment(monkeypatch):
    assert _place({}) is None
    assert _place({"WORLD_SIZE": "1", "RANK": "0"}) is None
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        _place({"WORLD_SIZE": "2", "RANK": "0"})
    slurm = {
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "node7,node9",
        "SLURM_JOB_ID": "77",
    }
    assert _place(slurm) == (2, 3, 1)
    assert (slurm["MASTER_ADDR"], slurm["MASTER_PORT"]) == ("node7", "20077")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
