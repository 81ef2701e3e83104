"""What clients may ask, in the words of OpenAI's audio API, and what they are told when it cannot be done."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from starlette.datastructures import FormData, UploadFile

from canter.errors import CanterError, ConfigError
from canter.serving.config import ServiceConfig
from canter.text.languages import is_said, resolve

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES = ("segment", "word")
TIMESTAMPS: tuple[Literal["none", "segment", "word"], ...] = ("none", "segment", "word")
FIELDS = {
    "file", "model", "language", "to_language", "prompt", "response_format", "temperature", "stream",
    "timestamp_granularities[]", "timestamp_granularities", "chunking_strategy", "include[]",
}  # fmt: skip


class ApiError(CanterError):
    """What is answered with a status other than 200."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API words errors."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """One request's wishes; the audio apart."""

    task: str
    """``transcribe`` or ``translate``."""
    language: str | None = None
    """Of the audio; None: not said."""
    to_language: str | None = None
    """Of the text, where it is another."""
    prompt: str = ""
    """Text that came before."""
    response_format: str = "json"
    temperature: float = 0.0
    stream: bool = False
    granularities: tuple[str, ...] = ("segment",)

    @property
    def timestamps(self) -> Literal["none", "segment", "word"]:
        """What of the times the answer needs."""
        if "word" in self.granularities:
            return "word"
        return "segment" if self.stream or self.response_format in ("srt", "vtt", "verbose_json") else "none"


def read_asked(form: FormData, task: str, config: ServiceConfig) -> tuple[UploadFile, Asked]:
    """The file and the wishes of a form. Raises ApiError naming the field and the value."""
    unknown = sorted(form.keys() - FIELDS)
    if unknown:
        raise ApiError(400, f"{unknown[0]!r} is not a field of this service", unknown[0], "unknown_parameter")
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "the form has no 'file' with audio", "file", "missing_required_parameter")
    values = {name: value for name, value in form.items() if isinstance(value, str)}
    model = values.get("model") or config.names[0]
    if model not in config.names:
        raise ApiError(
            404,
            f"there is no model {model!r} here, only {config.names[0]!r}",
            "model",
            "model_not_found",
        )
    asked = Asked(
        task,
        _language(values, "language", config) or config.lang,
        _language(values, "to_language", config),
        values.get("prompt", "").strip(),
        _choice(values, "response_format", FORMATS, "json"),
        _temperature(values),
        _flag(values, "stream"),
        _granularities(form),
    )
    _consistent(values, asked, "include[]" in form)
    return file, asked


def _consistent(values: Mapping[str, str], asked: Asked, includes: bool) -> None:
    """Raises ApiError for what would be ignored."""
    if asked.task == "transcribe" and asked.to_language:
        raise ApiError(400, "'to_language' is for /v1/audio/translations", "to_language")
    if asked.stream and asked.response_format == "verbose_json":
        raise ApiError(
            400,
            "a stream has no response_format verbose_json, its events have the times: use json or text, or srt or vtt "
            "for subtitles in the last event",
            "response_format",
        )
    if "word" in asked.granularities and asked.response_format != "verbose_json" and not asked.stream:
        raise ApiError(
            400,
            "times of words need response_format verbose_json, or stream",
            "timestamp_granularities[]",
        )
    if includes:
        raise ApiError(400, "'include[]' is not supported", "include[]")
    if values.get("chunking_strategy", "auto") != "auto":
        raise ApiError(400, "'chunking_strategy' can only be auto", "chunking_strategy")


def _choice(values: Mapping[str, str], name: str, known: tuple[str, ...], default: str) -> str:
    value = values.get(name) or default
    if value not in known:
        raise ApiError(400, f"{name} {value!r} is not one of {', '.join(known)}", name)
    return value


def _flag(values: Mapping[str, str], name: str) -> bool:
    return _choice(values, name, ("true", "false", "True", "False", "1", "0"), "false") in (
        "true",
        "True",
        "1",
    )


def _language(values: Mapping[str, str], name: str, config: ServiceConfig) -> str | None:
    """The model's code of a language, however it is written; None where none is named."""
    value = values.get(name, "").strip()[:40]
    if not is_said(value):
        return None
    try:
        return resolve(value, config.languages)
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
    given = [*form.getlist("timestamp_granularities[]"), *form.getlist("timestamp_granularities")]
    for value in given:
        if value not in GRANULARITIES:
            raise ApiError(
                400,
                f"timestamp granularity {str(value)[:40]!r} is not one of {', '.join(GRANULARITIES)}",
                "timestamp_granularities[]",
            )
    return tuple(str(value) for value in given) or ("segment",)
