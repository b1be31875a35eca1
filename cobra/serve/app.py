"""OpenAI's chat completions over HTTP, and the page at /."""

import asyncio
import base64
import binascii
import contextlib
import hmac
import io
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from cobra.cost import LMCost
from cobra.image import upright_size
from cobra.sampling import Sampler
from cobra.serve import engine as engines
from cobra.serve import schemas
from cobra.serve.engine import BusyError, Engine, Outcome
from cobra.serve.metrics import CONTENT_TYPE, render
from cobra.serve.prompt import Message, Part, Picture, Prompt
from vision_scan.errors import UserError

PAGE = Path(__file__).with_name("page.html")
DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
POLL_SECONDS = 0.5  # how soon it is noticed that nobody waits for an answer any more
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
         503: "overloaded_error", 504: "timeout_error"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body_bytes: of a request.
        images: of a request.
        pixels: of an image.
        prompt_tokens: of a conversation, its images included.
        new_tokens: of an answer; also what it gets if the request does not say.
        seconds: from a request to the end of its answer.
    """

    body_bytes: int = 64 * 2**20
    images: int = 1024
    pixels: int = 64 * 10**6
    prompt_tokens: int = 1_000_000
    new_tokens: int = 4096
    seconds: float = 600.0


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = schemas.ErrorResponse(
            error=schemas.ErrorBody(message=message, type=TYPES.get(status, "server_error"), param=param, code=code)
        )

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse(self.body.model_dump(), self.status, headers)


def create_app(engine: Engine, name: str, limits: Limits | None = None, api_key: str | None = None) -> FastAPI:
    """The application; it starts the engine, and closes it in the end.

    Args:
        engine: answers.
        name: of the model, as requests call it.
        limits: of requests.
        api_key: what requests have to show; None: nothing.
    """
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    app = FastAPI(title="cobra", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_BodyLimit, limit=limits.body_bytes)
    _add_error_handlers(app)
    card = schemas.ModelCard(id=name, created=int(time.time()))
    errors: Any = {status: {"model": schemas.ErrorResponse} for status in (400, 401, 404, 413, 503, 504)}
    guarded = {"dependencies": [Depends(check_key)], "responses": {**errors}}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not engine.is_running:
            raise ApiError(503, "the engine has stopped")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, **guarded)
    async def metrics() -> Response:
        return Response(render(engine), media_type=CONTENT_TYPE)

    @app.get("/v1/models", **guarded)
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[card])

    @app.get("/v1/models/{model}", **guarded)
    async def one_model(model: str) -> schemas.ModelCard:
        _check_model(model, name)
        return card

    @app.post("/v1/chat/completions", response_model=schemas.ChatCompletion, **guarded)
    async def complete(body: schemas.ChatRequest, request: Request) -> Any:
        _check_model(body.model, name)
        messages = await asyncio.to_thread(read_messages, engine, body.messages, limits)
        answer = _Answer(engine, name, body, messages, limits)
        if body.stream:
            first = await answer.begin(request)
            return StreamingResponse(answer.stream(first), media_type="text/event-stream")
        return await answer.whole(request)

    return app


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        raise ApiError(404, f"no model {asked!r} here; the one that is served is {name!r}", "model", "model_not_found")


def read_messages(engine: Engine, messages: Sequence[schemas.Message], limits: Limits) -> Prompt:
    """A request's conversation as the engine takes it.

    What a system says is put in front of the user's first words, as models here have no place for it.

    Raises:
        ApiError: if it is not one, or more than may be asked for.
    """
    count = sum(isinstance(part, schemas.ImagePart) for one in messages if isinstance(one.content, list)
                for part in one.content)  # fmt: skip
    if count > limits.images:
        raise ApiError(400, f"{count} images: at most {limits.images} in a request", "messages")
    turns: list[Message] = []
    said: list[Part] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}.content"
        content = message.content
        parts = [content] if isinstance(content, str) else [_read_part(engine, part, limits, where) for part in content]
        if message.role in ("system", "developer"):
            if turns or any(isinstance(part, Picture) for part in parts):
                raise ApiError(400, "a system message stands at the beginning, and has words alone", where)
            said += [*parts, "\n\n"]
        elif message.role == "user":
            turns.append(Message("user", (*said, *parts)))
            said = []
        elif any(isinstance(part, Picture) for part in parts):
            raise ApiError(400, "images are of the user; an assistant's message has words alone", where)
        else:
            turns.append(Message("assistant", tuple(parts)))
    try:
        prompt = Prompt(engine.model, turns)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from error
    if prompt.num_tokens > limits.prompt_tokens:
        raise ApiError(
            400,
            f"the conversation has {prompt.num_tokens} tokens: at most {limits.prompt_tokens} are read",
            "messages",
            "context_length_exceeded",
        )
    return prompt


def _read_part(engine: Engine, part: schemas.TextPart | schemas.ImagePart, limits: Limits, where: str) -> Part:
    if isinstance(part, schemas.TextPart):
        return part.text
    data = read_data_url(part.image_url.url, where)
    try:
        height, width = upright_size(io.BytesIO(data))
        if height * width > limits.pixels:
            raise ApiError(400, f"an image of {width} x {height} pixels: at most {limits.pixels:,}", where)
        return Picture.of(engine.model, data)
    except UserError as error:
        raise ApiError(400, f"not an image that can be read: {error}", where) from error


def read_data_url(url: str, where: str) -> bytes:
    """The bytes in a data URL.

    Raises:
        ApiError: if it is another URL, or not base64.
    """
    found = DATA_URL.match(url)
    if not found:
        scheme = url.partition(":")[0][:20] if ":" in url else "no"
        raise ApiError(400, f"{scheme} URLs are not fetched: send the image itself, data:image/png;base64,...", where)
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"the image's data URL is not base64 ({error})", where) from error


class _Answer:
    """One request between the engine's thread and the event loop."""

    def __init__(self, engine: Engine, name: str, body: schemas.ChatRequest, prompt: Prompt, limits: Limits) -> None:
        self._engine, self._name, self._body, self._prompt = engine, name, body, prompt
        self._limits = limits
        self._told: asyncio.Queue[str | Outcome] = asyncio.Queue()
        self._deadline = time.monotonic() + limits.seconds
        self._next_look = 0.0  # whether somebody still waits
        self._cancel: Callable[[], None] = lambda: None

    async def begin(self, request: Request) -> str | Outcome:
        """Hands the request to the engine, and waits for the first that it tells: what fails before is an error of
        the whole request."""
        self._submit()
        try:
            first = await self._next(request)
        except BaseException:
            self._cancel()
            raise
        if isinstance(first, Outcome) and first.error is not None:
            raise _as_api_error(first.error)
        return first

    def _submit(self) -> None:
        loop, body = asyncio.get_running_loop(), self._body

        def tell(what: str | Outcome) -> None:
            loop.call_soon_threadsafe(self._told.put_nowait, what)

        temperature = 1.0 if body.temperature is None else body.temperature
        sampler = Sampler(1, temperature > 0, temperature, body.top_k, body.top_p, body.seed)
        try:
            self._cancel = self._engine.submit(
                engines.Request(
                    prompt=self._prompt,
                    sampler=sampler,
                    max_new_tokens=min(body.most_tokens or self._limits.new_tokens, self._limits.new_tokens),
                    stop=body.stop or (),
                    on_text=tell,
                    on_end=tell,
                )
            )
        except BusyError as error:
            raise _as_api_error(error) from error

    async def _next(self, request: Request | None = None) -> str | Outcome:
        """What the engine tells next; gives up if nobody listens, or it takes too long."""
        while True:
            now = time.monotonic()
            if now >= self._deadline:
                raise ApiError(504, f"no answer within {self._limits.seconds:g} seconds", code="timeout")
            if request is not None and now >= self._next_look:
                self._next_look = now + POLL_SECONDS
                if await request.is_disconnected():
                    raise ApiError(499, "nobody waits for the answer")
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(self._told.get(), min(self._deadline - now, POLL_SECONDS))

    async def whole(self, request: Request) -> schemas.ChatCompletion:
        """The whole answer."""
        try:
            pieces, told = [], await self.begin(request)
            while not isinstance(told, Outcome):
                pieces.append(told)
                told = await self._next(request)
        finally:
            self._cancel()
        if told.error is not None:
            raise _as_api_error(told.error)
        message = schemas.AnswerMessage(content="".join(pieces))
        choice = schemas.Choice(message=message, finish_reason=told.reason)
        return schemas.ChatCompletion(model=self._name, choices=[choice], usage=self._usage(told))

    async def stream(self, told: str | Outcome) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        chunk = schemas.ChatChunk(model=self._name, choices=[])
        wants_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)

        def event(delta: schemas.Delta, reason: Any = None) -> str:
            choice = schemas.ChunkChoice(delta=delta, finish_reason=reason)
            return _event(chunk.model_copy(update={"choices": [choice]}), wants_usage)

        try:
            yield event(schemas.Delta(role="assistant", content=""))
            while not isinstance(told, Outcome):
                yield event(schemas.Delta(content=told))
                told = await self._next()
            if told.error is not None:
                raise _as_api_error(told.error)
            yield event(schemas.Delta(), told.reason)
            if wants_usage:
                yield _event(chunk.model_copy(update={"usage": self._usage(told)}), wants_usage)
        except ApiError as error:  # the status has long been sent: the error is an event
            yield f"data: {error.body.model_dump_json()}\n\n"
        finally:  # also when the client has gone
            self._cancel()
        yield "data: [DONE]\n\n"

    def _usage(self, outcome: Outcome) -> schemas.Usage:
        total = outcome.prompt_tokens + outcome.new_tokens
        lm = self._engine.model.lm
        return schemas.Usage(
            prompt_tokens=outcome.prompt_tokens,
            completion_tokens=outcome.new_tokens,
            total_tokens=total,
            prompt_tokens_details=schemas.PromptTokensDetails(cached_tokens=outcome.cached_tokens),
            state_bytes=LMCost(lm.config).state_bytes(total, lm.dtype.itemsize),
        )


