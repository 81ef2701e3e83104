"""The HTTP interface: OpenAI's audio routes, models, health, metrics and the page."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from canter import __version__
from canter.inference.transcript.formats import finite, logprobs_json, srt, txt, vtt, whisper_json
from canter.inference.transcript.reading import space_between
from canter.inference.transcript.segments import Segment
from canter.inference.transcript.subtitles import SENTENCES
from canter.serving.audio import Audio
from canter.serving.config import ServiceConfig
from canter.serving.model import TranscriptUpdate
from canter.serving.pool import OfferedModel
from canter.serving.protocol import ApiError, AudioRequest, read_fields
from canter.serving.scheduler import Timing
from canter.serving.server import ANY_ADDRESS, is_address
from canter.serving.service import Service
from canter.serving.upload import read_form

log = logging.getLogger("canter.serving")
WRITERS = {"srt": srt, "vtt": vtt}
OPEN = ("/", "/health")  # without an API key
COUNTED = ("/v1/audio/transcriptions", "/v1/audio/translations")  # by name; clients can invent any other path
MODEL = "canter.model"  # key of the model's name in a request's scope, for the metrics
DRAIN_SECONDS = 1.0
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; media-src blob:; worker-src blob:; frame-ancestors 'none'"
)
T = TypeVar("T")

_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "model": {"type": "string"},
        "language": {"type": "string"},
        "prompt": {"type": "string"},
        "response_format": {"type": "string", "enum": ["json", "text", "srt", "verbose_json", "vtt"]},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
        "stream": {"type": "boolean"},
        "timestamp_granularities[]": {"type": "array", "items": {"enum": ["segment", "word"]}},
        "chunking_strategy": {"oneOf": [{"enum": ["auto"]}, {"type": "object"}]},
        "vad_filter": {"type": "boolean"},
        "vad_parameters": {"type": "object"},
        "channel": {"type": "string"},
        "include[]": {"type": "array", "items": {"enum": ["logprobs"]}},
        "hotwords": {"type": "string"},
        "hotword_weight": {"type": "number"},
        "beam_size": {"type": "integer", "minimum": 1},
        "fallback": {"type": "boolean"},
        "repetition_guard": {"type": "boolean"},
        "languages[]": {"type": "array", "items": {"type": "string"}},
        "clip_timestamps": {"type": "string"},
        "hallucination_silence_threshold": {"type": "number"},
        "condition_on_previous_text": {"type": "boolean"},
        "suppress_tokens": {"type": "string"},
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def create_app(service: Service) -> FastAPI:
    """Return the application around a service; its shutdown closes the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.warm_up()
        yield
        service.close()

    app = FastAPI(title="Canter", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    page = (files("canter.serving") / "page.html").read_text(encoding="utf-8")
    config = service.config

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    @app.get("/health")
    async def health() -> Response:
        alive, models = service.alive, service.models.offered
        state = {
            "status": "ok" if alive else "down",
            "version": __version__,
            "model": models[0].name,
            **_profile(models[0]),
            "models": [{"name": one.name, "loaded": one.loaded, **_profile(one)} for one in models],
            "keys": bool(config.keys),
            "max_bytes": config.max_bytes,
            "longest_seconds": config.max_seconds,
            "requests": service.requests,
            "waiting": service.waiting,
        }
        return JSONResponse(state, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        data = [
            _model(service, offered, name)
            for offered in service.models.offered
            for name in (offered.name, *offered.source.adapter_names)
        ]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        return JSONResponse(_model(service, service.models.find(name), name))

    @app.post("/v1/audio/transcriptions", openapi_extra=_BODY)
    async def transcriptions(request: Request) -> Response:
        return await _answer(service, request, "transcribe")

    @app.post("/v1/audio/translations", openapi_extra=_BODY)
    async def translations(request: Request) -> Response:
        return await _answer(service, request, "translate")

    app.add_middleware(_Gate, service=service)
    if config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*config.origins],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Server-Timing"],
        )
    return app


