"""OpenAI's chat completions over HTTP, and the page at /."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from cobra.cost import LMCost
from cobra.sampling import Sampler
from cobra.serve import answer as answers
from cobra.serve import schemas
from cobra.serve.answer import BusyError, Outcome
from cobra.serve.engine import Engine
from cobra.serve.errors import ApiError, add_error_handlers, as_api_error
from cobra.serve.limits import BodyLimit, Limits
from cobra.serve.messages import read_messages
from cobra.serve.metrics import CONTENT_TYPE, render
from cobra.serve.prompt import Prompt

PAGE = Path(__file__).with_name("page.html")
POLL_SECONDS = 0.5  # how soon it is noticed that nobody waits for an answer any more
ERRORS: Any = {status: {"model": schemas.ErrorResponse} for status in (400, 401, 404, 413, 503, 504)}


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

    app = FastAPI(title="cobra", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=limits.body_bytes)
    add_error_handlers(app)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        if not engine.is_running:
            raise ApiError(503, "the engine has stopped")
        return {"status": "ok"}

    app.include_router(_guarded(engine, name, limits, api_key))
    return app


def _guarded(engine: Engine, name: str, limits: Limits, api_key: str | None) -> APIRouter:
    """What asks for the key."""

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    router = APIRouter(dependencies=[Depends(check_key)], responses=ERRORS)
    card = schemas.ModelCard(id=name, created=int(time.time()))

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(render(engine), media_type=CONTENT_TYPE)

    @router.get("/v1/models")
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[card])

    @router.get("/v1/models/{model}")
    async def one_model(model: str) -> schemas.ModelCard:
        _check_model(model, name)
        return card

    @router.post("/v1/chat/completions", response_model=schemas.ChatCompletion)
    async def complete(body: schemas.ChatRequest, request: Request) -> Any:
        _check_model(body.model, name)
        prompt = await asyncio.to_thread(read_messages, engine.model, body.messages, limits)
        answer = _Answer(engine, name, body, prompt, limits)
        if body.stream:
            first = await answer.begin(request)
            return StreamingResponse(answer.stream(first), media_type="text/event-stream")
        return await answer.whole(request)

    return router


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        raise ApiError(404, f"no model {asked!r} here; the one that is served is {name!r}", "model", "model_not_found")


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
            raise as_api_error(first.error)
        return first

    def _submit(self) -> None:
        loop, body = asyncio.get_running_loop(), self._body

        def tell(what: str | Outcome) -> None:
            loop.call_soon_threadsafe(self._told.put_nowait, what)

        temperature = 1.0 if body.temperature is None else body.temperature
        sampler = Sampler(1, temperature > 0, temperature, body.top_k, body.top_p, body.seed)
        try:
            self._cancel = self._engine.submit(
                answers.Request(
                    prompt=self._prompt,
                    sampler=sampler,
                    max_new_tokens=min(body.most_tokens or self._limits.new_tokens, self._limits.new_tokens),
                    stop=body.stop or (),
                    on_text=tell,
                    on_end=tell,
                )
            )
        except BusyError as error:
            raise as_api_error(error) from error

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
            raise as_api_error(told.error)
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
                raise as_api_error(told.error)
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
