"""A service on a real socket with a small random model, without external files."""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

import torch
import uvicorn

from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig, WhisperFeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.models.protocol import AnyModel
from canter.models.whisper import WhisperEncoderConfig
from canter.serving.app import create_app
from canter.serving.config import ServiceConfig
from canter.serving.model import ModelSource, ServedModel
from canter.serving.server import bind, make_server
from canter.serving.service import Service
from canter.text import WhisperTokenizer, train_tokenizer

PATIENCE = 1800.0  # seconds until a test that hangs is given up; nothing that is tested depends on it
BOUNDARY = "x-canter-boundary"
SEED = 31  # of weights with which greedy texts differ from clip to clip
SENTENCES = ["one two three", "four five six seven", "eight nine ten", "three one two", "the end of it all"]


def small_model(end_bias: float = 1.0) -> SpeechModel:
    """Return a random Canary in English and German, whose text differs with the audio.

    A low ``end_bias`` makes it decode up to the limit.
    """
    tokenizer = train_tokenizer(SENTENCES * 20, languages=["en", "de"], vocab_size=40)
    torch.manual_seed(SEED)
    encoder = FastConformerConfig(layers=2, width=32, heads=2, feedforward=64, subsampling_channels=8, mels=16)
    decoder = DecoderConfig(layers=2, width=48, heads=4, feedforward=96, vocabulary=tokenizer.vocab_size, positions=512)
    model = SpeechModel(ModelConfig(FeatureConfig(mels=16), encoder, decoder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        for layer in model.decoder.layers:
            layer.cross_attention.query.weight *= 8
            layer.cross_attention.value.weight *= 4
            layer.self_attention.query.weight *= 8
            layer.self_attention.value.weight *= 4
        model.decoder.head_bias[[tokenizer.special_id(token) for token in tokenizer.special]] = -1000.0
        model.decoder.head_bias[tokenizer.end] = end_bias
    model.tokenizer = tokenizer
    return model


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Return (S,) modulated noise at 16 kHz."""
    random = np.random.default_rng(seed)
    rise = np.sin(np.arange(round(16000 * seconds)) / random.uniform(300, 3000)) + 1.1
    return (random.normal(size=len(rise)) * rise * 0.1).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16000, subtype: str = "PCM_16") -> bytes:
    """Return the samples (S,) or (S, channels) as a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def form(file: bytes, name: str = "a.wav", **fields: str) -> bytes:
    """Return a multipart body."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in {"language": "en", **fields}.items()
    ]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
    parts += [head.encode(), b"Content-Type: audio/wav\r\n\r\n", file, f"\r\n--{BOUNDARY}--\r\n".encode()]
    return b"".join(parts)


@dataclass
class Running:
    """A running service."""

    service: Service
    port: int
    server: uvicorn.Server

    @property
    def model(self) -> ServedModel:
        """The first model, which is loaded."""
        served = self.service.models.first.served
        assert served is not None
        return served

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def quiet(self, seconds: float = PATIENCE) -> bool:
        """Wait until no request is inside, and return whether that happened."""
        service = self.service
        return came_about(lambda: not (service.requests or service.waiting or service.inside), seconds)


def connection(live: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE)


def head(length: int | str, extra: str = "") -> bytes:
    return (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n{extra}"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        + (f"Content-Length: {length}\r\n\r\n" if length else "Transfer-Encoding: chunked\r\n\r\n")
    ).encode()


def came_about(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Wait until ``condition`` holds, and return whether it does.

    Attempts are counted instead of time: a machine that stalls does not give the other thread that time.
    """
    for _ in range(round(seconds / 0.01)):
        if condition():
            return True
        time.sleep(0.01)
    return condition()


@contextlib.contextmanager
def held(engine: Engine, after: int = 0) -> Iterator[Callable[[], None]]:
    """Stop the engine after ``after`` more decoder steps, until the yielded function is called or the block ends.

    Requests stay inside for as long as the test needs them there, however fast or busy the machine is.
    """
    go_on, advance, until = threading.Event(), engine._advance, engine.counters.steps + after

    def held_advance(*arguments: Any) -> Any:
        if engine.counters.steps >= until:
            go_on.wait(PATIENCE)
        return advance(*arguments)

    engine._advance = held_advance
    try:
        yield go_on.set
    finally:
        go_on.set()
        engine._advance = advance


@contextlib.contextmanager
def running(*models: AnyModel | ModelSource, rows: int = 16, frames: int = 1024, **settings: Any) -> Iterator[Running]:
    """Serve ``models`` on a free port while the block runs; one that is no source has the names of a single one."""
    config = replace(ServiceConfig(max_seconds=300.0), **settings)
    engine = EngineConfig(rows=rows, frames=frames)
    sources = [
        one if isinstance(one, ModelSource) else ModelSource(("small", "whisper-1"), one, engine) for one in models
    ]
    service = Service(sources, config)
    listening = bind("127.0.0.1", 0)
    server = make_server(create_app(service), config.upload_timeout, config.drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        came_about(lambda: server.started or not thread.is_alive())
        assert server.started, f"the service did not come up; its thread {'waits' if thread.is_alive() else 'ended'}"
        yield Running(service, listening.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def model() -> SpeechModel:
    return small_model()


@pytest.fixture(scope="session")
def whisper(whisper_bytes) -> SpeechModel:
    """A random Whisper with tokens for bytes and two languages."""
    tokenizer = WhisperTokenizer(whisper_bytes("en", "es").to_str())
    torch.manual_seed(0)
    encoder = WhisperEncoderConfig(layers=1, width=16, heads=2, feedforward=32, mels=16)
    decoder = DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=tokenizer.vocab_size, positions=128)
    features = WhisperFeatureConfig(mels=16, pad_seconds=0.0)
    model = SpeechModel(ModelConfig(features, encoder, decoder)).eval()
    model.generation = {"no_timestamps_token_id": tokenizer.special_id("<|notimestamps|>")}
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="session")
def endless() -> SpeechModel:
    """A model that decodes a token for each frame of 80 ms, and ten more."""
    return small_model(end_bias=-1000.0)


@pytest.fixture(scope="session")
def live(model) -> Iterator[Running]:
    with running(model) as found:
        yield found
