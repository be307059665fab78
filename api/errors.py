"""The one place where errors become HTTP responses, all in OpenAI's shape."""

import logging
from http import HTTPStatus

import orjson
from flask import Flask, Response, make_response, request
from pydantic import ValidationError
from redis.exceptions import RedisError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from werkzeug.exceptions import HTTPException

from api.instruments import ERRORS
from api.schemas import refusal
from tasks.errors import DatabaseUnavailableError, QueueUnavailableError, SluiceError

log = logging.getLogger(__name__)


def register(app: Flask) -> None:
    """Has the app answer every error through this module."""
    app.register_error_handler(SluiceError, _answer)
    app.register_error_handler(RedisError, _answer_redis)
    for away in (OperationalError, InterfaceError, PoolTimeoutError):
        app.register_error_handler(away, _answer_database)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_unexpected)


def _answer(error: SluiceError) -> Response:
    ERRORS.labels(str(error.status), error.code).inc()
    response = Response(
        orjson.dumps(error.body()), status=error.status, content_type="application/json"
    )
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
        response.headers["retry-after-ms"] = str(round(error.retry_after_s * 1000))
    if error.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.should_retry is not None:
        response.headers["x-should-retry"] = str(error.should_retry).lower()
    return response


def _answer_redis(failure: RedisError) -> Response:
    log.error("Redis: %s", failure)
    return _answer(QueueUnavailableError())


def _answer_database(failure: Exception) -> Response:
    log.error("database: %s", failure)
    return _answer(DatabaseUnavailableError())


def refuse_parameters(refused: ValidationError) -> Response:
    """Answers a request whose path or query is wrong."""
    return make_response(_answer(refusal(refused)))


class _HttpError(SluiceError):
    """A request that no route takes, in the words of the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.type = "not_found_error" if status == HTTPStatus.NOT_FOUND else "invalid_request_error"
        self.code = HTTPStatus(status).name.lower()


def _answer_http(error: HTTPException) -> Response:
    status = error.code or 500
    message = {
        HTTPStatus.NOT_FOUND: f"Unknown URL: {request.method} {request.path}; see /docs.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.path} does not take {request.method}.",
    }.get(HTTPStatus(status), error.description or error.name)
    response = _answer(_HttpError(status, message))
    if "Allow" in (headers := dict(error.get_headers())) or hasattr(error, "valid_methods"):
        allowed = getattr(error, "valid_methods", None) or ()
        response.headers["Allow"] = headers.get("Allow") or ", ".join(allowed)
    return response


def _answer_unexpected(error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return _answer(SluiceError())
