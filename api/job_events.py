"""A job's events with their ids, from the start or after any of them: the same bytes each time.

Only what the job's log holds has an id. Where it stands in the queue, and that the connection
lives, is told in between and not again.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import orjson
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from api.encoders.sse import error_event
from api.ends import end_without_log, is_kept
from api.generation import cancel_accepted
from api.job_view import describe, find_queued, positions_of
from api.principal import Principal
from api.relay import ClientDisconnectedError, JobStream, ServerStoppingError
from api.schemas import EVENT_ID
from api.services import Services
from tasks.contract.errors import InvalidRequestError, JobNotFoundError, KeyRevokedError
from tasks.contract.events import End, Kind, Position, Start
from tasks.contract.job import State
from tasks.contract.job_errors import JobLostError, StreamBrokenError
from tasks.contract.response import DONE, Finish, Head, Part, read
from tasks.queue.depth import QueuePosition

# A log begins with its head, after the takeovers of attempts that got no further.
HEAD_WITHIN = 50
_POSITION = re.compile(EVENT_ID)


class Event(NamedTuple):
    """One event; `name` is empty for the job's own, `id` for those that are not repeated."""

    id: str
    name: str
    data: bytes

    def encode(self) -> bytes:
        """As a server-sent event."""
        lines = [b"data: " + line for line in self.data.split(b"\n")]
        if self.name:
            lines.insert(0, b"event: " + self.name.encode())
        if self.id:
            lines.insert(0, b"id: " + self.id.encode())
        return b"\n".join(lines) + b"\n\n"

    def encode_frame(self) -> str:
        """As a WebSocket's text frame."""
        if self.data == DONE:
            return DONE.decode()
        frame = {"event": self.name or "chunk", "id": self.id or None}
        return orjson.dumps(frame | {"data": orjson.Fragment(self.data)}).decode()


KEEP_ALIVE = Event("", "keep-alive", b"")


class JobEvents:
    """The events of one job for one client."""

    def __init__(
        self, services: Services, tenant: str, stream: JobStream, head: Start | None
    ) -> None:
        self._services = services
        self._tenant = tenant
        self._stream = stream
        self._head = head
        self._has_ended = False
        self._has_sent = False
        self._body: list[bytes] = []

    def follow(self, place: QueuePosition | None) -> Iterator[Event]:
        """The events as they come, KEEP_ALIVE where nothing has come for long; ends with the job.

        Raises:
            ClientDisconnectedError: the client has left.
            ServerStoppingError, KeyRevokedError: it is no longer served.
        """
        keep_alive_s = self._services.settings.keep_alive_s
        with self._services.queue_positions.watching(self._stream) as queue:
            if place:
                yield _position_event(place)
            while not self._has_ended:
                try:
                    entries = self._stream.take(keep_alive_s)
                except StreamBrokenError as broken:
                    yield from self._encode_end("", End.failed(broken))
                    return
                moved = queue.take()
                if moved and not entries and self._head is None:
                    yield _position_event(moved)
                elif not entries and (end := end_without_log(self._services, self._job_id)):
                    yield from self._encode_missing_end(end)
                elif not entries:
                    yield KEEP_ALIVE
                for part in read(entries):
                    yield from self._encode(part)
                    if self._has_ended:
                        break

    @property
    def _job_id(self) -> str:
        return self._stream.job_id

    def _encode_missing_end(self, end: End) -> Iterator[Event]:
        """An end that the log does not tell; SQL may know more of one that Redis has lost."""
        stored = None
        if end.error == JobLostError().body() and not self._has_sent:
            with suppress(JobNotFoundError, RedisError, SQLAlchemyError):
                stored = describe(self._services, self._tenant, self._job_id)
        if stored is None or not State(stored["status"]).is_final:
            yield from self._encode_end("", end)
            return
        self._has_ended = True
        yield Event("", "", _stored_answer(stored))
        yield Event("", "", DONE)

    def _encode(self, part: Part) -> Iterator[Event]:
        if isinstance(part, Head) and self._has_sent:
            # The job runs anew: Redis has lost what this client has.
            yield from self._encode_end("", End.failed(StreamBrokenError()))
        elif isinstance(part, Head):
            self._body.clear()
            self._head = part.start
        elif isinstance(part, Finish):
            yield from self._encode_end(str(part.position), part.end)
        elif self._head and self._head.is_event_stream:
            self._has_sent = True
            yield Event(str(part.position), "", part.event_data)
        else:
            self._body.append(part.data)

    def _encode_end(self, position: str, end: End) -> Iterator[Event]:
        self._has_ended = True
        if end.error:
            yield Event(position, "", orjson.dumps(end.error))
        elif self._head and self._head.is_event_stream:
            return
        else:
            yield Event(position, "", b"".join(self._body))
        yield Event("", "", DONE)


