"""The HTTP interface: OpenAI's audio routes, models, health, metrics and the page."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from canter import __version__
from canter.inference.engine.requests import Request as Wanted
from canter.inference.transcript.formats import finite, srt, vtt, whisper_json
from canter.inference.transcript.reading import space_between
from canter.inference.transcript.segments import Segment
from canter.inference.transcript.subtitles import SENTENCES
from canter.serving.protocol import ApiError, Asked, read_asked
from canter.serving.scheduler import Timing
from canter.serving.server import ANY_ADDRESS, is_address
from canter.serving.service import Audio, Heard, Service
from canter.serving.upload import read_form

log = logging.getLogger("canter.serving")
WRITERS = {"srt": srt, "vtt": vtt}
OPEN = ("/", "/health")  # without an API key
COUNTED = (
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)  # by name; a client can think of any other path
DRAIN_SECONDS = 1.0
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
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def create_app(service: Service) -> FastAPI:
    """The application around a service; closing it down closes the service."""

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
    model = {
        "id": service.config.names[0],
        "object": "model",
        "created": service.started,
        "owned_by": "canter",
    }

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        policy = "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; connect-src 'self'; "
        policy += "img-src data:; media-src blob:; worker-src blob:; frame-ancestors 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @app.get("/health")
    async def health() -> Response:
        alive = service.scheduler.alive
        return JSONResponse(
            {
                "status": "ok" if alive else "down",
                "version": __version__,
                "model": service.config.names[0],
                "languages": service.tokenizer.languages,
                "language": service.config.lang,
                "targets": service.targets,
                "detects": service.detects,
                "words": service.engine.aligns,
                "keys": bool(service.config.keys),
                "max_bytes": service.config.max_bytes,
                "longest_seconds": service.config.longest_seconds,
                "requests": service.requests,
                "waiting": service.scheduler.waiting,
            },
            200 if alive else 503,
        )

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in service.config.names:
            raise ApiError(404, f"there is no model {name!r} here, only {model['id']!r}", "model", "model_not_found")
        return JSONResponse(model)

    @app.post("/v1/audio/transcriptions", openapi_extra=_BODY)
    async def transcriptions(request: Request) -> Response:
        return await _answer(service, request, "transcribe")

    @app.post("/v1/audio/translations", openapi_extra=_BODY)
    async def translations(request: Request) -> Response:
        return await _answer(service, request, "translate")

    app.add_middleware(_Gate, service=service)
    return app


class _Gate:
    """In front of everything: who may ask, and the counts of what was answered."""

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 499
        request = Request(scope, receive)
        unread = bool({"content-length", "transfer-encoding"} & {*request.headers.keys()})

        async def tracked() -> Any:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif unread and not message.get("more_body"):
                # What is still on its way is read for a moment: closing at once would reset the connection
                # before many a client has seen why.
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_SECONDS):
                        while unread:
                            await tracked()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        endpoint = scope["path"] if scope["path"] in COUNTED else "other"
        try:
            refusal = _refusal(self.service, request)
            if refusal:
                self.service.metrics.refused.labels("access").inc()
                await JSONResponse(refusal.body, refusal.status)(scope, tracked, counted)
            else:
                await self.app(scope, tracked, counted)
        finally:
            self.service.metrics.requests.labels(endpoint, str(status)).inc()
            self.service.metrics.latency.labels(endpoint).observe(time.perf_counter() - begun)


def _refusal(service: Service, request: Request) -> ApiError | None:
    """Why the request may not be: another site's page sent it (a browser lets it, and resolves names as that
    site likes), or its API key is missing or wrong."""
    config = service.config
    host = request.headers.get("host", "")
    if config.hosts is not None and not _is_ours(host, config.hosts):
        return ApiError(
            403,
            f"{host[:80]!r} is not a name of this service; start it with --allowed-hosts {_name(host)[:80] or 'NAME'}",
        )
    origin = request.headers.get("origin")
    if origin and _place(origin) != host:
        return ApiError(403, f"requests from pages of {origin[:80]} are refused")
    if config.keys and request.scope["path"] not in OPEN:  # request.url is made of the Host header too
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not _is_key(given.strip().encode("latin-1"), config.keys):
            return ApiError(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
    return None


def _name(host: str) -> str:
    """Return the name or address in a Host header, without the port and the dot that ends a full name."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return name.lower().removesuffix(".")


def _is_ours(host: str, hosts: frozenset[str]) -> bool:
    """Return whether a Host header names one of the ``hosts``. A page of another site whose name was made to lead here
    (DNS rebinding) sends that name; an IP address it cannot send."""
    name = _name(host)
    return name in hosts or (ANY_ADDRESS in hosts and is_address(name))


def _is_key(given: bytes, keys: frozenset[str]) -> bool:
    """Return whether a request's key, in bytes as they came, is one of ours: clients send other letters than ASCII's in
    UTF-8 or in Latin-1."""
    known = {key.encode("utf-8") for key in keys}
    for key in keys:
        with contextlib.suppress(UnicodeEncodeError):
            known.add(key.encode("latin-1"))
    matches = [hmac.compare_digest(given, one) for one in known]  # all of them, so that the time tells nothing
    return any(matches)


def _place(origin: str) -> str | None:
    """Host and port of a page's origin; None where it is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


async def _answer(service: Service, request: Request, task: str) -> Response:
    """One transcription or translation, from the body to the answer."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.admitted())
        begun = time.perf_counter()
        form = await read_form(request, service.config)
        upload = time.perf_counter() - begun
        client = _Client(request, time.monotonic() + service.config.timeout)
        try:
            file, asked = read_asked(form, task, service.config)
            wanted = service.request(asked)  # what does not fit the model is said before its audio is read
        except BaseException:
            await form.close()
            raise
        audio = replace(await client.wait_for(_read(service, file)), upload=upload)
        stack.callback(audio.close)
        stack.enter_context(service.room_for(audio))  # before a stream begins, whose status is 200
        if asked.stream:
            return _Stream(_events(service, client, audio, asked, wanted), stack.pop_all())
        heard = await client.wait_for(_all(service, audio, asked, wanted))
        return _rendered(service, heard, audio, asked)


