"""A run on a GPU: what it writes, how it resumes, what it does when memory runs out."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from canter.models.batch import Batch
from canter.training.config import LossConfig
from canter.training.feed.data import Address, Loaded
from canter.training.recipe import run_training

from .step.test_recovery import losses, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture
def quiet(config):
    return dataclasses.replace(config, valid=(), track=(), loss=LossConfig(ctc_warmup=0.0), device="cuda")


@pytest.mark.usefixtures("without_tf32")
def test_a_run_takes_the_steps_of_one_on_a_cpu(quiet, tmp_path):
    run_training(quiet)
    other = dataclasses.replace(quiet, device="cpu", output=tmp_path / "cpu")
    run_training(other)
    assert [row["utterances"] for row in rows(quiet, "train")] == [row["utterances"] for row in rows(other, "train")]
    assert losses(quiet)[:3] == pytest.approx(losses(other)[:3], rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_stopped_run_resumes(quiet, tmp_path, precision):
    # a rate that does not depend on how many steps are asked for
    optimizer = dataclasses.replace(quiet.optimizer, schedule="constant", warmup=1.0)
    whole = dataclasses.replace(quiet, precision=precision, workers=1, optimizer=optimizer)
    run_training(whole)
    parts = dataclasses.replace(whole, output=tmp_path / "parts", allow_changes=True)
    for stop in (3, 8):
        run_training(dataclasses.replace(parts, steps=stop))
    logs = [(one.output / "utterances.jsonl").read_text() for one in (whole, parts)]
    assert logs[0] == logs[1]
    assert losses(parts) == pytest.approx(losses(whole), rel=0.02)
    states = [load_file(one.output / "checkpoints/step-000008/model.safetensors") for one in (whole, parts)]
    assert states[0].keys() == states[1].keys()


def test_what_does_not_fit_is_cut_to_the_same_losses(quiet, tmp_path):
    """The allocator is kept to less than the micro-batches of the budget take."""
    model = dataclasses.replace(quiet.model, subsampling_channels=64, mels=80)
    short = dataclasses.replace(quiet, steps=4, batch_seconds=60.0, model=model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_training(short)
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    capped = dataclasses.replace(short, output=tmp_path / "capped")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.7 * peak) / total)
    try:
        run_training(capped)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    events = rows(capped, "event")
    assert events
    assert {event["what"] for event in events} == {"out of memory"}
    assert losses(capped) == pytest.approx(losses(short), rel=1e-2)


def test_what_workers_load_is_pinned():
    ones = torch.ones(2, dtype=torch.long)
    batch = Batch(torch.zeros(2, 9), 9 * ones, torch.ones(2, 4).long(), 4 * ones, ones, ones[:, None], ones, ones)
    loaded = Loaded(Address(0, 0, True, np.arange(2)), batch, []).pin_memory()
    assert loaded.batch.audio.is_pinned()
    assert loaded.batch.tokens.is_pinned()
    assert Loaded(loaded.address, None, []).pin_memory().batch is None