class Follower:
    """A client that follows a job from one of its events on."""

    def __init__(
        self, services: Services, principal: Principal, job_id: str, wanted: str | None
    ) -> None:
        """Looks the job up.

        Raises:
            JobNotFoundError: the tenant has no such job.
            InvalidRequestError: the position is none, or beyond the end.
        """
        self._services = services
        self._principal = principal
        self._job_id = job_id
        self._job = find_queued(services, principal.tenant, job_id)
        self._stored: dict[str, Any] | None = None
        self._has_cancelled = False
        self._has_left = False
        if self._job is None:
            # One that SQL keeps is about to be queued: what is to be followed is its log.
            is_coming = is_kept(services, job_id)
            stored = describe(services, principal.tenant, job_id)
            self._stored = None if is_coming else stored
            self._model = stored["model"]
        else:
            self._model = self._job.job.model
        self.stream: JobStream | None = None
        after = _read_position(wanted) if wanted else None
        last = services.jobs.log.last(job_id) if self._stored is None else None
        if self._stored is None and after and (last is None or after > last.position):
            raise InvalidRequestError(
                f"The job has no event {wanted} yet; go on after one that you have received.",
                param="starting_after",
            )
        self._after = after
        self._is_over = last is not None and last.kind is Kind.END and after == last.position

    def cancel(self) -> None:
        """Cancels the job; once, however often it is said."""
        if self._stored is None and not self._has_cancelled:
            self._has_cancelled = True
            cancel_accepted(self._services, self._job_id, self._model)

    def client_disconnected(self) -> None:
        """The client is gone: ends `events`, also if it is still to begin."""
        self._has_left = True
        if self.stream:
            self.stream.client_disconnected()

    def events(self) -> Iterator[Event]:
        """The events; closing the iterator lets go of the job."""
        if self._stored is not None:
            yield Event("", "", _stored_answer(self._stored))
        if self._stored is not None or self._is_over:
            yield Event("", "", DONE)
            return
        head, after = self._head(), self._after
        if head is not None and not head.is_event_stream:
            after = None
        services, principal = self._services, self._principal
        with services.relay.follow(self._job_id, after) as stream:
            cut_off = partial(stream.cut_off, KeyRevokedError())
            with services.keyring.watching(principal, cut_off):
                self.stream = stream
                if self._has_left:
                    stream.client_disconnected()
                (place,) = positions_of(services, [self._job]) if self._job else [None]
                yield from JobEvents(services, principal.tenant, stream, head).follow(place)

    def _head(self) -> Start | None:
        """The head, when events before the first wanted one told it."""
        if self._after is None:
            return None
        entries = self._services.jobs.log.read_after(self._job_id, None, HEAD_WITHIN)
        heads = [part.start for part in read(entries) if isinstance(part, Head)]
        return heads[-1] if heads else None


def _read_position(text: str) -> Position:
    if not _POSITION.fullmatch(text):
        raise InvalidRequestError(
            f"{text[:50]!r} is not the id of an event, as in 1-12.", param="starting_after"
        )
    return Position.parse(text.encode())


def _stored_answer(job: dict[str, Any]) -> bytes:
    if job["response"]:
        return orjson.dumps(job["response"]["body"])
    if not State(job["status"]).is_final:
        return orjson.dumps(JobLostError().body())
    return orjson.dumps({"error": job["error"]})


def _position_event(place: QueuePosition) -> Event:
    return Event("", "queue", orjson.dumps(place._asdict()))


def encode(events: Iterator[Event]) -> Iterator[bytes]:
    """Server-sent events; a keep-alive is a comment. When this process ends, clients come back.

    When their key is refused, they do not.
    """
    try:
        for event in events:
            yield b": keep-alive\n\n" if event is KEEP_ALIVE else event.encode()
    except ClientDisconnectedError:
        return
    except ServerStoppingError:
        yield b"retry: 500\n\n"
    except KeyRevokedError as revoked:
        yield error_event(orjson.dumps(revoked.body()))
