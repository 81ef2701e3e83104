"""Settings of the service; those in `ServiceOptions` are options of ``canter serve``."""

from dataclasses import dataclass
from typing import Literal

from canter.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Language, voice activity detector and limits of the service."""

    language: str | None = None
    """Language of requests that name none, as a code or in English (default: detect it, with a multilingual
    Whisper)."""
    vad: Literal["energy", "silero", "none"] = "energy"
    """Voice activity detector. Silence of at least 2 s at the ends of a recording, and of 5 s inside, is left out, and
    long audio is split in pauses. `silero` needs the extra `vad`; `none` keeps all and splits into overlapping
    windows."""
    max_megabytes: float = 100.0
    """Maximum size of a request in MiB."""
    max_seconds: float = 3600.0
    """Maximum length of a request's audio in seconds."""
    max_requests: int = 256
    """Maximum number of requests at once, including waiting ones; further ones get status 503."""
    max_minutes: float = 120.0
    """Maximum minutes of audio at once, in all requests together (4 MB of disk each)."""
    timeout: float = 300.0
    """Maximum seconds from the end of a request's body to its answer."""
    upload_timeout: float = 60.0
    """Maximum seconds in which a request's header, and then its body, must arrive."""
    drain_seconds: float = 30.0
    """Maximum seconds in which requests inside are finished when the service is asked to end (SIGTERM, Ctrl-C); new
    ones are refused meanwhile, and a second signal ends it at once."""
    max_beam_size: int = 5
    """Maximum beam size that a request may ask for; 1 allows greedy search only."""

    @property
    def max_bytes(self) -> int:
        return int(self.max_megabytes * 2**20)


@dataclass(frozen=True, kw_only=True)
class ServiceConfig(ServiceOptions):
    """All settings of the service, with resolved keys, names of hosts and memory."""

    keys: frozenset[str] = frozenset()
    """API keys; a request must carry one of them. No key is needed if this is empty."""
    hosts: frozenset[str] | None = None
    """Names and addresses under which the service may be addressed, in lower case and without a port; `ANY_ADDRESS`
    among them allows every IP address. None allows any name."""
    origins: frozenset[str] = frozenset()
    """Origins, such as https://example.org, whose pages may call the service; `*` allows any."""
    memory_bytes: int | None = None
    """Memory that all loaded models together may take (see `ServedModel.bytes`); None: no limit."""
    readers: int = 2
    """Number of threads that decode audio."""

    def __post_init__(self):
        for name in (
            "max_megabytes",
            "max_seconds",
            "max_requests",
            "max_minutes",
            "timeout",
            "upload_timeout",
            "drain_seconds",
            "max_beam_size",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be more than 0")
