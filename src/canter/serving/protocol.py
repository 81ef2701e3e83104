"""Fields and errors of OpenAI's audio API."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import FormData, UploadFile

from canter.errors import CanterError, ConfigError
from canter.inference.hotwords import WEIGHT, Phrases
from canter.inference.inputs import Channel, read_channel
from canter.inference.recording import TranscribeConfig
from canter.inference.transcript.vad import USUAL_VAD, Vad, VadOptions
from canter.serving.config import ServiceConfig
from canter.text.languages import is_said

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES = ("segment", "word")
TIMESTAMPS: tuple[Literal["none", "segment", "word"], ...] = ("none", "segment", "word")
FIELDS = {
    "file", "model", "language", "to_language", "prompt", "response_format", "temperature", "stream",
    "timestamp_granularities[]", "timestamp_granularities", "chunking_strategy", "include[]",
    "vad_filter", "vad_parameters", "channel", "languages", "languages[]", "clip_timestamps", "clip_timestamps[]",
    "hallucination_silence_threshold", "hotwords", "hotword_weight", "beam_size", "fallback", "repetition_guard",
    "condition_on_previous_text", "suppress_tokens", "suppress_tokens[]",
}  # fmt: skip
NEUTRAL = {
    "n": ("1",), "best_of": ("1",), "use_beam_search": ("false", "0"), "stream_include_usage": ("true", "1"),
    "stream_continuous_usage_stats": ("false", "0"), "top_p": ("1",), "top_k": ("0", "-1"), "min_p": ("0",),
    "frequency_penalty": ("0",), "presence_penalty": ("0",), "repetition_penalty": ("1",), "length_penalty": ("1",),
    "patience": ("1",), "no_repeat_ngram_size": ("0",), "without_timestamps": ("true", "1"),
    "suppress_blank": ("true", "1"),
    "multilingual": ("false", "0"), "log_progress": ("true", "1", "false", "0"),
}  # fmt: skip
"""Fields of the clients of vLLM, speaches and faster-whisper that are accepted with the value which changes nothing."""
OBJECTS = ("chunking_strategy", "vad_parameters")
"""Fields whose value is an object: JSON, or a field for each member, ``chunking_strategy[threshold]``."""
SERVER_VAD = {
    "threshold": "threshold", "prefix_padding_ms": "padding_seconds", "silence_duration_ms": "min_silence_seconds",
}  # fmt: skip
"""Members of OpenAI's ``chunking_strategy`` of type ``server_vad``, and the fields of `VadOptions` that they set."""
VAD_PARAMETERS = {
    "threshold": "threshold", "min_speech_duration_ms": "min_speech_seconds",
    "min_silence_duration_ms": "min_silence_seconds", "speech_pad_ms": "padding_seconds",
    "max_speech_duration_s": "chunk_seconds",
}  # fmt: skip
"""Members of faster-whisper's ``vad_parameters``, and the settings that they set."""


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
    model: str = ""
    """Name of the model or adapter; empty: the first model."""
    prompt: str = ""
    """Text that precedes the audio."""
    response_format: str = "json"
    temperature: float = 0.0
    stream: bool = False
    granularities: tuple[str, ...] = ("segment",)
    adapter: int = 0
    """Number of the model's adapter; 0: none."""
    vad: Vad | None = None
    """Voice activity detector; None: that of the service."""
    vad_options: VadOptions = USUAL_VAD
    chunk_seconds: float | None = None
    """Maximum length of the chunks of long audio; None: the model's window."""
    channel: Channel = "mix"
    """Channel to transcribe."""
    languages: tuple[str, ...] = ()
    """Languages among which to detect that of the audio; empty: all."""
    clip_timestamps: tuple[float, ...] = ()
    """Starts and ends of the spans to transcribe, in seconds."""
    hallucination_silence_threshold: float | None = None
    """Pause in seconds around segments that are left out if their words look invented."""
    hotwords: Phrases | None = None
    """Phrases to prefer."""
    logprobs: bool = False
    """Answer with the log probability of every token."""
    beam_size: int = 1
    fallback: bool = True
    """Decode repetitive or unlikely text again at higher temperatures (Whisper only)."""
    guarded: bool = True
    """Apply the guard against repetition."""
    condition_on_previous_text: bool = False
    """Decode the chunks of long audio one after another, each with the text before it in its prompt."""
    suppress_tokens: tuple[int, ...] | None = None
    """Ids of tokens that are never written, -1 for the model's own set; None: that set."""

    @property
    def timestamps(self) -> Literal["none", "segment", "word"]:
        """The finest times that the answer contains."""
        if "word" in self.granularities:
            return "word"
        return "segment" if self.stream or self.response_format in ("srt", "vtt", "verbose_json") else "none"


