"""An OpenAI-compatible transcription service, with a page to try it; bound to this machine unless told otherwise."""

import contextlib
import os
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from canter.errors import ConfigError
from canter.extras import needed_by

if TYPE_CHECKING:
    from canter.inference.engine.engine import Engine

KEYS = "CANTER_API_KEYS"
SPINS = "1000"  # tens of microseconds at most; a step of the decoder takes tens of milliseconds


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A run folder (its best checkpoint), a model folder, a .nemo file, or a Hugging Face hub name such as
    openai/whisper-tiny.en."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes any free one."""
    name: str | None = None
    """Model name for clients (default: the name of its folder)."""
    alias: tuple[str, ...] = ("whisper-1",)
    """Further model names that clients may use."""
    api_keys: Path | None = None
    """File with one API key a line; every request must then carry one of them. The variable CANTER_API_KEYS, with keys
    separated by commas, does the same."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names under which clients may address the service (the Host header), such as that of a proxy before it or
    of a container; `*` allows any. The names of this machine, the address that it listens on and `localhost` always
    are: what else comes is another site's page whose name leads here (DNS rebinding)."""
    lang: str | None = None
    """Language of requests that name none, as a code or in English (default: detected by a multilingual Whisper)."""
    vad: Literal["energy", "silero", "none"] = "energy"
    """Voice activity detector: silence of 2 s and more at the ends of a recording, and of 5 s in it, is left out, and
    long audio is cut in pauses. `silero` needs the extra `vad`; `none` keeps all and cuts overlapping windows."""
    max_repeats: int = 3
    """Number of repeats to keep where the model writes the same words for longer than the audio lasts; 0 is no limit.
    Nothing else is changed; a Whisper has its own rule."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU if there is one."""
    precision: Literal["float32", "bf16", "int8"] = "float32"
    """bf16 is faster on a GPU, int8 on a CPU; transcripts may then depend on who else asks."""
    batch_size: int | None = None
    """Maximum number of audio chunks decoded together (default: 8 to 128 by model and device)."""
    max_megabytes: float = 100.0
    """Maximum size of a request in MiB."""
    longest_seconds: float = 3600.0
    """Maximum length of a request's audio in seconds."""
    queue: int = 256
    """Maximum number of requests at once, waiting ones included; further ones get status 503."""
    queue_minutes: float = 120.0
    """Maximum minutes of audio at once, in all requests together."""
    timeout: float = 300.0
    """Maximum seconds a request may take once its body has arrived."""
    upload_timeout: float = 60.0
    """Maximum seconds that a request's body may take to arrive."""


def run(options: Options) -> int:
    with needed_by("canter serve"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401

    # How long OpenMP's threads look out for each other before they sleep, read when torch is imported. Its own 3 ms
    # keep a core from whoever else has something to do there, readers of audio among them, and double the service's
    # time where another process takes one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from canter.inference.transcribe import checkpoint_of
    from canter.runtime import LARGEST_THRESHOLD, choose_device, map_large_blocks, raise_file_limit
    from canter.serving.app import create_app
    from canter.serving.config import ServiceConfig
    from canter.serving.server import bind, host_names, is_loopback, make_server
    from canter.serving.service import Service

    if options.max_repeats < 0:
        raise ConfigError(f"--max-repeats {options.max_repeats}: 0, no limit, or more")
    keys = read_keys(options.api_keys)
    local = is_loopback(options.host)
    checkpoint = checkpoint_of(options.model)
    config = ServiceConfig(
        names=(options.name or options.model.resolve().name, *options.alias),
        keys=keys,
        hosts=host_names(options.host, options.allowed_hosts),
        lang=options.lang,
        vad=options.vad,
        max_bytes=int(options.max_megabytes * 2**20),
        longest_seconds=options.longest_seconds,
        queue=options.queue,
        queue_seconds=60 * options.queue_minutes,
        timeout=options.timeout,
        upload_timeout=options.upload_timeout,
    )
    raise_file_limit()  # a request takes three files, and the usual limit is 1,024
    listening = bind(options.host, options.port)
    try:
        device = str(choose_device(options.device))
        if device == "cpu":
            map_large_blocks(LARGEST_THRESHOLD)
        engine = load_engine(options, checkpoint, device)
        service = Service(engine, config)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            f"{config.names[0]} on http://{shown}:{port}/ (API: /v1, Ctrl-C ends it)",
            file=sys.stderr,
            flush=True,
        )
        if not local and not keys:
            print(
                "canter: everybody who reaches this address may use it; --api-keys FILE asks for a key",
                file=sys.stderr,
            )
        # Ctrl-C is how one ends it
        with contextlib.suppress(KeyboardInterrupt):
            make_server(create_app(service), options.upload_timeout).run(sockets=[listening])
    finally:
        listening.close()
    return 0


def load_engine(options: Options, checkpoint: Path, device: str) -> "Engine":
    """The engine, made in a thread that ends, and its OpenMP threads with it: those of a thread that computes stay for
    as long as it does, and while more of them live than there are cores, OpenMP has all of them sleep almost at once
    (100 looks) wherever they wait for each other, several times a layer."""
    from canter.inference.engine.engine import Engine
    from canter.inference.engine.int8 import load_in
    from canter.inference.engine.requests import EngineConfig

    loaded: Future[Engine] = Future()

    def load() -> None:
        try:
            model = load_in(options.precision, checkpoint, device)
            loaded.set_result(
                Engine(
                    model,
                    model.tokenizer.end,
                    EngineConfig(rows=options.batch_size, max_repeats=options.max_repeats),
                )
            )
        except BaseException as error:
            loaded.set_exception(error)

    aside = threading.Thread(target=load, name="canter-loading", daemon=True)
    try:
        aside.start()
        engine = loaded.result()
    except KeyboardInterrupt:
        print("canter: interrupted while the model was loading", file=sys.stderr, flush=True)
        os._exit(130)  # nothing can tell the thread to stop, and it may take minutes
    aside.join()
    return engine


def read_keys(file: Path | None) -> frozenset[str]:
    """The API keys of a file and of the environment. Raises ConfigError for a file without any."""
    keys = {key.strip() for key in os.environ.get(KEYS, "").split(",")}
    if file is not None:
        try:
            found = {line.strip() for line in file.read_text(encoding="utf-8").splitlines()}
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--api-keys {file} cannot be read: {reason}") from None
        if not any(found):
            raise ConfigError(f"--api-keys {file} holds no key; write one a line, or leave the option out")
        keys |= found
    return frozenset(keys - {""})
