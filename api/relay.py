"""From Redis to the requests that wait: one subscription per API process, one stream per client.

Entries of a job that this process submitted come over the process's channel. When one is missing
(Redis or the connection was away, a message was dropped) the stream reads what it lacks from the
job's token log. Who follows a job that any process may have submitted reads its log only: one
blocking read for all of them.
"""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
from gevent.event import Event
from redis.client import PubSub
from redis.exceptions import RedisError

from api.instruments import STREAMS
from api.job_stream import ENTRIES_AT_ONCE, JobStream
from tasks.contract import keys
from tasks.contract.connections import connect_listener
from tasks.contract.errors import DecodeError
from tasks.contract.events import Entry, Position, decode_frame
from tasks.queue.token_log import TokenLog

log = logging.getLogger(__name__)

RECONNECT_S = 0.25
# A job that is newly followed joins the next blocking read.
FOLLOW_MS = 200


class Relay:
    """The subscription of this process, and the streams that it feeds."""

    def __init__(self, bus_url: str, token_log: TokenLog) -> None:
        self.process = uuid.uuid4().hex
        self._bus_url = bus_url
        self._log = token_log
        self._streams: dict[str, JobStream] = {}
        self._followed: set[JobStream] = set()
        self._has_followed = Event()

    @property
    def open_streams(self) -> int:
        return len(self._streams) + len(self._followed)

    @contextmanager
    def stream(self, job_id: str) -> Iterator[JobStream]:
        """The stream of a job, fed from now until exit; open it before the job is submitted."""
        stream = self._streams[job_id] = JobStream(job_id, self._log)
        try:
            with STREAMS.track_inprogress():
                yield stream
        finally:
            del self._streams[job_id]

    @contextmanager
    def follow(self, job_id: str, after: Position | None = None) -> Iterator[JobStream]:
        """The stream of a job that exists, from the start of its log or after a position."""
        stream = JobStream(job_id, self._log, after, self._has_followed.set)
        stream.catch_up()
        self._followed.add(stream)
        try:
            with STREAMS.track_inprogress():
                yield stream
        finally:
            self._followed.discard(stream)

    def stop(self) -> None:
        """Tells who follows a job that this process ends; the job goes on."""
        for stream in list(self._followed):
            stream.server_stopping()

    def start(self) -> None:
        """Starts feeding the streams."""
        gevent.spawn(self._for_ever, self._listen)
        gevent.spawn(self._for_ever, self._read_logs)

    def _for_ever(self, feed: Any) -> None:
        """Feeds from Redis; after each break, connects again and has all streams catch up."""
        bus = connect_listener(self._bus_url)
        while True:
            try:
                feed(bus)
            except RedisError as failure:
                log.warning("relay lost its connection, connecting again: %s", failure)
            except Exception:  # without it every stream of this process would stand still
                log.exception("relay: %s failed, and goes on", feed.__name__)
            else:
                continue
            gevent.sleep(RECONNECT_S)
            self._catch_up()

    def _listen(self, bus: Any) -> None:
        with bus.pubsub() as subscription:
            self._dispatch(subscription)

    def _dispatch(self, subscription: PubSub) -> None:
        subscription.subscribe(keys.relay(self.process))
        for message in subscription.listen():  # type: ignore[no-untyped-call]
            if message["type"] == "subscribe":
                self._catch_up()
                continue
            try:
                for entry in decode_frame(message["data"]):
                    if stream := self._streams.get(entry.job_id):
                        stream.accept(entry)
            except DecodeError:
                log.exception("relay message dropped; the streams read the log")
                self._catch_up()

    def _read_logs(self, bus: Any) -> None:
        """One blocking read of all logs that are followed."""
        waiting: dict[str, list[JobStream]] = {}
        for stream in self._followed:
            if stream.is_fed:
                waiting.setdefault(stream.job_id, []).append(stream)
        if not waiting:
            self._has_followed.clear()
            self._has_followed.wait(FOLLOW_MS / 1000)
            return
        positions = {
            keys.log(job_id): str(min(stream.position or Position(0, 0) for stream in streams))
            for job_id, streams in waiting.items()
        }
        for key, entries in bus.xread(positions, count=ENTRIES_AT_ONCE, block=FOLLOW_MS):
            job_id = key.decode().removeprefix(keys.LOG_PREFIX)
            try:
                for log_id, fields in entries:
                    entry = Entry.decode_log(job_id, log_id, fields)
                    for stream in waiting[job_id]:
                        stream.accept(entry)
            except DecodeError as broken:
                # One job's; the others are read on.
                log.error("relay: %s", broken)
                for stream in waiting[job_id]:
                    stream.break_off()

    def _catch_up(self) -> None:
        for stream in [*self._streams.values(), *self._followed]:
            stream.catch_up()