def read_fields(form: FormData, task: str, config: ServiceConfig) -> tuple[UploadFile, AudioRequest]:
    """Return the file and the fields of a form, with languages as the client wrote them (`ServedModel.completed`).

    Raises ApiError, naming the field and its value, for what is invalid with any model.
    """
    for name in sorted(form.keys() - FIELDS):
        if name.partition("[")[0] in OBJECTS:
            continue
        given = str(form[name])
        if name not in NEUTRAL:
            raise ApiError(400, f"{name[:80]!r} is not a field of this service", name, "unknown_parameter")
        if not _is_neutral(given, NEUTRAL[name]):
            text = f"{name} is {given[:40]!r}, which this service cannot do; leave it out or give {NEUTRAL[name][0]}"
            raise ApiError(400, text, name, "unsupported_parameter")
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "the form has no 'file' with audio", "file", "missing_required_parameter")
    values = {name: value for name, value in form.items() if isinstance(value, str)}
    vad, vad_options, chunk_seconds = _vad(values, config)
    request = AudioRequest(
        task,
        _language(values, "language"),
        to_language=_language(values, "to_language"),
        model=values.get("model", ""),
        prompt=values.get("prompt", "").strip(),
        response_format=_choice(values, "response_format", FORMATS, "json"),
        temperature=_number(values, "temperature", 0.0, 0.0, 1.0),
        stream=_flag(values, "stream"),
        granularities=_granularities(form),
        vad=vad,
        vad_options=vad_options,
        chunk_seconds=chunk_seconds,
        channel=_channel(values),
        languages=tuple(_several(form, "languages")),
        clip_timestamps=_clips(form),
        hallucination_silence_threshold=_threshold(values),
        hotwords=_hotwords(form, values),
        logprobs=_includes_logprobs(form),
        beam_size=_beam_size(values, config),
        fallback=_flag(values, "fallback", "true"),
        guarded=_flag(values, "repetition_guard", "true"),
        condition_on_previous_text=_flag(values, "condition_on_previous_text"),
        suppress_tokens=_suppressed(form),
    )
    _check_combination(request)
    return file, request


def _check_combination(request: AudioRequest) -> None:
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
    if request.language and request.languages:
        raise ApiError(400, "'language' names one language, and 'languages' several: leave one out", "languages")
    if request.logprobs and request.response_format not in ("json", "verbose_json"):
        text = "log probabilities need response_format json or verbose_json, or stream with json"
        raise ApiError(400, text, "include[]")


def _vad(values: Mapping[str, str], config: ServiceConfig) -> tuple[Vad | None, VadOptions, float | None]:
    """Return the voice activity detector, its options and the maximum length of a chunk in seconds."""
    vad: Vad | None = None
    if values.get("vad_filter"):
        on = _flag(values, "vad_filter")
        vad = "none" if not on else "energy" if config.vad == "none" else config.vad
    strategy = values.get("chunking_strategy") or "auto"
    given: dict[str, object] = {}
    if strategy != "auto" or any(name.startswith("chunking_strategy[") for name in values):
        given = _object(values, "chunking_strategy")
        if given.pop("type", None) != "server_vad":
            raise ApiError(400, "chunking_strategy is auto, or an object of type server_vad", "chunking_strategy")
    parameters = _object(values, "vad_parameters")
    if given and parameters:
        raise ApiError(400, "chunking_strategy and vad_parameters set the same options", "vad_parameters")
    field, names = ("vad_parameters", VAD_PARAMETERS) if parameters else ("chunking_strategy", SERVER_VAD)
    settings = _seconds_of(parameters or given, field, names)
    chunk_seconds = settings.pop("chunk_seconds", None)
    if chunk_seconds is not None and chunk_seconds < 1:
        raise ApiError(400, f"vad_parameters: max_speech_duration_s is {chunk_seconds:g}; at least 1", field)
    if settings and (vad or config.vad) == "none":
        raise ApiError(400, f"{field} means nothing without vad_filter", field)
    try:
        return vad, VadOptions(**settings), chunk_seconds
    except ConfigError as error:
        text = str(error)
        for theirs, ours in names.items():
            text = text.replace(f"VAD {ours}", theirs)
        raise ApiError(400, f"{field}: {text}", field) from None


def _several(form: FormData, name: str) -> list[str]:
    """Return the values of a field that may be sent several times, or once with commas."""
    given = [str(one) for field in (name, f"{name}[]") for one in form.getlist(field)]
    return [part for one in given for part in one.split(",") if part.strip()]


def _clips(form: FormData) -> tuple[float, ...]:
    given = _several(form, "clip_timestamps")
    try:
        return TranscribeConfig(clip_timestamps=tuple(map(float, given))).clip_timestamps
    except ConfigError as error:
        raise ApiError(400, str(error), "clip_timestamps") from None
    except ValueError:
        text = f"clip_timestamps {','.join(given)[:40]!r} are not seconds, separated by commas"
        raise ApiError(400, text, "clip_timestamps") from None


