"""The token log: holds a job's output until its retention ends, on the bus.

The log is the truth, the relay's channels are the fast path: an entry is published only together
with being logged, in one script (lua/append.lua).
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis import Redis
from redis.client import Pipeline

from tasks.contract import keys
from tasks.contract.events import (
    Attempt,
    End,
    Entry,
    Kind,
    Position,
    encode_head,
    encode_value,
)
from tasks.contract.job import Claim
from tasks.contract.job_errors import JobFailedError
from tasks.contract.settings import Settings, get_settings
from tasks.queue.backlog import load_script

log = logging.getLogger(__name__)


class Addressed(NamedTuple):
    """An entry and the API process that listens to its job ('' for none)."""

    entry: Entry
    listener: str


# An entry as lua/append.lua is given it, its log first. A plain tuple of plain values, which the
# garbage collector leaves alone: a worker keeps thousands.
Wire = tuple[str | bytes | int, ...]


class Encoder:
    """Encodes the entries of one attempt; what they have in common only once."""

    def __init__(self, attempt: Attempt, listener: str) -> None:
        """`listener`: the API process that listens to the job, '' for none."""
        self._name, self._attempt = attempt.job_id.encode(), attempt.number
        self._log = keys.log(attempt.job_id)
        self._channel = keys.relay(listener) if listener else ""

    def encode(self, seq: int, kind: Kind, data: bytes, record: bytes = b"") -> Wire:
        value, attempt, channel = encode_value(kind, data), self._attempt, self._channel
        is_last = 1 if kind is Kind.END else 0
        head = encode_head(self._name, attempt, seq, value) if channel else b""
        return self._log, f"{attempt}-{seq}", value, record, is_last, channel, head


def wire_arguments(batch: Sequence[Wire], settings: Settings) -> dict[str, list[Any]]:
    """Keys and arguments of lua/append.lua."""
    args: list[Any] = [settings.job_ttl_s]
    for wire in batch:
        args += wire[1:]
    return {"keys": [wire[0] for wire in batch], "args": args}


def append_arguments(batch: Sequence[Addressed], settings: Settings) -> dict[str, list[Any]]:
    """The same of entries that are not encoded yet."""
    return wire_arguments([_encode(*addressed) for addressed in batch], settings)


def _encode(entry: Entry, listener: str) -> Wire:
    attempt, seq = entry.position
    encoder = Encoder(Attempt(entry.job_id, attempt), listener)
    return encoder.encode(seq, entry.kind, entry.data, entry.record)


class TokenLog:
    """Reads logs; writes first entries of later attempts, and last ones of jobs without worker."""

    def __init__(self, bus: Redis, settings: Settings | None = None) -> None:
        self._bus = bus
        self._settings = settings or get_settings()
        self._append = load_script(bus, "append")

    def read_after(
        self, job_id: str, position: Position | None = None, count: int | None = None
    ) -> list[Entry]:
        """The entries after that position, or all of them; at most `count`."""
        start = f"({position}" if position else "-"
        reply: Any = self._bus.xrange(keys.log(job_id), start, "+", count)
        return [Entry.decode_log(job_id, log_id, fields) for log_id, fields in reply]

    def last(self, job_id: str) -> Entry | None:
        """The newest entry, if there is one."""
        reply: Any = self._bus.xrevrange(keys.log(job_id), count=1)
        for log_id, fields in reply:
            return Entry.decode_log(job_id, log_id, fields)
        return None

    def expire(self, job_ids: Sequence[str]) -> None:
        """Lets logs expire that nobody will add to or has to read for SQL any more."""
        pipeline = self._bus.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.expire(keys.log(job_id), self._settings.log_retention_s, nx=True)
        pipeline.execute()

    def take_over(self, job_id: str, attempt: int, listener: str) -> list[Entry]:
        """What earlier attempts wrote, to which they cannot add any more; the takeover is the last.

        Doing it again is harmless.
        """
        key, position = keys.log(job_id), Position(attempt, 0)

        def write(pipeline: Pipeline) -> None:
            # A write between the read and the takeover makes Redis retry both.
            last: Any = pipeline.xrevrange(key, count=1)
            pipeline.multi()
            entry = Entry(job_id, position, Kind.TAKEOVER, last[0][0] if last else b"")
            arguments = append_arguments([Addressed(entry, listener)], self._settings)
            self._append(**arguments, client=pipeline)

        self._delete_unless_log(key)
        self._bus.transaction(write, key)
        return [entry for entry in self.read_after(job_id) if entry.position <= position]

    def end_given_up(self, claim: Claim) -> None:
        """Ends the log of a job that has failed for the last time without an answer."""
        end = End.failed(JobFailedError())
        self.end(claim.job.id, claim.attempt, end, claim.job.listener)

    def end(self, job_id: str, attempt: int, end: End, listener: str) -> None:
        """Ends a log over the head of `attempt`, whose later entries Redis then refuses."""
        self._delete_unless_log(keys.log(job_id))
        entry = Entry(job_id, Position(attempt + 1, 0), Kind.END, end.encode())
        self._append(**append_arguments([Addressed(entry, listener)], self._settings))

    def _delete_unless_log(self, key: str) -> None:
        """Deletes what somebody has put in a log's place: nothing could be written there."""
        if self._bus.type(key) not in (b"stream", b"none"):
            log.error("%s was no log any more, and is deleted", key)
            self._bus.delete(key)
