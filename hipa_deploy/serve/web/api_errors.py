"""Errors of the API, all in the form of OpenAI's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import ValidationError

_MOST = 1000  # characters of a message


class ApiError(HTTPException):
    """A request that is not answered with images.

    It is an ``HTTPException``, because FastAPI turns every other exception that ends the reading of
    a body into one of its own.

    Args:
        status: of HTTP.
        message: for people.
        code: for programs: one of a few words of this service.
        param: the parameter that is at fault.
        headers: of the answer.

    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message = message
        self.code = code
        self.param = param

    def response(self) -> JSONResponse:
        """The answer."""
        return error_response(
            self.status_code,
            self.message,
            self.code,
            param=self.param,
            headers=self.headers,
        )

    def as_bytes(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The answer as HTTP/1.1, for what is answered before the application.

        Args:
            headers: beside its own.

        """
        response = self.response()
        lines = [f"HTTP/1.1 {self.status_code} {HTTPStatus(self.status_code).phrase}".encode()]
        for name, value in (*response.raw_headers, *headers):
            lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)


def queue_full(seconds: int) -> ApiError:
    """The answer where too many images wait.

    Args:
        seconds: after which to try again.

    """
    return _too_many("images are waiting", seconds)


def too_many_uploads(seconds: int) -> ApiError:
    """The answer where too many bodies are on their way.

    Args:
        seconds: after which to try again.

    """
    return _too_many("uploads are under way", seconds)


def headers_too_large() -> ApiError:
    """The answer to headers that no client needs."""
    return ApiError(431, "The headers are too large.", "headers_too_large")


def _too_many(what: str, seconds: int) -> ApiError:
    return ApiError(
        429,
        f"Too many {what}. Try again in {seconds} seconds.",
        "rate_limit_exceeded",
        headers={"retry-after": str(seconds)},
    )


def error_response(
    status: int,
    message: str,
    code: str | None = None,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as OpenAI's API writes it."""
    error: dict[str, Any] = {
        "message": message[:_MOST],
        "type": _type(status),
        "param": param,
        "code": code,
    }
    return JSONResponse({"error": error}, status, headers=dict(headers or {}))


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    if status >= 500:
        return "server_error"
    if status in (401, 403):
        return "authentication_error" if status == 401 else "permission_error"
    return "invalid_request_error"


def validation_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's fields, without the value that was given."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or None
    name = where[:100] if where else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {name!r}.", "unknown_parameter", param=name)
    if first["type"] == "missing":
        return ApiError(
            400, f"Missing required parameter: {name!r}.", "missing_required_parameter", param=name
        )
    return ApiError(400, f"{name}: {first['msg']}.", "invalid_value", param=name)
