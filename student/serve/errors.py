"""Refusals and failures as JSON, in the shape that clients of OpenAI's API know: {"error": {"message", "type", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

CLIENT_GONE = 499  # as in nginx's log; nobody reads it
LONGEST = 2000  # characters of a message: it may quote the request


class Error(BaseModel):
    """What was wrong."""

    message: str = Field(description="what is wrong, and what to do")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error")
    code: str | None = Field(description="one word for programs, such as too_long")


class ErrorBody(BaseModel):
    """Any answer whose status is not 200."""

    error: Error


class Refused(HTTPException):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.code = code

    def response(self) -> JSONResponse:
        """What the client gets."""
        return _response(self.status_code, self.detail, self.code, self.headers)


def add_handlers(app: FastAPI) -> None:
    """Has every error of an application answered in the one shape."""
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Refused):
        return error.response()
    if not isinstance(error, HTTPException):
        raise error
    messages: dict[int, str] = {
        HTTPStatus.BAD_REQUEST: "the body cannot be read: send one JSON object in UTF-8",
        HTTPStatus.NOT_FOUND: f"there is no {request.scope['path'][: LONGEST // 2]}: /openapi.json lists what there is",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.method} is not possible here: /openapi.json lists what is",
    }
    message = messages.get(error.status_code, error.detail)
    return _response(error.status_code, message, None, error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the body is sent as {kind or 'nothing in particular'}: set the header Content-Type: application/json"
    else:
        message = "; ".join(map(_finding, error.errors()))
    return _response(HTTPStatus.BAD_REQUEST, message)


def _finding(finding: dict[str, Any]) -> str:
    place = ".".join(map(str, finding["loc"][1:])) or "body"
    if finding["type"] == "json_invalid":
        return f"the body is not JSON: {finding['ctx']['error']} at character {place}"
    if finding["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    return f"{place}: {finding['msg'].removeprefix('Value error, ')}"


async def _failed(_request: Request, error: Exception) -> JSONResponse:
    return _response(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}; the service's log says more")


def _response(status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    whole = message[:LONGEST].encode("utf-8", "backslashreplace").decode()  # it may quote half a character
    return JSONResponse({"error": {"message": whole, "type": _kind(status), "code": code}}, status, headers)


def _kind(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