def _profile(offered: OfferedModel) -> dict[str, object]:
    """Return what the page has to know of a model."""
    known = offered.profile
    return {
        "adapters": [*offered.source.adapter_names],
        "languages": [*known.languages],
        "language": known.language,
        "targets": [*known.targets],
        "detects": known.detects,
        "words": known.words,
    }


def _model(service: Service, offered: OfferedModel, name: str) -> dict[str, object]:
    """Return OpenAI's description of the model, or of its adapter with this name."""
    described: dict[str, object] = {"id": offered.name, "object": "model", "created": service.started}
    if name in offered.source.adapter_names:
        described |= {"id": name, "parent": offered.name}  # as vLLM
    return described | {"owned_by": "canter"}


class _Gate:
    """Middleware that refuses requests without access, and counts all answers."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499
        request = Request(scope, receive)
        unread = bool({"content-length", "transfer-encoding"} & {*request.headers.keys()})

        async def tracked() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif unread and not message.get("more_body"):
                # Read the body for a moment longer: closing at once would reset the connection before many
                # clients have read the answer.
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_SECONDS):
                        while unread:
                            await tracked()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        metrics, endpoint = self.service.metrics, scope["path"] if scope["path"] in COUNTED else "other"
        try:
            refusal = _refusal(self.service.config, request)
            if refusal:
                metrics.refused.labels("access").inc()
                await JSONResponse(refusal.body, refusal.status)(scope, tracked, counted)
            else:
                await self.app(scope, tracked, counted)
        finally:
            model = scope.get(MODEL, "")
            metrics.requests.labels(endpoint, model, str(status)).inc()
            metrics.latency.labels(endpoint, model).observe(time.perf_counter() - start)


def _refusal(config: ServiceConfig, request: Request) -> ApiError | None:
    """Return the error for a request that a page of another site sent, or whose API key is missing or wrong.

    Browsers send such pages' requests, and resolve host names as that site chooses (DNS rebinding).
    """
    host = request.headers.get("host", "")
    if config.hosts is not None and not _is_ours(host, config.hosts):
        hint = f"start it with --allowed-hosts {_name(host)[:80] or 'NAME'}"
        return ApiError(403, f"{host[:80]!r} is not a name of this service; {hint}")
    origin = request.headers.get("origin")
    allowed = bool({"*", origin} & config.origins)
    if origin and _netloc(origin) != host and not allowed:
        hint = f"start it with --allowed-origins {origin[:80]}"
        return ApiError(403, f"requests from pages of {origin[:80]} are refused; {hint}")
    if config.keys and request.scope["path"] not in OPEN:  # request.url is made of the Host header too
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not _is_key(given.strip().encode("latin-1"), config.keys):
            text = "the API key is missing or wrong; send 'Authorization: Bearer KEY'"
            return ApiError(401, text, code="invalid_api_key")
    return None


def _name(host: str) -> str:
    """Return the name or address in a Host header, without the port and the dot that ends a full name."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return name.lower().removesuffix(".")


def _is_ours(host: str, hosts: frozenset[str]) -> bool:
    """Return whether a Host header names one of the ``hosts``.

    With DNS rebinding a page of another site sends that site's name; it cannot send an IP address.
    """
    name = _name(host)
    return name in hosts or (ANY_ADDRESS in hosts and is_address(name))


def _is_key(given: bytes, keys: frozenset[str]) -> bool:
    """Return whether a request's key, in the bytes received, is one of ``keys``.

    Clients encode letters outside of ASCII as UTF-8 or as Latin-1.
    """
    known = {key.encode("utf-8") for key in keys}
    for key in keys:
        with contextlib.suppress(UnicodeEncodeError):
            known.add(key.encode("latin-1"))
    matches = [hmac.compare_digest(given, one) for one in known]  # compare all: the time must not depend on the key
    return any(matches)


