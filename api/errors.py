"""The one place where errors become HTTP responses, all in OpenAI's shape."""

import logging
from http import HTTPStatus
from types import TracebackType
from typing import Any

from flask import Flask, Response, make_response, request
from pydantic import ValidationError
from redis.exceptions import RedisError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from werkzeug.exceptions import HTTPException

from api.instruments import ERRORS
from api.schemas import refusal
from tasks.contract.error_kinds import kind_of
from tasks.contract.errors import (
    DatabaseUnavailableError,
    HttpError,
    QueueUnavailableError,
    SluiceError,
    headers_of,
)

log = logging.getLogger(__name__)


def register(app: Flask) -> None:
    """Has the app answer every error through this module."""
    app.register_error_handler(SluiceError, _answer)
    app.register_error_handler(RedisError, _answer_redis)
    for away in (OperationalError, InterfaceError, PoolTimeoutError):
        app.register_error_handler(away, _answer_database)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_unexpected)
    # What fails after the routes; Flask itself would log the path.
    app.log_exception = _log_late  # type: ignore[method-assign]


def respond(body: dict[str, Any], kind: SluiceError | type[SluiceError]) -> Response:
    """An error's body as a response, with the headers that errors of its kind have."""
    return make_response(body, kind.status, headers_of(kind))


def respond_again(body: dict[str, Any]) -> Response:
    """The same for the error of a job, which another process has put into words."""
    return respond(body, kind_of(body["error"].get("code")))


def _answer(error: SluiceError) -> Response:
    ERRORS.labels(str(error.status), error.code).inc()
    return respond(error.body(), error)


def _answer_redis(failure: RedisError) -> Response:
    log.error("Redis: %s", failure)
    return _answer(QueueUnavailableError())


def _answer_database(failure: Exception) -> Response:
    log.error("database: %s", failure)
    return _answer(DatabaseUnavailableError())


def refuse_parameters(refused: ValidationError) -> Response:
    """Answers a request whose path or query is wrong."""
    return make_response(_answer(refusal(refused)))


def _answer_http(error: HTTPException) -> Response:
    status = error.code or 500
    message = {
        HTTPStatus.NOT_FOUND: f"Unknown URL: {request.method} {request.path}; see /docs.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.path} does not take {request.method}.",
    }.get(HTTPStatus(status), error.description or error.name)
    response = _answer(HttpError(status, message))
    if "Allow" in (headers := dict(error.get_headers())) or hasattr(error, "valid_methods"):
        allowed = getattr(error, "valid_methods", None) or ()
        response.headers["Allow"] = headers.get("Allow") or ", ".join(allowed)
    return response


def _answer_unexpected(error: Exception) -> Response:
    log.error("%s failed", _route(), exc_info=error)
    return _answer(SluiceError())


def _log_late(
    exc_info: tuple[type, BaseException, TracebackType] | tuple[None, None, None],
) -> None:
    log.error("%s: its answer failed", _route(), exc_info=exc_info)


def _route() -> str:
    """Which route a request has taken: its path, and a method that no route has, are content."""
    rule = request.url_rule
    return f"{request.method} {rule}" if rule else "no route"
