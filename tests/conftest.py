"""Settings of all tests."""

import contextlib
import gc
import hashlib
import logging
import math
import os
import random
import signal
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


def pytest_configure() -> None:
    """Let commands that tests start receive Ctrl-C, which shells disable for background processes."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exclude objects of the imports from garbage collection, which a training run triggers at its start."""
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
    """Seed random numbers, so that no test depends on the tests before it."""
    seed_everything()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed_everything()


@contextlib.contextmanager
def port_of_our_own() -> Iterator[int]:
    """A free TCP port that no other process gets: it is bound here without listening, so that torch, which sets
    SO_REUSEADDR, can listen on it."""
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
    """The folder of real speech and models, which is not part of the project."""
    folder = os.environ.get("CANTER_SHARED")
    if not folder:
        pytest.skip("CANTER_SHARED does not name the folder of shared fixtures")
    return Path(folder)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3-compatible server, as a process would find it on another machine."""
    pytest.importorskip("s3fs", reason="the extra 's3' is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed (extra 'dev')")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints every request
    found = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    found.start()
    yield "http://{}:{}".format(*found.get_host_and_port())
    found.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of an empty bucket, ``s3://...``, which credentials in the environment open."""
    import fsspec

    place = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "word"}
    for name, value in (place | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{hashlib.blake2b(request.node.nodeid.encode(), digest_size=6).hexdigest()}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def within_200_mib() -> Iterator[None]:
    """Limit the address space of this process to 200 MiB more than it has while the test runs."""
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
    """Switch TF32 off, to which convolutions on a GPU round by default."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)


@pytest.fixture(scope="session")
def whisper_bytes():
    """``whisper_bytes(*languages)``: bytes and the special tokens of a Whisper of these languages, in its order."""

    def make(*languages: str) -> tokenizers.Tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        names = ("endoftext", "startoftranscript", *languages, "translate", "transcribe", "startofprev", "nospeech",
                 "notimestamps")  # fmt: skip
        backend.add_special_tokens([f"<|{name}|>" for name in names])
        return backend

    return make


@pytest.fixture(scope="session")
def polyglot(whisper_bytes):
    """A Whisper built by hand that writes "e" for a low tone, which is English, and "s" for a high one, Spanish."""
    import torch

    from canter.models.decoder import DecoderConfig
    from canter.models.features import WhisperFeatureConfig
    from canter.models.model import ModelConfig, SpeechModel
    from canter.models.whisper import WhisperEncoderConfig
    from canter.text import WhisperTokenizer

    tokenizer = WhisperTokenizer(whisper_bytes("en", "es", "fr").to_str())
    config = ModelConfig(
        WhisperFeatureConfig(mels=16),
        WhisperEncoderConfig(layers=1, width=16, heads=2, feedforward=16, mels=16),
        DecoderConfig(layers=1, width=16, heads=2, feedforward=16, vocabulary=tokenizer.vocab_size, positions=20),
    )
    model = SpeechModel(config).eval()
    ids = {name: tokenizer.special_id(f"<|{name}|>") for name in ("en", "es", "fr")}
    with torch.no_grad():
        for tensor in (*model.parameters(), model.encoder.positions, model.decoder.positions):
            tensor.zero_()
        low = torch.tensor([1.0] * 8 + [-1.0] * 8)
        for channel, sign in enumerate((1, -1)):  # how much more there is of low tones, and of high ones
            model.encoder.conv1.weight[channel, :, 1] = sign * low / 8
            model.encoder.conv2.weight[channel, channel, 1] = 1.0
        model.encoder.norm.weight.fill_(1.0)
        model.decoder.norm.weight.fill_(1.0)
        cross = model.decoder.layers[0].cross_attention
        model.decoder.layers[0].norm_cross.weight.fill_(1.0)
        for linear in (cross.value, cross.out):  # the mean over the frames, whatever the prompt says
            linear.weight.copy_(torch.eye(16))
        (e,), (s,) = tokenizer.encode("e"), tokenizer.encode("s")
        for channel, tokens in enumerate(((ids["en"], e), (ids["es"], s))):
            model.decoder.embedding.weight[list(tokens), channel] = 2.0
    model.generation = {
        "no_timestamps_token_id": tokenizer.special_id("<|notimestamps|>"),
        "decoder_start_token_id": tokenizer.special_id("<|startoftranscript|>"),
        "suppress_tokens": [*ids.values()],
    }
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="session")
def spoken_tones():
    """``spoken_tones("ees", pause=...)``: (S,) words of a second in that order at 16 kHz.

    A low tone is "e", a high tone "s", noise "?", and a second of silence " ".
    """

    def make(words: str, pause: float = 0.3) -> numpy.ndarray:
        time = numpy.arange(16000) / 16000
        noise = numpy.random.default_rng(0).normal(size=16000)
        sounds = {"e": numpy.sin(600 * numpy.pi * time), "s": numpy.sin(10000 * numpy.pi * time), "?": noise}
        parts = [numpy.r_[0.2 * sounds.get(word, 0 * time), numpy.zeros(round(16000 * pause))] for word in words]
        return numpy.concatenate(parts).astype(numpy.float32)

    return make


@pytest.fixture
def metrics() -> list[dict]:
    """Return made-up metrics of a run: 60 train rows, and a valid row every 20 steps."""
    rows: list[dict] = []
    for step in range(1, 61):
        batch = 1 + step % 7
        row = {"kind": "train", "step": step, "epoch": 0, "time": 1e9 + step, "learning_rate": 1e-3}
        row |= {"loss": 5 * math.exp(-step / 30), "loss_ctc": 1.0, "loss_attention": 2.0}
        row |= {"seconds": 0.5, "data_wait_seconds": 0.05, "audio_seconds": 20.0, "padding": 0.2}
        row |= {"utterances": batch, "batch": batch, "frames_max": 200 // batch, "tokens_max": 60 // batch}
        rows.append(row)
        if step % 20 == 0:
            examples = [{"text": "the cat sat", "pred_text": "the <b>bat</b> sat", "lang": "en"}]
            row = {"kind": "valid", "step": step, "time": 1e9 + step, "loss": 1.0, "examples": examples}
            rows.append(row | {"wer": 1 / step, "cer": 0.5 / step, "rtfx": 50.0})
    return rows
