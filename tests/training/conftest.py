import multiprocessing
import multiprocessing.forkserver
import os
from contextlib import contextmanager

import pytest
import torch

from canter.demo.synthesis import synthesise
from canter.events import Events
from canter.planning.budget import Budget
from canter.training.config import LossConfig, ModelShape, TrainConfig


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """A little spoken corpus."""
    return synthesise(tmp_path_factory.mktemp("spoken"), utterances=40, test_utterances=6, workers=1)


def a_config(spoken, folder):
    """A run of eight small steps, with a given budget: a measured one differs from time to time."""
    Budget.from_batch_seconds(60.0).save(folder / "budget.json")
    return TrainConfig(
        manifest=(spoken.train_manifest,),
        valid=(spoken.test_manifest,),
        output=folder / "run",
        vocab_size=100,
        budget=folder / "budget.json",
        steps=8,
        batch_seconds=12.0,
        workers=0,
        threads=1,
        precision="float32",
        valid_every=4,
        valid_utterances=3,
        model=ModelShape(encoder_layers=1, decoder_layers=1, width=32, heads=2, subsampling_channels=8, mels=40),
        loss=LossConfig(ctc_warmup=0.25),
    )


@pytest.fixture
def config(spoken, tmp_path):
    """A run of a test of its own."""
    return a_config(spoken, tmp_path)


class Messages(Events):
    """Listener that keeps the messages of a run."""

    def __init__(self, said):
        self.said = said

    def message(self, text):
        self.said.append(text)


class Reports(Events):
    """Listener that hands the report of each step to a function."""

    def __init__(self, take):
        self.step = take


def stopping_after(step, said=None):
    """Return a listener that raises an error after ``step``, as if the process had fallen over, and keeps messages."""

    class Unplugged(Messages):
        def step(self, report):
            if report.step == step:
                raise RuntimeError(f"pulled the plug after step {step}")

    return Unplugged([] if said is None else said)


@contextmanager
def memory_cap(bytes_kept):
    """Run out of memory if autograd keeps more than this number of bytes for a backward pass, as on a full device."""
    kept = [0, 0]  # now, at most

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # itself it may hold the graph that holds it
            kept[0] += tensor.nbytes
            kept[1] = max(kept)
            if kept[0] > bytes_kept:
                raise torch.OutOfMemoryError("out of memory (the test's cap)")

        def __del__(self):
            kept[0] -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield kept


def as_rank(rank, ranks, port, answers, work, *arguments):
    """Runs ``work`` as torchrun would start it, and answers with what it returned or said."""
    server = multiprocessing.forkserver._forkserver  # of the process that this one was forked from: not ours to use
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        answers.put((rank, work(rank, *arguments), ""))
    except BaseException as error:
        answers.put((rank, None, f"{type(error).__name__}: {error}"))


@pytest.fixture
def on_ranks(free_port):
    """``on_ranks(ranks, work, *arguments)``: (result, error) of ``work(rank, *arguments)`` on each of ``ranks``
    processes.

    A killed process gives None.
    """
    context = multiprocessing.get_context("fork")  # all is imported here: a rank starts at once

    def run(ranks, work, *arguments):
        with free_port() as port:
            return meet(port, ranks, work, arguments)

    def meet(port, ranks, work, arguments):
        answers = context.Queue()
        processes = [
            context.Process(target=as_rank, args=(rank, ranks, port, answers, work, *arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(1800)
            assert process.exitcode is not None, "a rank hangs"
        found = [None] * ranks
        while not answers.empty():
            rank, result, error = answers.get()
            found[rank] = (result, error)
        return found

    return run
