"""The service's settings."""

from dataclasses import dataclass

from canter.errors import ConfigError


@dataclass(frozen=True)
class ServiceConfig:
    """What the service takes in, and how long it waits for it."""

    names: tuple[str, ...] = ("canter", "whisper-1")
    """What clients may call the model; the first is its name, the others stand for it."""
    keys: frozenset[str] = frozenset()
    """API keys; a request must have one of them. Empty: everybody may ask."""
    hosts: frozenset[str] | None = None
    """Names and addresses under which the service may be addressed, without a port, in lower case; with
    `ANY_ADDRESS` among them every IP address; None: any."""
    lang: str | None = None
    """Language of requests that name none."""
    languages: tuple[str, ...] = ()
    """The model's; the service fills them in."""
    max_bytes: int = 100 * 2**20
    """Of a request's body."""
    longest_seconds: float = 3600.0
    """Of audio in a request."""
    queue: int = 256
    """Requests inside at once, waiting ones included."""
    queue_seconds: float = 7200.0
    """Seconds of audio inside at once (64 kB of memory each)."""
    timeout: float = 300.0
    """Seconds that a request may take once its body is there."""
    upload_timeout: float = 60.0
    """Seconds that a request's header, and then its body, may take to arrive."""
    readers: int = 2
    """Threads that decode audio."""

    def __post_init__(self):
        for name in ("max_bytes", "longest_seconds", "queue", "queue_seconds", "timeout", "upload_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if not self.names or not all(self.names):
            raise ConfigError("the model needs a name that clients can ask for")
