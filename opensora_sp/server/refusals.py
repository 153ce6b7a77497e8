"""Errors as the API shows them."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from opensora_sp.server.protocol import BadRequest, error_json
from opensora_sp.server.shared_link import QueueLost

RETRY_AFTER_SECONDS, LOST_RETRY_AFTER_SECONDS = 30, 5


def add_refusals(app: FastAPI) -> None:
    """Answer every error of a route in the API's form."""
    app.add_exception_handler(BadRequest, _on_bad_request)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(QueueLost, _on_queue_lost)
    app.add_exception_handler(Exception, _on_fault)


def refusal(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error as the API shows it; clients are told not to try again by themselves."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(
        error_json(message, kind=kind, param=param, code=code),
        status_code=status,
        headers={"x-should-retry": "false"},
    )


async def _on_bad_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return refusal(400, str(error), param=error.param, code="invalid_value")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, str(error.detail))


async def _on_disconnect(_: Request, _error: Exception) -> Response:
    """The client's doing, not a fault of the server's: nobody reads the answer."""
    return refusal(400, "the connection was closed before the body was whole")


async def _on_bad_parameter(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    message = f"{name} {str(first.get('input'))[:40]!r}: {first['msg']}"
    return refusal(400, message, param=name, code="invalid_value")


async def _on_fault(_: Request, _error: Exception) -> Response:
    """A fault of the server's own; uvicorn logs it with its traceback."""
    return refusal(500, "the server could not answer this; its log says why")


async def _on_queue_lost(_: Request, _error: Exception) -> Response:
    """The database of a shared queue does not answer; nothing was queued or deleted."""
    answer = refusal(503, "the queue does not answer just now: try again later")
    answer.headers["retry-after"] = str(LOST_RETRY_AFTER_SECONDS)
    return answer


def refuse_draining() -> JSONResponse:
    """The answer to whoever brings a job while the server is being stopped."""
    answer = refusal(503, "the server is being stopped and takes no new jobs")
    answer.headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return answer
