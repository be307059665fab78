"""From Redis to the requests that wait: one subscription per API process, one stream per client.

Entries of a job that this process submitted come over the process's channel. When one is missing
(Redis or the connection was away, a message was dropped) the stream reads what it lacks from the
job's token log. Who follows a job that any process may have submitted reads its log only: one
blocking read for all of them.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
from gevent.event import Event
from redis.client import PubSub
from redis.exceptions import RedisError

from api.instruments import STREAMS
from tasks.contract import keys
from tasks.contract.connections import connect_listener
from tasks.contract.errors import DecodeError, KeyRevokedError, OverloadedError
from tasks.contract.events import Entry, Kind, Position, decode_frame
from tasks.contract.job_errors import StreamBrokenError
from tasks.queue.token_log import TokenLog

log = logging.getLogger(__name__)

RECONNECT_S = 0.25
# A job that is newly followed joins the next blocking read.
FOLLOW_MS = 200
# Bounds what a client that reads slowly, or one read of a long log, takes of memory.
ENTRIES_AT_ONCE = 500


class ClientDisconnectedError(Exception):
    """The client closed its connection, or has stopped reading."""


class ServerStoppingError(OverloadedError):
    """The server restarts; go on with the job by its id, or send the request again."""

    code = "server_restarting"
    retry_after_s = 1.0


# With them a stream ends that is no longer served, while its job may go on.
CutOff = ServerStoppingError | KeyRevokedError
CUT_OFF = (ServerStoppingError, KeyRevokedError)


class JobStream:
    """The entries of one job in order, without gaps or repetitions, as they come."""

    def __init__(
        self,
        job_id: str,
        token_log: TokenLog,
        after: Position | None = None,
        on_fed: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_fed` is called when it has read the log to its end, and takes what comes."""
        self.job_id = job_id
        self.position = after
        self._log = token_log
        self._on_fed = on_fed
        self._ready: list[Entry] = []
        self._wake = Event()
        self._is_behind = False
        self._is_disconnected = False
        self._cut_off: CutOff | None = None
        self._is_broken = False
        self._is_woken = False

    @property
    def is_fed(self) -> bool:
        """Whether it takes what comes: not while its client is slow, or it reads the log itself."""
        return not (self._is_behind or self._is_broken or len(self._ready) >= ENTRIES_AT_ONCE)

    def accept(self, entry: Entry) -> None:
        """Takes the entry if it is the next one; if entries before it are missing, notes that."""
        if self.position is not None and entry.position <= self.position:
            return
        if self._is_next(entry) and self.is_fed:
            self._take_over([entry])
        else:
            self._is_behind = True
        self._wake.set()

    def _is_next(self, entry: Entry) -> bool:
        last = self.position
        if entry.kind is Kind.TAKEOVER:
            return entry.data.decode() == ("" if last is None else str(last))
        if last is None:
            return entry.kind is Kind.START and entry.position.seq == 0
        return entry.position == (last.attempt, last.seq + 1)

    def catch_up(self) -> None:
        """Has the stream read the log: something may have been missed."""
        self._is_behind = True
        self._wake.set()

    def wake_up(self) -> None:
        """Ends the wait of `take`: its caller has something else to tell."""
        self._is_woken = True
        self._wake.set()

    def client_disconnected(self) -> None:
        """The client is gone: ends the wait of `take`."""
        self._is_disconnected = True
        self._wake.set()

    def cut_off(self, reason: CutOff) -> None:
        """The stream is no longer served: ends the wait of `take`."""
        self._cut_off = reason
        self._wake.set()

    def break_off(self) -> None:
        """What is in the log cannot follow what was taken: the next `take` raises."""
        self._is_broken = True
        self._wake.set()

    def take(self, timeout_s: float) -> list[Entry]:
        """Everything that came since the last call; [] after that time without any, or a wake_up.

        Raises:
            ClientDisconnectedError: the client closed its connection.
            ServerStoppingError: the process is about to end.
            KeyRevokedError: the client's key is not valid any more.
            StreamBrokenError: what comes next is not what follows.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            is_awake = self._wake.wait(max(deadline_s - time.monotonic(), 0))
            if not is_awake:
                # Nothing for so long: look whether it was the last message that got lost.
                self._is_behind = True
            self._wake.clear()
            if self._is_disconnected:
                raise ClientDisconnectedError
            if self._cut_off:
                raise self._cut_off
            self._catch_up()
            if self._is_broken and not self._ready:
                raise StreamBrokenError
            if self._ready or self._is_woken or not is_awake:
                break
        if self._is_broken:
            self._wake.set()
        self._is_woken = False
        taken, self._ready = self._ready, []
        return taken

    def _catch_up(self) -> None:
        if not self._is_behind:
            return
        try:
            self._read_log()
        except RedisError as failure:
            # The relay has lost its connection too, and wakes all streams when it is back.
            log.warning("job %s: log not read: %s", self.job_id, failure)
            self._is_behind = True
        except DecodeError as broken:
            log.error("job %s: %s", self.job_id, broken)
            self.break_off()

    def _read_log(self) -> None:
        """Reads on in the log; what is not read yet is left for the next call of `take`."""
        self._is_behind = False
        entries = self._log.read_after(self.job_id, self.position, ENTRIES_AT_ONCE)
        # The log has no gaps but those that a later attempt left: what stands there is next.
        self._take_over(e for e in entries if self.position is None or e.position > self.position)
        if len(entries) == ENTRIES_AT_ONCE or self._is_behind:
            self.catch_up()
        else:
            self._on_fed()

    def _take_over(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if self._has_more_than(entry):
                self.break_off()
            if self._is_broken:
                return
            self.position = entry.position
            self._ready.append(entry)

    def _has_more_than(self, entry: Entry) -> bool:
        """Whether an attempt takes over from an entry before what the client has: Redis lost it."""
        if entry.kind is not Kind.TAKEOVER or self.position is None:
            return False
        return not entry.data or self.position > Position.parse(entry.data)


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
            stream.cut_off(ServerStoppingError())

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