def _netloc(origin: str) -> str | None:
    """Return host and port of a page's origin, None if it is not an address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


async def _answer(service: Service, request: Request, task: str) -> Response:
    """Serve one transcription or translation: read the form, decode its audio, transcribe, and render the answer."""
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(service.admitted())
        start = time.perf_counter()
        form = await read_form(request, service.config)
        upload = time.perf_counter() - start
        client = _Client(request, time.monotonic() + service.config.timeout)
        try:
            file, fields = read_fields(form, task, service.config)
            offered, asked = service.models.find(fields.model), time.perf_counter()
            request.scope[MODEL] = offered.name
            using = stack.enter_async_context(service.models.using(offered))
            try:
                model = await client.wait_for(using)
            except ApiError as error:
                raise service.models.late(offered) if error.code == "timeout" else error from None
            loading = time.perf_counter() - asked
            fields = model.completed(fields)
            wanted = model.request(fields)  # refuse what the model cannot do before the audio is read
        except BaseException:
            await form.close()
            raise
        audio = await client.wait_for(service.read(model, file.file, file.filename or "the upload", fields))
        audio = replace(audio, upload=upload, loading=loading)
        stack.callback(audio.close)
        stack.enter_context(service.room_for(audio))  # before a stream starts, whose status is 200
        result = TranscriptionAnswer(audio, fields)
        updates = service.segments(model, audio, fields, wanted)
        if fields.stream:
            return _Stream(_events(client, result, updates), stack.pop_all())
        await client.wait_for(_collect(result, updates))
        return result.response(model.first_language)


class _Stream(StreamingResponse):
    """SSE stream; the request keeps its queue slot and its model until the stream closes."""

    def __init__(self, events: AsyncIterator[str], held: contextlib.AsyncExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


class _Client:
    """Connection of a request, with the deadline of its answer (``time.monotonic``)."""

    def __init__(self, request: Request, deadline: float):
        self.request, self.deadline = request, deadline

    async def wait_for(self, work: Awaitable[T]) -> T:
        """Return the result of ``work``; cancel it and raise ApiError at a disconnect or at the deadline."""
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._disconnected())
        try:
            left = max(0.0, self.deadline - time.monotonic())
            await asyncio.wait({task, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if leaving.done():
                raise ApiError(499, "the client left")
            raise ApiError(504, "not finished in time; send less audio, or try again later", code="timeout")
        finally:
            task.cancel()
            leaving.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)

    async def _disconnected(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


class TranscriptionAnswer:
    """Transcript of one request's audio so far, and its answer in every format."""

    def __init__(self, audio: Audio, fields: AudioRequest):
        self.audio, self.fields = audio, fields
        self.text, self.segments, self.timing = "", list[Segment](), Timing()
        self.language, self.language_probability = fields.language, None

    def add(self, update: TranscriptUpdate) -> list[tuple[str, Segment]]:
        """Append the segments of ``update``, and return each with the text that it adds."""
        self.timing, self.language = update.timing, update.language
        self.language_probability = update.language_probability
        added = []
        for segment in update.segments:
            delta = space_between(self.text, segment.text) + segment.text
            self.text += delta
            added.append((delta, segment))
        self.segments += update.segments
        return added

    def delta(self, number: int, delta: str, segment: Segment) -> dict[str, object]:
        """Return OpenAI's event for a segment, with the segment's times and the language, which are ours."""
        times: dict[str, object] = {"id": number, "start": segment.start, "end": segment.end, "text": segment.text}
        if segment.channel is not None:
            times["channel"] = segment.channel
        if "word" in self.fields.granularities:
            words = [{"word": one.text.strip(), "start": one.start, "end": one.end} for one in segment.words]
            times["words"] = words
        event: dict[str, object] = {"type": "transcript.text.delta", "delta": delta, "segment": times}
        if self.fields.logprobs:
            event["logprobs"] = logprobs_json(segment.token_scores)
        return event | {"language": self.language}

    def done(self) -> dict[str, object]:
        """Return OpenAI's last event, with language, duration, timing and subtitles, which are ours."""
        done: dict[str, object] = {"type": "transcript.text.done", "text": self.text, "usage": self._usage}
        done |= {"language": self.language, "duration": round(self.audio.seconds, 3)} | self._remarks | self._logprobs
        if self.fields.response_format in WRITERS:
            done["subtitles"] = {name: write(self.segments, SENTENCES) for name, write in WRITERS.items()}
        return done | {"timing": self._milliseconds}

    def response(self, default_language: str | None) -> Response:
        """Return the answer in the requested format, with the time of each stage in its ``Server-Timing``."""
        stages = [f"{name};dur={value}" for name, value in self._milliseconds.items()]
        headers = {"Server-Timing": ", ".join(stages)}
        kind = self.fields.response_format
        if kind == "text":
            text = txt(self.segments) if self.fields.channel == "each" else self.text + "\n"
            return PlainTextResponse(text, headers=headers)
        if kind in WRITERS:
            return PlainTextResponse(WRITERS[kind](self.segments, SENTENCES), headers=headers)
        if kind == "json":
            return JSONResponse({"text": self.text, "usage": self._usage} | self._logprobs, headers=headers)
        language, translated = self.language or default_language, self.fields.task == "translate"
        value = {"task": self.fields.task, "duration": round(self.audio.seconds, 3)}
        value |= whisper_json(self.text, self.segments, language) | self._remarks
        value["language"] = self.fields.to_language or "en" if translated else language
        words = [word for segment in value["segments"] for word in segment.pop("words", [])]
        if "word" in self.fields.granularities:
            # Whisper's files have a space before each word, OpenAI's API has none.
            value["words"] = [{"word": one["word"].strip(), "start": one["start"], "end": one["end"]} for one in words]
            if "segment" not in self.fields.granularities:
                del value["segments"]
        value |= {"usage": self._usage, "timing": self._milliseconds}
        return JSONResponse(finite(value), headers=headers)

    @property
    def _logprobs(self) -> dict[str, object]:
        """Log probabilities of all tokens, if they were asked for."""
        if not self.fields.logprobs:
            return {}
        return {"logprobs": logprobs_json(score for segment in self.segments for score in segment.token_scores)}

    @property
    def _usage(self) -> dict[str, object]:
        return {"type": "duration", "seconds": round(self.audio.seconds)}

    @property
    def _remarks(self) -> dict[str, object]:
        """Faults of the audio, and the probability of a detected language."""
        remarks: dict[str, object] = {"warnings": [*self.audio.warnings]} if self.audio.warnings else {}
        if self.language_probability is not None:
            remarks["language_probability"] = round(self.language_probability, 4)
        return remarks

    @property
    def _milliseconds(self) -> dict[str, float]:
        """Milliseconds that the request took in each stage."""
        stages = {"upload": self.audio.upload, "audio": self.audio.reading}
        stages["queue"] = self.audio.loading + self.timing.queue
        stages |= {name: getattr(self.timing, name) for name in ("features", "encoder", "decoder")}
        return {name: round(seconds * 1000, 2) for name, seconds in stages.items()}


