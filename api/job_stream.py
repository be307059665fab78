"""One job's entries on their way to one client."""

import logging
import time
from collections.abc import Iterable

from gevent.event import Event
from redis.exceptions import RedisError

from tasks.errors import OverloadedError
from tasks.events import Entry, Position
from tasks.token_log import TokenLog

log = logging.getLogger(__name__)

# Bounds what a client that reads slowly, or one read of a long log, takes of memory.
ENTRIES_AT_ONCE = 500


class ClientGoneError(Exception):
    """The client closed its connection, or has stopped reading."""


class ServerStoppingError(OverloadedError):
    """The server restarts; go on with the job by its id, or send the request again."""

    code = "server_restarting"
    retry_after_s = 1.0


class JobStream:
    """The entries of one job in order, without gaps or repetitions, as they come."""

    def __init__(self, job_id: str, token_log: TokenLog, after: Position | None = None) -> None:
        self.job_id = job_id
        self.position = after
        self._log = token_log
        self._ready: list[Entry] = []
        self._wake = Event()
        self._is_behind = False
        self._is_gone = False
        self._is_left = False
        self._is_nudged = False

    @property
    def is_full(self) -> bool:
        return len(self._ready) >= ENTRIES_AT_ONCE

    def accept(self, entry: Entry) -> None:
        """Takes the entry if it is the next one; if entries before it are missing, notes that."""
        last = self.position
        attempt, seq = entry.position
        if last is None:
            is_next = seq == 0
        elif entry.position <= last:
            return
        else:
            is_next = seq == (last.seq + 1 if attempt == last.attempt else 0)
        if is_next and not self._is_behind and not self.is_full:
            self._take_over([entry])
        else:
            self._is_behind = True
        self._wake.set()

    def catch_up(self) -> None:
        """Has the stream read the log: something may have been missed."""
        self._is_behind = True
        self._wake.set()

    def nudge(self) -> None:
        """Ends the wait of `take`: its caller has something else to tell."""
        self._is_nudged = True
        self._wake.set()

    def hang_up(self) -> None:
        """The client is gone: ends the wait of `take`."""
        self._is_gone = True
        self._wake.set()

    def leave(self) -> None:
        """The process is about to end: ends the wait of `take`."""
        self._is_left = True
        self._wake.set()

    def take(self, timeout_s: float) -> list[Entry]:
        """Everything that came since the last call; [] after that time without any, or a nudge.

        Raises:
            ClientGoneError: the client closed its connection.
            ServerStoppingError: the process is about to end.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            is_awake = self._wake.wait(max(deadline_s - time.monotonic(), 0))
            if not is_awake:
                # Nothing for so long: look whether it was the last message that got lost.
                self._is_behind = True
            self._wake.clear()
            if self._is_gone:
                raise ClientGoneError
            if self._is_left:
                raise ServerStoppingError
            self._catch_up()
            if self._ready or self._is_nudged or not is_awake:
                break
        self._is_nudged = False
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

    def _read_log(self) -> None:
        """Reads on in the log; what is not read yet is left for the next call of `take`."""
        self._is_behind = False
        entries = self._log.read_after(self.job_id, self.position, ENTRIES_AT_ONCE)
        # The log has no gaps but those that a later attempt left: what stands there is next.
        self._take_over(e for e in entries if self.position is None or e.position > self.position)
        if len(entries) == ENTRIES_AT_ONCE or self._is_behind:
            self.catch_up()

    def _take_over(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.position = entry.position
            self._ready.append(entry)
