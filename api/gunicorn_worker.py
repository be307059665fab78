"""gunicorn's gevent worker, with bounds on its connections and on the time that headers take."""

import logging
import socket
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import gevent
import orjson
from gunicorn import util
from gunicorn.http.errors import ParseException
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.workers.ggevent import GeventWorker

from api.connection_limits import REFUSED_AT_ONCE
from tasks.contract.errors import HttpError, SluiceError, TooManyConnectionsError, headers_of

REFUSAL_TIMEOUT_S = 1.0
MOST_READS = 10
# How gunicorn begins the line of a request that fails in its hands; the URI follows.
UNEXPECTED = "Error handling request"


def _encode(error: SluiceError) -> bytes:
    """An error as a whole HTTP response, for connections that never reach the app."""
    body = orjson.dumps(error.body())
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers_of(error).items()),
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


REFUSAL = _encode(TooManyConnectionsError())


def _write_error(client: Any, status: int, reason: str, message: str) -> None:
    """Refuses what is not HTTP as we refuse everything; gunicorn itself would answer in HTML."""
    client.sendall(_encode(HttpError(status, message or reason)))


util.write_error = _write_error


class _Request(Request):  # type: ignore[misc]
    """A request whose headers have as long as a body; gunicorn bounds only its idle connections."""

    def parse(self, unreader: Any) -> Any:
        """Reads the headers; returns what follows them (gunicorn's name)."""
        # Not before gevent's patches: it brings much of the standard library.
        from tasks.contract.settings import get_settings

        # The connection is idle until the first byte.
        unreader.unread(unreader.read())
        late = HttpError(
            HTTPStatus.REQUEST_TIMEOUT, "The request's headers did not arrive in time."
        )
        with gevent.Timeout(get_settings().body_timeout_s, late):
            return super().parse(unreader)


RequestParser.mesg_class = _Request


def leave_out_request(record: logging.LogRecord) -> bool:
    """Logs what was wrong with a request; not the words in it."""
    message = record.getMessage()
    if message.startswith("Invalid request"):
        record.msg, record.args = ": ".join(message.split(": ")[:2]), ()
    elif message.startswith(UNEXPECTED):
        record.msg, record.args = UNEXPECTED, ()
        error = record.exc_info and record.exc_info[1]
        if isinstance(error, ParseException):
            # Its message shows the header that cannot be sent.
            record.msg, record.exc_info = f"{UNEXPECTED}: {type(error).__name__}", None
    return True


class Worker(GeventWorker):  # type: ignore[misc]
    """Serves `worker_connections` less REFUSED_AT_ONCE, and answers 503 to the next ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free = self.worker_connections - REFUSED_AT_ONCE

    def init_process(self) -> None:
        """Runs the worker (gunicorn's name)."""
        self.log.error_log.addFilter(leave_out_request)
        super().init_process()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serves one connection to its end (gunicorn's name)."""
        if self._free <= 0:
            self._refuse(client, REFUSAL)
            return
        self._free -= 1
        try:
            super().handle(listener, client, addr)
        finally:
            self._free += 1

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answers a request that never reaches the app (gunicorn's name)."""
        if isinstance(exc, HttpError):
            self._refuse(client, _encode(exc))
        else:
            super().handle_error(req, client, addr, exc)

    def _refuse(self, client: Any, response: bytes) -> None:
        client.settimeout(REFUSAL_TIMEOUT_S)
        with suppress(OSError), client:
            client.sendall(response)
            client.shutdown(socket.SHUT_WR)
            # A connection that is closed with unread bytes takes back what was said.
            for _ in range(MOST_READS):
                if not client.recv(65536):
                    break