async def _collect(result: TranscriptionAnswer, updates: AsyncGenerator[TranscriptUpdate]) -> None:
    async with contextlib.aclosing(updates):
        async for update in updates:
            result.add(update)


async def _events(
    client: _Client, result: TranscriptionAnswer, updates: AsyncGenerator[TranscriptUpdate]
) -> AsyncIterator[str]:
    """Yield OpenAI's server-sent events: a delta for each segment as soon as it is decoded, then the last event."""
    number = 0
    try:
        async with contextlib.aclosing(updates):
            while True:
                for delta, segment in result.add(await client.wait_for(anext(updates))):
                    yield _event(result.delta(number, delta, segment))
                    number += 1
    except StopAsyncIteration:
        yield _event(result.done())
    except ApiError as error:
        yield _event(error.body)


def _event(value: Mapping[str, object]) -> str:
    return f"data: {json.dumps(finite(value), ensure_ascii=False, allow_nan=False)}\n\n"


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 503 else None)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is nothing at", 405: f"{request.method} is not possible at"}.get(error.status_code)
    text = f"{message} {request.scope['path']}" if message else str(error.detail)
    return JSONResponse(ApiError(error.status_code, text).body, error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
    return JSONResponse(ApiError(500, "the service failed; its log says more").body, 500)