class _Stream(StreamingResponse):
    """SSE stream; the request keeps its queue slot until the stream closes."""

    def __init__(self, events: AsyncIterator[str], place: contextlib.ExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._place = place

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def _read(service: Service, file: UploadFile) -> Audio:
    return await service.read(file.file, file.filename or "the upload")


async def _all(service: Service, audio: Audio, asked: Asked, wanted: Wanted) -> list[Heard]:
    async with contextlib.aclosing(service.segments(audio, asked, wanted)) as found:
        return [heard async for heard in found]


class _Client:
    """Who asked, and until when (``time.monotonic``) there is time for it."""

    def __init__(self, request: Request, deadline: float):
        self.request, self.deadline = request, deadline

    async def wait_for(self, work: Awaitable[T]) -> T:
        """The result of ``work``, which is cancelled if the client leaves or its time is over (ApiError)."""
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._gone())
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

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


async def _events(service: Service, client: _Client, audio: Audio, asked: Asked, wanted: Wanted) -> AsyncIterator[str]:
    """Yield OpenAI's events: a ``transcript.text.delta`` for each segment as soon as it is decoded, and a
    ``transcript.text.done`` with the whole. Ours have the ``segment`` with its times beside the delta, and the
    ``language`` of the audio, its ``duration`` in seconds and the ``timing``; where ``response_format`` is one of
    subtitles, the last event has these files as ``subtitles``."""
    text, timing, language = "", Timing(), asked.language
    segments: list[Segment] = []
    probability: float | None = None
    try:
        async with contextlib.aclosing(service.segments(audio, asked, wanted)) as found:
            while True:
                heard = await client.wait_for(anext(found))
                timing, language, probability = heard.timing, heard.language, heard.language_probability
                for segment in heard.segments:
                    delta = space_between(text, segment.text) + segment.text
                    text += delta
                    times = {
                        "id": len(segments),
                        "start": segment.start,
                        "end": segment.end,
                        "text": segment.text,
                    }
                    if "word" in asked.granularities:
                        times["words"] = [
                            {"word": word.text.strip(), "start": word.start, "end": word.end} for word in segment.words
                        ]
                    segments.append(segment)
                    yield _event(
                        {
                            "type": "transcript.text.delta",
                            "delta": delta,
                            "segment": times,
                            "language": language,
                        }
                    )
    except StopAsyncIteration:
        done = {"type": "transcript.text.done", "text": text, "usage": _usage(audio), "language": language}
        done["duration"] = round(audio.seconds, 3)
        if audio.warnings:
            done["warnings"] = list(audio.warnings)
        if probability is not None:
            done["language_probability"] = round(probability, 4)
        if asked.response_format in WRITERS:
            done["subtitles"] = {name: write(segments, SENTENCES) for name, write in WRITERS.items()}
        yield _event(done | {"timing": _milliseconds(audio, timing)})
    except ApiError as error:
        yield _event(error.body)


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(finite(value), ensure_ascii=False, allow_nan=False)}\n\n"


def _usage(audio: Audio) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(audio.seconds)}


def _milliseconds(audio: Audio, timing: Timing) -> dict[str, float]:
    stages = {
        "upload": audio.upload,
        "audio": audio.reading,
        "queue": timing.queue,
        "features": timing.features,
    }
    stages |= {"encoder": timing.encoder, "decoder": timing.decoder}
    return {name: round(seconds * 1000, 2) for name, seconds in stages.items()}


def _rendered(service: Service, heard: list[Heard], audio: Audio, asked: Asked) -> Response:
    """The answer in the format asked for; where the time went is in its ``Server-Timing``."""
    segments = [segment for one in heard for segment in one.segments]
    milliseconds = _milliseconds(audio, heard[-1].timing if heard else Timing())
    headers = {"Server-Timing": ", ".join(f"{name};dur={value}" for name, value in milliseconds.items())}
    text = ""
    for segment in segments:
        text += space_between(text, segment.text) + segment.text
    if asked.response_format == "text":
        return PlainTextResponse(text + "\n", headers=headers)
    if asked.response_format in WRITERS:
        return PlainTextResponse(WRITERS[asked.response_format](segments, SENTENCES), headers=headers)
    if asked.response_format == "json":
        return JSONResponse({"text": text, "usage": _usage(audio)}, headers=headers)
    language = heard[-1].language if heard else asked.language or service.tokenizer.languages[0]
    value = {
        "task": asked.task,
        "duration": round(audio.seconds, 3),
        **whisper_json(text, segments, language),
    }
    if audio.warnings:
        value["warnings"] = list(audio.warnings)
    value["language"] = asked.to_language or "en" if asked.task == "translate" else language
    if heard and heard[-1].language_probability is not None:
        value["language_probability"] = round(heard[-1].language_probability, 4)
    words = [word for segment in value["segments"] for word in segment.pop("words", [])]
    if "word" in asked.granularities:
        # Without the space before each that Whisper's files have, as OpenAI's API gives words.
        value["words"] = [{"word": word["word"].strip(), "start": word["start"], "end": word["end"]} for word in words]
        if "segment" not in asked.granularities:
            del value["segments"]
    return JSONResponse(finite(value | {"usage": _usage(audio), "timing": milliseconds}), headers=headers)


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