def _event(chunk: schemas.ChatChunk, wants_usage: bool) -> str:
    body = chunk.model_dump(exclude={"choices", "usage"})
    body["choices"] = [
        {**choice.model_dump(exclude={"delta"}), "delta": choice.delta.model_dump(exclude_none=True)}
        for choice in chunk.choices
    ]
    if wants_usage:
        body["usage"] = chunk.usage and chunk.usage.model_dump()
    return f"data: {json.dumps(body)}\n\n"


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="overloaded")
    if isinstance(error, UserError):
        return ApiError(400, str(error), "messages")
    return ApiError(500, "the answer could not be made; the server's log says why")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def of_the_body(request: Request, error: RequestValidationError) -> JSONResponse:
        worst = max(error.errors(), key=lambda one: len(one["loc"]))  # of several readings the one that got furthest
        # What pydantic calls the members of a union is no part of the body.
        place = ".".join(str(part) for part in worst["loc"] if part not in ("body", "str") and "[" not in str(part))
        message = worst["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{place}: {message}" if place else message, place or None).response()

    @app.exception_handler(StarletteHTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
        response.headers.update(error.headers or {})
        return response


class _BodyLimit:
    """Refuses bodies above a number of bytes: by their announced length before they are read, by what comes else."""

    def __init__(self, app: Any, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = ApiError(413, f"the body has more than {self._limit:,} bytes", code="body_too_large").response()
        if announced.isdigit() and int(announced) > self._limit:
            await refusal(scope, receive, send)
            return
        taken, is_refused = 0, False

        async def counting() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                raise ValueError("the body is too large")  # whatever is answered to that, it is replaced below
            return message

        async def sending(message: Any) -> None:
            nonlocal is_refused
            if taken <= self._limit:
                await send(message)
            elif not is_refused:
                is_refused = True
                await refusal(scope, receive, send)

        await self._app(scope, counting, sending)
