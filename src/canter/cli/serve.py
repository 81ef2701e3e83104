"""Serve models over OpenAI's transcription API, with a page to try it; by default for this machine only."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import tyro

from canter.errors import ConfigError
from canter.extras import needed_by
from canter.serving.config import ServiceConfig, ServiceOptions

if TYPE_CHECKING:
    from canter.serving.model import ModelSource
    from canter.serving.pool import ModelPool

KEYS = "CANTER_API_KEYS"
USUAL_NAME = "whisper-1"  # that OpenAI's clients ask for
MEMORY_FRACTION = 0.9  # of the device's memory for models; the rest is for activations
SPINS = "1000"  # tens of microseconds at most; a step of the decoder takes tens of milliseconds


@dataclass(frozen=True)
class Options(ServiceOptions):
    models: tyro.conf.Positional[tuple[str, ...]]
    """Models, the first of which answers requests that name none; each a run folder (its best checkpoint), a model
    folder, a .nemo file, or a Hugging Face hub name such as openai/whisper-tiny.en. NAME=MODEL sets the name by which
    clients ask for it (default: the name of its folder)."""
    adapter: tuple[str, ...] = ()
    """LoRA adapters, each a folder of Canter or peft, or a run (default: none). FOLDER merges one into the model; each
    NAME=FOLDER is kept apart, and requests ask for it by NAME as their model, beside others in the same batch. Of
    several models it changes the one that it was trained on; NAME@MODEL=FOLDER names another."""
    memory: str | None = None
    """Memory of all loaded models, with the decoder's caches, such as 24GiB, 24GB or 24 (GB); models that do not fit
    are loaded when a request asks for them, in place of those used longest ago (default: 90 % of a GPU's free memory or
    of the machine's memory; one model has no limit)."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of this machine."""
    port: int = 8000
    """Port to listen on; 0 selects any free one."""
    name: tuple[str, ...] = ()
    """Names by which clients may ask for the only model; the first is shown (default: the name of its folder, its hub
    name, and whisper-1)."""
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
    draft: str = "auto"
    """Source of drafts for several tokens a decoder step, as in `canter transcribe`: `ctc`, `off`, `auto`, or a smaller
    model with the same tokenizer."""


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
    from canter.planning.budget import parse_memory
    from canter.runtime import LARGEST_THRESHOLD, choose_device, device_memory, map_large_blocks, raise_file_limit
    from canter.serving.app import create_app
    from canter.serving.server import bind, host_names, is_loopback, make_server
    from canter.serving.service import Service

    if options.max_repeats < 0:
        raise ConfigError(f"--max-repeats {options.max_repeats}: give 0 (no limit) or more")
    keys = read_keys(options.api_keys)
    memory = parse_memory(options.memory, "--memory") if options.memory else None
    local = is_loopback(options.host)
    sources = model_sources(options)
    if memory is None and len(sources) > 1:
        memory = int(MEMORY_FRACTION * device_memory(choose_device(options.device)))
    config = ServiceConfig(
        **{field.name: getattr(options, field.name) for field in fields(ServiceOptions)},
        memory_bytes=memory,
        keys=keys,
        hosts=host_names(options.host, options.allowed_hosts),
        origins=read_origins(options.allowed_origins),
    )
    raise_file_limit()  # a request takes three files, and the usual limit is 1,024
    listening = bind(options.host, options.port)
    try:
        if choose_device(options.device).type == "cpu":
            map_large_blocks(LARGEST_THRESHOLD)
        try:
            service = Service(sources, config)
        except KeyboardInterrupt:
            print("canter: interrupted while the model was loading", file=sys.stderr, flush=True)
            os._exit(130)  # the thread that loads it cannot be stopped, and it may take minutes
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{port}/"
        names = ", ".join(source.name for source in sources)
        print(f"{names} on {address} (API: /v1, Ctrl-C ends it)", file=sys.stderr, flush=True)
        if len(sources) > 1:
            print(f"canter: {loaded_models(service.models)}", file=sys.stderr, flush=True)
        if not local and not keys:
            print("canter: any client may use this address; --api-keys FILE demands a key", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            make_server(create_app(service), options.upload_timeout, options.drain_seconds).run(sockets=[listening])
    finally:
        listening.close()
    return 0


def loaded_models(models: "ModelPool") -> str:
    """Return a line that says which models are loaded, what they take, and which are loaded on demand."""
    from canter.runtime import gib

    taken = sum(one.bytes for one in models.offered if one.loaded)
    loaded, later = (
        ", ".join(f"{one.name} ({gib(one.bytes)})" for one in models.offered if one.loaded == which)
        for which in (True, False)
    )
    text = f"{gib(taken)} of {gib(models.budget)} of memory are for {loaded}"
    return f"{text}; loaded on demand: {later}" if later else text


def model_sources(options: Options) -> "list[ModelSource]":
    """Return what is to be loaded. Raises ConfigError and CheckpointError for models, names and adapters that cannot be
    found or do not belong together."""
    from canter.inference.engine.requests import EngineConfig
    from canter.models.hub import checkpoint_of, is_hub_name
    from canter.serving.model import ModelSource

    if not options.models:
        raise ConfigError("name at least one model, such as openai/whisper-tiny.en")
    if options.name and len(options.models) > 1:
        raise ConfigError("--name is for one model; give several models names as in NAME=MODEL")
    merged, apart = read_adapters(options.adapter)
    if merged is not None and len(options.models) > 1:
        raise ConfigError(
            f"--adapter {merged}: several models are served; name it as in --adapter NAME={merged}, or merge it first "
            "with 'canter convert'"
        )
    device = options.device
    found: list[tuple[str, tuple[str, ...]]] = []
    for given in options.models:
        name, is_named, model = given.partition("=")
        if not is_named or Path(given).exists():
            model = given
            short = Path(model).resolve().name
            names = (short, model) if is_hub_name(model) else (short,)
        else:
            names = (name,)
        found.append((model, names))
    if options.name:
        found = [(found[0][0], options.name)]
    elif not any(USUAL_NAME in names for _, names in found):
        found[0] = (found[0][0], (*found[0][1], USUAL_NAME))
    checkpoints = [checkpoint_of(model) for model, _ in found]
    adapters = adapters_of_models(apart, found, checkpoints)
    config = EngineConfig(rows=options.batch_size, max_repeats=options.max_repeats)
    return [
        ModelSource(names, checkpoint, config, device, options.precision, merged, options.draft, mine)
        for (_, names), checkpoint, mine in zip(found, checkpoints, adapters)
    ]


def adapters_of_models(
    apart: Mapping[str, Path], models: Sequence[tuple[str, Sequence[str]]], checkpoints: Sequence[Path]
) -> list[dict[str, Path]]:
    """Return the adapters by name of each model.

    models: what the user gave, and the names of each. An adapter belongs to the model that ``NAME@MODEL`` names, else
    to the one that it says it was trained on: the same path or hub name, or the only one whose last part is the same.
    Raises ConfigError for an adapter that fits none or several.
    """
    found: list[dict[str, Path]] = [{} for _ in models]
    for given, folder in apart.items():
        name, _, wanted = given.rpartition("@")
        fits = [number for number, (_, names) in enumerate(models) if name and wanted in names]
        base = None
        if not fits:
            name, fits = given, [0] if len(models) == 1 else []
        if not fits:
            base = base_of_adapter(folder)
            fits = _trained_on(base, models, checkpoints)
        if len(fits) != 1:
            known = ", ".join(names[0] for _, names in models)
            raise ConfigError(
                f"--adapter {given}={folder}: it was trained on {base or 'a model that it does not name'}, which is "
                f"{'several' if fits else 'none'} of the models here; say which it changes as in "
                f"{name}@MODEL={folder}, where MODEL is one of {known}"
            )
        if name in found[fits[0]]:
            raise ConfigError(f"--adapter {given}={folder}: {name!r} names another adapter of that model too")
        found[fits[0]][name] = folder
    return found


def base_of_adapter(folder: Path) -> str | None:
    """Return the path or hub name of the model that an adapter of Canter or peft says it was trained on."""
    from canter.models.formats.files import read_json
    from canter.models.formats.peft import base_of
    from canter.models.hub import ADAPTER, adapter_folder

    folder = adapter_folder(folder)
    base = base_of(folder) or read_json(folder / ADAPTER).get("base_model_name_or_path")
    return base if isinstance(base, str) else None


def _trained_on(
    base: str | None, models: Sequence[tuple[str, Sequence[str]]], checkpoints: Sequence[Path]
) -> list[int]:
    if not base:
        return []
    place = Path(base).resolve()
    same = [
        number
        for number, (model, _) in enumerate(models)
        if base == model or place in (Path(model).resolve(), checkpoints[number].resolve())
    ]
    return same or [number for number, (model, _) in enumerate(models) if Path(model).name == Path(base).name]


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
