"""What a request may ask for."""

from dataclasses import dataclass
from typing import Any

from cobra.serve.errors import ApiError


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


class BodyLimit:
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
