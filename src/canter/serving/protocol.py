"""Fields and errors of OpenAI's audio API."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import FormData, UploadFile

from canter.errors import CanterError, ConfigError
from canter.inference.languages import spoken_language
from canter.serving.config import ServiceConfig
from canter.text.languages import is_said

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES = ("segment", "word")
TIMESTAMPS: tuple[Literal["none", "segment", "word"], ...] = ("none", "segment", "word")
FIELDS = {
    "file", "model", "language", "to_language", "prompt", "response_format", "temperature", "stream",
    "timestamp_granularities[]", "timestamp_granularities", "chunking_strategy", "include[]",
}  # fmt: skip


class ApiError(CanterError):
    """An answer with a status other than 200, worded as OpenAI's API words errors."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class AudioRequest:
    """The fields of one request, without its file."""

    task: str
    """``transcribe`` or ``translate``."""
    language: str | None = None
    """Language of the audio; None if the request names none."""
    to_language: str | None = None
    """Language of the text, if it is another."""
    prompt: str = ""
    """Text that precedes the audio."""
    response_format: str = "json"
    temperature: float = 0.0
    stream: bool = False
    granularities: tuple[str, ...] = ("segment",)
    adapter: int = 0
    """Number of the model's adapter; 0: none."""

    @property
    def timestamps(self) -> Literal["none", "segment", "word"]:
        """The finest times that the answer contains."""
        if "word" in self.granularities:
            return "word"
        return "segment" if self.stream or self.response_format in ("srt", "vtt", "verbose_json") else "none"


def read_fields(form: FormData, task: str, config: ServiceConfig) -> tuple[UploadFile, AudioRequest]:
    """Return the file and the fields of a form. Raise ApiError, naming the field and its value, for what is invalid."""
    unknown = sorted(form.keys() - FIELDS)
    if unknown:
        raise ApiError(400, f"{unknown[0]!r} is not a field of this service", unknown[0], "unknown_parameter")
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "the form has no 'file' with audio", "file", "missing_required_parameter")
    values = {name: value for name, value in form.items() if isinstance(value, str)}
    model = values.get("model") or config.names[0]
    check_model_name(model, config)
    request = AudioRequest(
        task,
        _language(values, "language", config) or config.language,
        _language(values, "to_language", config),
        values.get("prompt", "").strip(),
        _choice(values, "response_format", FORMATS, "json"),
        _temperature(values),
        _choice(values, "stream", ("true", "false", "True", "False", "1", "0"), "false") in ("true", "True", "1"),
        _granularities(form),
        adapter=config.adapters.get(model, 0),
    )
    _check_combination(values, request, "include[]" in form)
    return file, request


def check_model_name(name: str, config: ServiceConfig) -> None:
    """Raise ApiError (404) if neither the service's model nor one of its adapters has this name."""
    if name not in config.names and name not in config.adapters:
        known = ", ".join(map(repr, (config.names[0], *config.adapters)))
        text = f"there is no model {name[:80]!r} here, only {known}"
        raise ApiError(404, text, "model", "model_not_found")


def _check_combination(values: Mapping[str, str], request: AudioRequest, includes: bool) -> None:
    """Raise ApiError for a field that would be ignored."""
    if request.task == "transcribe" and request.to_language:
        raise ApiError(400, "'to_language' is for /v1/audio/translations", "to_language")
    if request.stream and request.response_format == "verbose_json":
        text = (
            "a stream has no response_format verbose_json, its events have the times: use json or text, or srt or vtt "
        )
        raise ApiError(400, f"{text}for subtitles in the last event", "response_format")
    if "word" in request.granularities and request.response_format != "verbose_json" and not request.stream:
        text = "times of words need response_format verbose_json, or stream"
        raise ApiError(400, text, "timestamp_granularities[]")
    if includes:
        raise ApiError(400, "'include[]' is not supported", "include[]")
    if values.get("chunking_strategy", "auto") != "auto":
        raise ApiError(400, "'chunking_strategy' can only be auto", "chunking_strategy")


def _choice(values: Mapping[str, str], name: str, known: tuple[str, ...], default: str) -> str:
    value = values.get(name) or default
    if value not in known:
        raise ApiError(400, f"{name} {value!r} is not one of {', '.join(known)}", name)
    return value


def _language(values: Mapping[str, str], name: str, config: ServiceConfig) -> str | None:
    """Return the model's code of the language in a field, None if the field names none."""
    value = values.get(name, "").strip()[:40]
    if not is_said(value):
        return None
    assert config.tokenizer is not None
    try:
        return spoken_language(config.tokenizer, value)
    except ConfigError as error:
        raise ApiError(400, f"{name}: {error}", name) from None


def _temperature(values: Mapping[str, str]) -> float:
    value = values.get("temperature") or "0"
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise ApiError(400, f"temperature {value[:40]!r} is not a number from 0 to 1", "temperature")
    return number


def _granularities(form: FormData) -> tuple[str, ...]:
    given = [str(one) for name in ("[]", "") for one in form.getlist(f"timestamp_granularities{name}")]
    for value in given:
        if value not in GRANULARITIES:
            text = f"timestamp granularity {value[:40]!r} is not one of {', '.join(GRANULARITIES)}"
            raise ApiError(400, text, "timestamp_granularities[]")
    return tuple(given) or ("segment",)
