"""Errors in OpenAI's form."""

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from cobra.serve import schemas
from cobra.serve.answer import BusyError
from vision_scan.errors import UserError

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
         503: "overloaded_error", 504: "timeout_error"}  # fmt: skip


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


def as_api_error(error: Exception) -> ApiError:
    """What a request is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="overloaded")
    if isinstance(error, UserError):
        return ApiError(400, str(error), "messages")
    return ApiError(500, "the answer could not be made; the server's log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Has everything that goes wrong answered in this form."""

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
