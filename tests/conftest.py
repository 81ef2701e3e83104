"""Settings of all tests."""

import contextlib
import gc
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import numpy
import pytest
import tokenizers
from hypothesis import HealthCheck, settings
from tokenizers import decoders, models, pre_tokenizers

# a busy machine is no failure: nothing here is timed
settings.register_profile("canter", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("canter")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="run the files, and the tests of each file, in a random order that the seed decides",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle files, then tests within each, so that what a file's tests share is still built once."""
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    files = [list(group) for _, group in groupby(items, key=lambda item: item.path)]
    chance = random.Random(seed)
    chance.shuffle(files)
    for file in files:
        chance.shuffle(file)
    items[:] = [item for file in files for item in file]


def pytest_collection_finish() -> None:
    """Keep what the imports made out of garbage collections, which a run of training asks for at its start."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def seed_everything() -> None:
    random.seed(0)
    numpy.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers of a test, and of what is built for it, do not depend on the tests before it."""
    seed_everything()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed_everything()


@contextlib.contextmanager
def port_of_our_own() -> Iterator[int]:
    """A TCP port that nobody else is given meanwhile: bound here and not listened on, so that whoever sets
    SO_REUSEADDR, as torch does, can listen there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture(scope="session")
def free_port() -> Callable[[], contextlib.AbstractContextManager[int]]:
    """``with free_port() as port: ...``, for processes that meet there."""
    return port_of_our_own


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real speech and models that are not part of the project."""
    folder = os.environ.get("CANTER_SHARED")
    if not folder:
        pytest.skip("CANTER_SHARED does not name the folder of shared fixtures")
    return Path(folder)


@pytest.fixture
def within_200_mib() -> Iterator[None]:
    """While the test runs, this process may take 200 MiB more of address space than it has."""
    resource = pytest.importorskip("resource")
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("this system does not tell how much memory a process has")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 200 * 2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def without_tf32(monkeypatch):
    """On a GPU convolutions round to TF32 unless told otherwise."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)


@pytest.fixture(scope="session")
def whisper_bytes():
    """``whisper_bytes(*languages)``: bytes and the special tokens of a Whisper of these languages, in its order."""

    def make(*languages: str) -> tokenizers.Tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(
            models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, [])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        names = ("endoftext", "startoftranscript", *languages, "translate", "transcribe", "startofprev", "nospeech",
                 "notimestamps")  # fmt: skip
        backend.add_special_tokens([f"<|{name}|>" for name in names])
        return backend

    return make
