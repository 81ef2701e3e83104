"""Serve a model over OpenAI's transcription API, with a page to try it; by default for this machine only."""

import contextlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import tyro

from canter.errors import ConfigError
from canter.extras import needed_by
from canter.serving.config import ServiceConfig, ServiceOptions

if TYPE_CHECKING:
    from canter.inference.engine.engine import Engine

KEYS = "CANTER_API_KEYS"
SPINS = "1000"  # tens of microseconds at most; a step of the decoder takes tens of milliseconds


@dataclass(frozen=True)
class Options(ServiceOptions):
    model: tyro.conf.Positional[Path]
    """A run folder (its best checkpoint), a model folder, a .nemo file, or a Hugging Face hub name such as
    openai/whisper-tiny.en."""
    adapter: tuple[str, ...] = ()
    """LoRA adapters, each a folder of Canter or peft, or a run (default: none). FOLDER merges one into the model; each
    NAME=FOLDER is kept apart, and requests ask for it by NAME as their model, beside others in the same batch."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of this machine."""
    port: int = 8000
    """Port to listen on; 0 selects any free one."""
    name: tuple[str, ...] = ()
    """Names by which clients may ask for the model; the first is shown (default: the name of its folder, and
    whisper-1)."""
    api_keys: Path | None = None
    """File with one API key a line; every request must then carry one of them. The variable CANTER_API_KEYS, with keys
    separated by commas, does the same."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names by which clients may address the service (the Host header), such as the name of a proxy or a
    container; `*` allows any. Requests under other names are refused, because they may come from pages of other sites
    (DNS rebinding)."""
    allowed_origins: tuple[str, ...] = ()
    """Sites whose pages may call the service from a browser (CORS), such as https://example.org; `*` allows any
    (default: only its own page)."""
    max_repeats: int = 3
    """Number of repeats to keep if the model repeats the same words for longer than the audio lasts; 0 disables this.
    Whisper models have their own rule instead."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` selects a GPU if there is one."""
    precision: Literal["float32", "bf16", "int8"] = "float32"
    """bf16 is faster on a GPU, int8 on a CPU; transcripts may then depend on requests decoded at the same time."""
    batch_size: int | None = None
    """Maximum number of audio chunks decoded together (default: 8 to 128 by model and device)."""


def run(options: Options) -> int:
    with needed_by("canter serve"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401

    # Time that OpenMP's threads spin before they sleep, which is read when torch is imported. With its default of 3 ms
    # they keep cores from other threads, such as the readers of audio, and from other processes.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from canter.models.hub import checkpoint_of
    from canter.runtime import LARGEST_THRESHOLD, choose_device, map_large_blocks, raise_file_limit
    from canter.serving.app import create_app
    from canter.serving.server import bind, host_names, is_loopback, make_server
    from canter.serving.service import Service

    if options.max_repeats < 0:
        raise ConfigError(f"--max-repeats {options.max_repeats}: give 0 (no limit) or more")
    keys = read_keys(options.api_keys)
    merged, adapters = read_adapters(options.adapter)
    local = is_loopback(options.host)
    checkpoint = checkpoint_of(options.model)
    config = ServiceConfig(
        **{field.name: getattr(options, field.name) for field in fields(ServiceOptions)},
        names=options.name or (options.model.resolve().name, "whisper-1"),
        adapters={name: number for number, name in enumerate(adapters, 1)},
        keys=keys,
        hosts=host_names(options.host, options.allowed_hosts),
        origins=read_origins(options.allowed_origins),
    )
    raise_file_limit()  # a request takes three files, and the usual limit is 1,024
    listening = bind(options.host, options.port)
    try:
        device = str(choose_device(options.device))
        if device == "cpu":
            map_large_blocks(LARGEST_THRESHOLD)
        service = Service(load_in_thread(options, checkpoint, device, merged, adapters), config)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{port}/"
        print(f"{config.names[0]} on {address} (API: /v1, Ctrl-C ends it)", file=sys.stderr, flush=True)
        if not local and not keys:
            print("canter: any client may use this address; --api-keys FILE demands a key", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            make_server(create_app(service), options.upload_timeout, options.drain_seconds).run(sockets=[listening])
    finally:
        listening.close()
    return 0


def read_adapters(given: Sequence[str]) -> tuple[Path | None, dict[str, Path]]:
    """Return the adapter to merge, and those to keep apart by name. Raise ConfigError for a mixture."""
    apart = {name: Path(folder) for name, found, folder in (one.partition("=") for one in given) if found}
    if apart and len(apart) == len(given) and all(apart):
        return None, apart
    if len(given) > 1 or apart:
        raise ConfigError(
            f"--adapter {' '.join(given)}: name each of several adapters once, as in --adapter medical=FOLDER "
            "legal=FOLDER"
        )
    return (Path(given[0]) if given else None), {}


def read_origins(given: Sequence[str]) -> frozenset[str]:
    """Return origins in the form in which browsers send them. Raise ConfigError for what is none."""
    for one in given:
        parts = urlsplit(one)
        if one != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/")):
            raise ConfigError(f"--allowed-origins {one}: give scheme, host and port only, such as https://example.org")
    return frozenset(one.rstrip("/").lower() for one in given)


def load_in_thread(
    options: Options,
    checkpoint: Path,
    device: str,
    merged: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> "Engine":
    """Return the engine, loaded in a thread that ends, so that its OpenMP threads end too.

    OpenMP keeps the threads of every thread that computes. While there are more of them than cores, all sleep almost
    at once (100 spins) whenever they wait for each other, which is several times a layer.
    """
    from canter.inference.engine.requests import EngineConfig
    from canter.inference.loading import load_engine
    from canter.models.protocol import check_support

    config = EngineConfig(rows=options.batch_size, max_repeats=options.max_repeats)
    loaded: Future[Engine] = Future()

    def load() -> None:
        try:
            engine = load_engine(
                checkpoint, config, device=device, precision=options.precision, adapter=merged, adapters=adapters
            )
            if options.max_repeats != Options.max_repeats:
                check_support(engine.model, {"--max-repeats": "repetition_guard"}, checkpoint)
            loaded.set_result(engine)
        except BaseException as error:
            loaded.set_exception(error)

    thread = threading.Thread(target=load, name="canter-loading", daemon=True)
    try:
        thread.start()
        engine = loaded.result()
    except KeyboardInterrupt:
        print("canter: interrupted while the model was loading", file=sys.stderr, flush=True)
        os._exit(130)  # the thread cannot be stopped, and it may take minutes
    thread.join()
    return engine


def read_keys(file: Path | None) -> frozenset[str]:
    """Return the API keys of a file and of the environment. Raise ConfigError for a file without any."""
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
