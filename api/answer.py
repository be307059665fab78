"""A job's answer as HTTP: taken from its stream, given back as it comes, unchanged."""

import time
from collections.abc import Iterator
from urllib.parse import quote

import orjson
from flask import Response

from api.encoders.sse import DONE, KEEP_ALIVE, error_event, event_stream
from api.ends import end_without_log
from api.errors import respond_again
from api.relay import CUT_OFF, ClientDisconnectedError, JobStream
from api.services import Services
from tasks.contract.errors import RequestTimeoutError
from tasks.contract.events import End, Entry, Start
from tasks.contract.job_errors import StreamBrokenError
from tasks.contract.response import Chunk, Finish, read, split_events

# Of a name, what a header holds as it is.
_IN_HEADERS = "".join(set(map(chr, range(0x20, 0x7F))) - {"%"})
# The connection's own, or set by this server.
NOT_PASSED_ON = {
    *("content-length", "content-type", "transfer-encoding", "connection", "date", "server"),
    "x-request-id",
}


class Answer:
    """What a job sends back: a head, then a body or events, then an end."""

    def __init__(self, services: Services, stream: JobStream, model: str, is_own: bool) -> None:
        self.head: Start | None = None
        self.answered_ns = 0
        """When the head came, since the epoch; 0: it has not."""
        self.end: End | None = None
        self.is_whole = False
        """Whether nothing more comes for the client: of a stream that is so before the job ends."""
        self._services = services
        self._settings = services.settings
        self._stream = stream
        self._model = model
        self._is_own = is_own
        self._begun_s = time.monotonic()

    def respond(self, wants_stream: bool) -> Response:
        """Waits for the head of the answer and gives it back; its body may still be coming.

        Raises:
            RequestTimeoutError: no answer came within the time limit.
            ClientDisconnectedError: the client left.
        """
        response = self._respond(wants_stream)
        response.headers.extend(self._headers())
        return response

    @property
    def error_code(self) -> str:
        """Of the error that the job has ended with; empty: it has not."""
        error = self.end.error.get("error") if self.end else None
        return str(error.get("code") or error.get("type")) if error else ""

    def chunks(self) -> Iterator[bytes]:
        """Each chunk's JSON, or the body's when it is not streamed; an error is one more.

        Raises:
            ClientDisconnectedError: the client left.
        """
        body = b""
        while self.end is None:
            piece, _ = self._take(self._settings.keep_alive_s)
            if self.head and self.head.is_event_stream:
                yield from split_events(piece)
            else:
                body += piece
        if self.end.error:
            yield orjson.dumps(self.end.error)
        elif body:
            yield body

    def _respond(self, wants_stream: bool) -> Response:
        settings = self._settings
        patience_s = settings.keep_alive_s if wants_stream else settings.request_timeout_s
        first = self._until_head(patience_s)
        if self.head is None and wants_stream and self.end is None:
            # Queued for long: the client must hear something now, so the status is decided.
            return event_stream(self._late_events())
        if self.head is None:
            return self._failure()
        if self.head.is_event_stream:
            return event_stream(self._events(first))
        body = first + self._rest()
        if self.end and self.end.error:
            return self._failure()
        return Response(body, self.head.status, content_type=self.head.content_type)

    def _failure(self) -> Response:
        if self.end is None:
            raise RequestTimeoutError
        return respond_again(self.end.error)

    def _headers(self) -> dict[str, str]:
        headers = {"x-sluice-job": self._stream.job_id, "x-sluice-model": as_header(self._model)}
        if self.head is None:
            return headers
        passed_on = {n: v for n, v in self.head.headers if n not in NOT_PASSED_ON}
        own = {
            "x-sluice-queue-ms": str(self.head.queue_ms),
            "x-sluice-attempts": str(self.head.attempt),
            "openai-processing-ms": str(round((time.monotonic() - self._begun_s) * 1000)),
        }
        return passed_on | headers | own

    def _until_head(self, patience_s: float) -> bytes:
        """Waits for the head; returns what of the body came along with it."""
        deadline_s = time.monotonic() + patience_s
        while self.head is None and self.end is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return b""
            body, _ = self._take(left_s)
            if body:
                return body
        return b""

    def _rest(self) -> bytes:
        """The rest of a body that is not streamed to the client."""
        deadline_s = self._begun_s + self._settings.request_timeout_s
        parts = []
        while self.end is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise RequestTimeoutError
            parts.append(self._take(left_s)[0])
        return b"".join(parts)

    def _events(self, first: bytes) -> Iterator[bytes]:
        """The engine's events as they come; several may share a write when there is much to do."""
        if first:
            yield first
        try:
            while self.end is None:
                piece, is_idle = self._take(self._settings.keep_alive_s)
                if piece:
                    yield piece
                elif is_idle and self.end is None:
                    yield KEEP_ALIVE
        except ClientDisconnectedError:
            return
        except CUT_OFF as cut_off:
            yield error_event(orjson.dumps(cut_off.body()))
            return
        if self.end.error:
            yield error_event(orjson.dumps(self.end.error))

    def _late_events(self) -> Iterator[bytes]:
        """The same for an answer whose head was not there in time: a refusal becomes an event."""
        yield KEEP_ALIVE
        first = b""
        try:
            while self.head is None and self.end is None:
                first = self._until_head(self._settings.keep_alive_s)
                if self.head is None and self.end is None:
                    yield KEEP_ALIVE
            if self.head is None or self.head.is_event_stream:
                yield from self._events(first)
            else:
                yield error_event(first + self._rest())
        except ClientDisconnectedError:
            return
        except (RequestTimeoutError, *CUT_OFF) as late:
            yield error_event(orjson.dumps(late.body()))

    def _take(self, timeout_s: float) -> tuple[bytes, bool]:
        """The body's next piece, and whether nothing came for the length of a keep-alive."""
        try:
            entries = self._stream.take(min(timeout_s, self._settings.keep_alive_s))
        except StreamBrokenError as broken:
            self.end = End.failed(broken)
            return b"", False
        if not entries:
            job_id = self._stream.job_id
            self.end = end_without_log(self._services, job_id, is_accepted=not self._is_own)
        return self._absorb(entries), not entries

    def _absorb(self, entries: list[Entry]) -> bytes:
        """Notes heads and ends; returns the pieces of the body."""
        pieces = []
        for part in read(entries):
            if isinstance(part, Chunk):
                pieces.append(part.data)
            elif isinstance(part, Finish):
                self.end = part.end
            elif self.head is None:
                self.head, self.answered_ns = part.start, time.time_ns()
            else:
                # Redis has lost what this client has.
                self.end = End.failed(StreamBrokenError())
                break
        self.is_whole |= bool(pieces) and pieces[-1].endswith(DONE)
        return b"".join(pieces)


def as_header(name: str) -> str:
    """A model's name as headers can hold it: what is not ASCII in the form of URLs."""
    return quote(name, safe=_IN_HEADERS)