def _suppressed(form: FormData) -> tuple[int, ...] | None:
    """Return the tokens to suppress: ids with commas between them or one a field, or a list in JSON; None if the field
    is not sent, and none for an empty one."""
    name = "suppress_tokens"
    if not {name, f"{name}[]"} & form.keys():
        return None
    given = [part.strip("[] ") for part in _several(form, name)]
    try:
        return tuple(int(part) for part in given if part)
    except ValueError:
        text = f"{name} {','.join(given)[:40]!r} are not ids of tokens, separated by commas"
        raise ApiError(400, text, name) from None


def _threshold(values: Mapping[str, str]) -> float | None:
    name = "hallucination_silence_threshold"
    if not (text := values.get(name)):
        return None
    try:
        return TranscribeConfig(hallucination_silence_threshold=float(text)).hallucination_silence_threshold
    except ConfigError as error:
        raise ApiError(400, str(error), name) from None
    except ValueError:
        raise ApiError(400, f"{name} {text[:40]!r} is not a number", name) from None


def _channel(values: Mapping[str, str]) -> Channel:
    try:
        return read_channel(values.get("channel") or "mix")
    except ConfigError as error:
        raise ApiError(400, str(error), "channel") from None


def _object(values: Mapping[str, str], name: str) -> dict[str, object]:
    """Return the members of an object, which is JSON or a field for each member."""
    start = f"{name}["
    members: dict[str, object] = {
        key.removeprefix(start).removesuffix("]"): value for key, value in values.items() if key.startswith(start)
    }
    text = values.get(name, "")
    if not text or (members and text == "auto"):
        return members
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, f"{name} {text[:40]!r} is not a JSON object", name)
    return {**found, **members}


def _seconds_of(members: Mapping[str, object], field: str, names: Mapping[str, str]) -> dict[str, float]:
    """Return the members by their names here, with milliseconds as seconds."""
    found: dict[str, float] = {}
    for name, value in members.items():
        if name not in names:
            text = f"{field}: {name[:40]!r} is not one of {', '.join(names)}"
            raise ApiError(400, text, field)
        try:
            number = float("nan") if isinstance(value, bool) else float(str(value))
        except ValueError:
            number = float("nan")
        if number != number:
            raise ApiError(400, f"{field}: {name} {str(value)[:40]!r} is not a number", field)
        found[names[name]] = number / 1000 if name.endswith("_ms") else number
    return found


def _flag(values: Mapping[str, str], name: str, default: str = "false") -> bool:
    return _choice(values, name, ("true", "false", "True", "False", "1", "0"), default) in ("true", "True", "1")


def _choice(values: Mapping[str, str], name: str, known: tuple[str, ...], default: str) -> str:
    value = values.get(name) or default
    if value not in known:
        raise ApiError(400, f"{name} {value!r} is not one of {', '.join(known)}", name)
    return value


def _language(values: Mapping[str, str], name: str) -> str | None:
    """Return the language in a field as the client wrote it, None if the field names none."""
    value = values.get(name, "").strip()[:40]
    return value if is_said(value) else None


def _number(values: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    value = values.get(name) or f"{default:g}"
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise ApiError(400, f"{name} {value[:40]!r} is not a number from {low:g} to {high:g}", name)
    return number


def _beam_size(values: Mapping[str, str], config: ServiceConfig) -> int:
    number = _number(values, "beam_size", 1, 1, config.max_beam_size)
    if number != int(number):
        raise ApiError(400, f"beam_size {values['beam_size'][:40]!r} is not a whole number", "beam_size")
    return int(number)


def _hotwords(form: FormData, values: Mapping[str, str]) -> Phrases | None:
    """Return the phrases of the field ``hotwords``: separated by commas, or one in each of several fields."""
    weight = _number(values, "hotword_weight", WEIGHT, 0.01, 100.0)
    given = [part for one in form.getlist("hotwords") for part in str(one).split(",")]
    if not any(part.strip() for part in given):
        return None
    try:
        return Phrases.of(given, weight)
    except ConfigError as error:
        raise ApiError(400, str(error), "hotwords") from None


def _includes_logprobs(form: FormData) -> bool:
    given = {str(one) for one in form.getlist("include[]")}
    for other in sorted(given - {"logprobs"}):
        raise ApiError(400, f"include[] {other[:40]!r} is not logprobs", "include[]")
    return bool(given)


def _is_neutral(given: str, neutral: Sequence[str]) -> bool:
    try:
        return any(float(given) == float(one) for one in neutral)
    except ValueError:
        return given.lower() in neutral or not given


def _granularities(form: FormData) -> tuple[str, ...]:
    given = [str(one) for name in ("[]", "") for one in form.getlist(f"timestamp_granularities{name}")]
    for value in given:
        if value not in GRANULARITIES:
            text = f"timestamp granularity {value[:40]!r} is not one of {', '.join(GRANULARITIES)}"
            raise ApiError(400, text, "timestamp_granularities[]")
    return tuple(given) or ("segment",)
