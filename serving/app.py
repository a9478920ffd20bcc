"""The web application: an OpenAI-compatible API over the engine thread. serve.py runs it."""

import asyncio
import hmac
import json
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from errors import UserError, cut, in_bytes, reason, shown
from serving.bodies import parsed
from serving.conversations import Conversations
from serving.errors import ApiError
from serving.forms import REASONS, Chat, Completions, Form, Words, usage
from serving.metrics import Metrics
from serving.schema import openapi
from serving.worker import Answer, Call, Worker

PAGE = Path(__file__).resolve().parent / "page.html"
BODY_SECONDS = 30  # in which a body must have come
INLINE = 2**14  # bytes of a body that is parsed and made ids of at once; a larger one does not stop the loop
RETRY = {"Retry-After": "1"}
CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Settings:
    """timeout: seconds of a request. max_body: bytes. page: whether there is one, and its lanes. keep: conversations.
    cache_dir: of prompt caches.
    """

    model: str
    timeout: float = 600.0
    max_body: int = 8 << 20
    api_key: str | None = None
    cors: Collection[str] = ()
    page: bool = True
    keep: int = 0
    cache_dir: str | None = None
    quiet: bool = False


class Server:
    """The state that the endpoints share."""

    def __init__(self, settings: Settings, worker: Worker, words: Words, metrics: Metrics):
        self.settings, self.worker, self.metrics = settings, worker, metrics
        self.created, self.draining = int(time.time()), False
        self.handled: set[Call] = set()  # accepted, and not answered to the end
        self.drained: Callable[[], None] = lambda: None  # called when nothing of that is left and no more will come
        self.kept = Conversations(settings.keep)
        caches = None if settings.cache_dir is None else Path(settings.cache_dir)
        self.forms = [form(words, settings.model, worker, self.kept, caches) for form in (Completions, Chat)]
        metrics.gauge("queue_length", "Requests that wait for a row", lambda: worker.waiting)
        metrics.gauge("rows", "Rows of the batch", lambda: worker.rows)
        metrics.gauge("rows_in_use", "Requests that have a row", lambda: worker.running)
        metrics.gauge("kv_bytes", "Bytes of keys, values and what policies hold", lambda: worker.kv_bytes)
        metrics.gauge("kept_conversations", "Conversations that are kept", lambda: len(self.kept))
        metrics.gauge("kept_bytes", "Bytes of kept conversations", lambda: self.kept.nbytes)

    @property
    def app(self) -> Starlette:
        middleware = []
        if self.settings.cors:
            any_header = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
            middleware.append(Middleware(CORSMiddleware, allow_origins=list(self.settings.cors), **any_header))
        return Starlette(
            routes=[
                *(Route(form.path, Answering(self, form), methods=["POST"]) for form in self.forms),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
                Route("/openapi.json", self.schema),
                Route("/", self.page),
            ],
            middleware=middleware,
            exception_handlers={ApiError: of_api, HTTPException: of_http, Exception: of_ours},
        )

    def done(self, call: Call) -> None:
        """A call is answered, or nobody waits for it any more."""
        self.worker.cancel(call)
        self.handled.discard(call)
        self.check_drained()

    def check_drained(self) -> None:
        if self.draining and not self.handled:
            self.drained()

    def check_key(self, request: Request) -> None:
        """ApiError for a client that does not know the key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        key = self.settings.api_key
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "give the API key as Authorization: Bearer KEY", code="invalid_api_key")

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self.check_key(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        own = {"id": self.settings.model, "object": "model", "created": self.created, "owned_by": "squeeze-fast"}
        return own | {"max_model_len": self.worker.max_length}

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.settings.model):
            line = f"there is no model {shown(name)} here, only {shown(self.settings.model)}"
            raise ApiError(404, line, "model", "model_not_found")

    async def health(self, request: Request) -> Response:
        worker, state = self.worker, "draining" if self.draining else "ok"
        about = {"rows": worker.rows, "rows_in_use": worker.running, "waiting": worker.waiting}
        about |= {"max_length": worker.max_length, "plan": worker.plan}
        return JSONResponse({"status": state, "model": self.settings.model} | about, 503 if self.draining else 200)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def schema(self, request: Request) -> Response:
        return JSONResponse(openapi(self.settings.model, self.forms))

    async def page(self, request: Request) -> Response:
        if not (self.settings.page and PAGE.exists()):
            raise ApiError(404, "this server has no page; see /openapi.json for what it has")
        return FileResponse(PAGE, media_type="text/html", headers={"Cache-Control": "no-cache"})

    # ---- from a body to a call that runs

    async def accepted(self, request: Request, form: Form) -> tuple[Call, Any]:
        """The call that a request asks for, on its way. ApiError if it cannot be."""
        self.check_key(request)
        data = await self._body(request)
        if len(data) > INLINE or form.slow:
            body, answers = await asyncio.to_thread(self._read, form, data)
        else:
            body, answers = self._read(form, data)
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers=RETRY | CLOSE)
        lane, count = body.lane, len(answers)
        if count > self.worker.most(lane):
            most = f"{self.worker.rows} rows and {self.worker.queue_length} that may wait"
            raise ApiError(400, f"{count} prompts are more than {most}; send fewer at a time", "prompt")
        if count > self.worker.room(lane):
            raise ApiError(429, f"{self.worker.waiting} requests wait already; try again later", headers=RETRY)
        call = Call(answers, bool(body.stream))
        self.handled.add(call)
        self.worker.submit(call)
        return call, body

    async def _body(self, request: Request) -> bytes:
        """The body of a request, which must come in time. A large one is read to its end and dropped: a client that
        is still sending would not see the answer.
        """
        headers, most = request.headers, self.settings.max_body
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON, with Content-Type: application/json", headers=CLOSE)
        line = f"the body is larger than {in_bytes(most)}; send less (--max-body)"
        declared = headers.get("content-length", "0")
        if "expect" in headers and declared.isdecimal() and int(declared) > most:
            raise ApiError(413, line, headers=CLOSE)
        parts, size = [], 0
        try:
            async with asyncio.timeout(min(BODY_SECONDS, self.settings.timeout)):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif parts:
                        parts = []
        except TimeoutError:
            status, why = (413, line) if size > most else (408, "the body did not come in time")
            raise ApiError(status, why, headers=CLOSE) from None
        if size > most:
            raise ApiError(413, line, headers=CLOSE)
        return b"".join(parts)

    def _read(self, form: Form, data: bytes) -> tuple[Any, list[Answer]]:
        """What a body asks for, checked as far as that is possible."""
        body = parsed(form.body, data)
        self.check_model(body.model)
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options goes with stream", "stream_options")
        if body.watch and not body.stream:
            raise ApiError(400, "watch goes with stream", "watch")
        if body.lane is not None and body.lane not in self.worker.lanes:
            raise ApiError(400, "this server has no lanes (--no-page)", "lane")
        try:
            answers = form.answers(body)
            if refusal := next(filter(None, map(self.worker.refusal, answers)), None):
                raise UserError(refusal)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        return body, answers


class Answering:
    """An endpoint that answers calls, streamed or whole."""

    def __init__(self, server: Server, form: Form):
        self.server, self.form = server, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, outcome, call = time.perf_counter(), "500", None
        try:
            call, body = await self.server.accepted(Request(scope, receive), self.form)
            left = self.server.settings.timeout - (time.perf_counter() - started)
            outcome = await Reply(self.form, call, body, send).run(receive, left)
        except ApiError as error:
            outcome = str(error.status)
            await error.response(scope, receive, send)
        except ClientDisconnect:
            outcome = "gone"
        finally:
            if call is not None:
                self.server.done(call)
            self._note(call, outcome, time.perf_counter() - started)

    def _note(self, call: Call | None, outcome: str, seconds: float) -> None:
        metrics, tokens = self.server.metrics, ""
        metrics.requests.labels(self.form.path, outcome).inc()
        if call is not None:
            own = usage(call)
            metrics.prompt_tokens.inc(own["prompt_tokens"])
            metrics.cached_tokens.inc(own["prompt_tokens_details"]["cached_tokens"])
            metrics.kept_hits.inc(sum(answer.turn is not None for answer in call.answers))
            tokens = f", {own['prompt_tokens']} + {own['completion_tokens']} tokens"
        if not self.server.settings.quiet:
            print(f"{self.form.path} {outcome}{tokens}, {seconds:.2f} s", file=sys.stderr)


class Reply:
    """One answer to a client: an object, or events as they come."""

    def __init__(self, form: Form, call: Call, body: Any, send: Send):
        self.form, self.call, self.body, self.send = form, call, body, send
        self.began = False  # the client has the status
        self.created = int(time.time())

    async def run(self, receive: Receive, seconds: float) -> str:
        """Answer, if the client stays and the time suffices. Returns what became of it, in a word."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            async with asyncio.timeout(seconds):
                await (self._stream() if self.call.streamed else self._whole())
        except TimeoutError:
            return await self._failed(ApiError(504, "the request took longer than --timeout allows", code="timeout"))
        except ApiError as error:
            return await self._failed(error)
        finally:
            watcher.cancel()
        return "gone" if self.call.gone else "200"

    async def _watch(self, receive: Receive) -> None:
        """Tells the call that its client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.call.gone = True
        self.call.changed.set()

    async def _failed(self, error: ApiError) -> str:
        if not self.began:
            raise error
        with suppress(TimeoutError):
            async with asyncio.timeout(1):  # else the client does not read
                await self._event(error.body, last=True)
        return str(error.status)

    async def _changed(self) -> bool:
        """Wait for news. False if the client has gone; ApiError if an answer has failed."""
        await self.call.changed.wait()
        self.call.changed.clear()
        for answer in self.call.answers:
            if answer.end and answer.end.reason == "error":
                raise ApiError(answer.end.status, answer.end.error)
        return not self.call.gone

    async def _whole(self) -> None:
        while not self.call.ended:
            if not await self._changed():
                return
        await self.form.finish(self.call, self.body)
        response = JSONResponse(self.form.whole(self.call, self.created))
        self.began = True
        await self.send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
        await self.send({"type": "http.response.body", "body": response.body})

    async def _stream(self) -> None:
        call, options = self.call, self.body.stream_options
        head, with_usage = self.form.head(self.created, True), bool(options and options.include_usage)
        if with_usage:
            head |= {"usage": None}
        left, sent = dict(enumerate(call.answers)), [-1] * len(call.answers)  # characters; -1: nothing yet
        while left:
            if not await self._changed():
                return
            events = []
            if call.ended:
                await self.form.finish(call, self.body)
            for index, answer in list(left.items()):
                first, text = sent[index] < 0, answer.text[max(0, sent[index]) :]
                for seen in answer.seen:
                    events.append(head | {"choices": [], "cache": seen})
                answer.seen.clear()
                if text or (first and (answer.tokens or answer.end)):
                    sent[index] = len(answer.text)
                    events.append(head | {"choices": [self.form.delta(index, text, None, first)]})
                if answer.end:
                    del left[index]
                    last = self.form.delta(index, "", REASONS[answer.end.reason], False)
                    events.append(head | {"choices": [last]})
            if not left and with_usage:
                events.append(head | {"choices": [], "usage": usage(call)})
            if events:
                await self._event(*events, last=not left)

    async def _event(self, *objects: dict[str, Any], last: bool = False) -> None:
        if not self.began:
            self.began = True
            await self.send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        lines = [f"data: {json.dumps(each, ensure_ascii=False, allow_nan=False)}\n\n" for each in objects]
        done = "data: [DONE]\n\n" if last and "error" not in objects[-1] else ""
        body = "".join([*lines, done]).encode("utf-8", "replace")
        await self.send({"type": "http.response.body", "body": body, "more_body": not last})


EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def of_api(request: Request, error: ApiError) -> Response:
    return error.response


async def of_http(request: Request, error: HTTPException) -> Response:
    """Such as 404 and 405."""
    where = f"{request.method} {cut(request.url.path)}"
    return ApiError(error.status_code, f"{where}: {error.detail}", headers=error.headers).response


async def of_ours(request: Request, error: Exception) -> Response:
    """What is left is a fault of ours: Starlette raises it again, so that it keeps its traceback."""
    return ApiError(500, f"the server failed on this request: {reason(error)}").response
