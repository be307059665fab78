"""The body of a request: read within bounds of bytes and time, and as JSON of bounded depth."""

import itertools
from collections.abc import Iterable
from typing import Any

import gevent
import orjson
from flask import request
from gunicorn.http.errors import NoMoreData, ParseException

from tasks.errors import BodyTimeoutError, BodyTooLargeError, InvalidRequestError
from tasks.settings import get_settings

PIECE_BYTES = 1 << 20
# Of a chunked body, whose chunks may have a byte each: between two of these others have their turn.
CHUNKED_PIECE_BYTES = 1 << 8
# Tools' schemas are the deepest that anybody sends; parsers downstream give up at some hundred.
MOST_LEVELS = 100


def read_body() -> bytes:
    """The request's body.

    Raises:
        InvalidRequestError: it does not say that it is JSON, or is not sent as HTTP wants it.
        BodyTooLargeError: it is longer than the setting allows.
        BodyTimeoutError: it does not come.
    """
    if request.mimetype != "application/json":
        raise InvalidRequestError(
            f"Content-Type must be application/json, not {request.mimetype or 'missing'!r}."
        )
    most_bytes = request.max_content_length or 0
    if (request.content_length or 0) > most_bytes:
        raise BodyTooLargeError(most_bytes)
    try:
        with gevent.Timeout(get_settings().body_timeout_s, BodyTimeoutError):
            body = _read(most_bytes)
    except (NoMoreData, ParseException) as broken:
        raise InvalidRequestError(
            f"The body is not sent as HTTP wants it: {type(broken).__name__}."
        ) from None
    if len(body) < (request.content_length or 0):
        raise InvalidRequestError("The body is shorter than its Content-Length says.")
    return body


def _read(most_bytes: int) -> bytes:
    """Not by Flask, which takes a chunked body that is too long for one that ends at the bound."""
    pieces: list[bytes] = []
    left = most_bytes
    piece_bytes = CHUNKED_PIECE_BYTES if request.content_length is None else PIECE_BYTES
    while piece := request.environ["wsgi.input"].read(min(piece_bytes, left + 1)):
        left -= len(piece)
        if left < 0:
            raise BodyTooLargeError(most_bytes)
        pieces.append(piece)
        gevent.sleep(0)
    return b"".join(pieces)


def read_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object; {} for other JSON, which the engine refuses.

    Raises:
        InvalidRequestError: it is not JSON, or nested too deep.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as broken:
        raise InvalidRequestError(f"The body is not valid JSON: {broken}") from None
    if body.count(b"[") + body.count(b"{") > MOST_LEVELS and _is_too_deep(document):
        raise InvalidRequestError(f"The body is nested more than {MOST_LEVELS} levels deep.")
    return document if isinstance(document, dict) else {}


def _is_too_deep(document: Any) -> bool:
    level: list[Any] = [document]
    for _ in range(MOST_LEVELS + 1):
        if not level:
            return False
        below = itertools.chain.from_iterable(map(_members, level))
        level = [member for member in below if isinstance(member, (dict, list))]
    return True


def _members(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container
