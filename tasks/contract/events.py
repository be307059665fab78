"""What a worker sends back: entries of a job's token log, also published to the relay.

An entry is START (status and headers), BODY (a piece of the response's body), END (how it ended),
or TAKEOVER, the first entry of each attempt after the first: its data is the position of the last
entry that it goes on from, b"" for none. A client that has more than that has what is gone.
Its position is `<attempt>-<seq>`: the id in the log, where Redis refuses ids that do not grow, so
nothing that a worker writes after another took over can enter. `seq` counts from 0 without gaps.
What the next attempt needs to go on is stored beside the entries, as records, for workers only.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, Self

import orjson

from tasks.contract.errors import DecodeError, SluiceError
from tasks.contract.job import Claim, State

LOG_FIELD = b"e"
RECORD_FIELD = b"r"


class Attempt(NamedTuple):
    """One run of a job: what a worker holds, runs and stops on command."""

    job_id: str
    number: int

    def __str__(self) -> str:
        """As sent on a control channel."""
        return f"{self.job_id} {self.number}"

    @classmethod
    def parse(cls, message: bytes) -> Self:
        """Parses the output of `str`.

        Raises:
            DecodeError: it is something else.
        """
        try:
            job_id, number = message.decode().split()
            return cls(job_id, int(number))
        except ValueError as broken:
            raise DecodeError(f"no attempt of a job: {message[:100]!r}") from broken

    @classmethod
    def of(cls, claim: Claim) -> Self:
        return cls(claim.job.id, claim.attempt)


class Kind(IntEnum):
    START = 0
    BODY = 1
    END = 2
    TAKEOVER = 3
    NOTE = 4
    """Has a record alone, for the next attempt of an answer that is not streamed."""


class Position(NamedTuple):
    """An entry's position in a job's log; positions compare in the order of the log."""

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"

    @classmethod
    def parse(cls, log_id: bytes) -> Self:
        attempt, _, seq = log_id.partition(b"-")
        return cls(int(attempt), int(seq))


# attempt u32, seq u32, length of the job id u8, length of the value u32; then id and value.
_HEADER = struct.Struct("!IIBI")


# By its number; to ask the enumeration takes longer.
_KINDS = tuple(Kind)
_KIND_BYTES = [bytes((kind,)) for kind in Kind]


def encode_value(kind: Kind, data: bytes) -> bytes:
    """One byte kind, then the data."""
    return _KIND_BYTES[kind] + data


def encode_head(name: bytes, attempt: int, seq: int, value: bytes) -> bytes:
    """What precedes the value in a frame (lua/append.lua puts frames together)."""
    return _HEADER.pack(attempt, seq, len(name), len(value)) + name


class Entry(NamedTuple):
    job_id: str
    position: Position
    kind: Kind
    data: bytes
    record: bytes = b""
    """The engine's notes to reproduce this entry and go on after it, if its worker dies."""

    def encode_value(self) -> bytes:
        """The value of LOG_FIELD, and the entry's part of a frame."""
        return encode_value(self.kind, self.data)

    @classmethod
    def decode_log(cls, job_id: str, log_id: bytes, fields: dict[bytes, bytes]) -> Self:
        """Reads an entry of the log.

        Raises:
            DecodeError: it has another shape.
        """
        try:
            value, record = fields[LOG_FIELD], fields.get(RECORD_FIELD, b"")
            return cls(job_id, Position.parse(log_id), _KINDS[value[0]], value[1:], record)
        except (ValueError, IndexError, KeyError) as broken:
            raise DecodeError(f"log entry {log_id!r} of {job_id}: {broken}") from broken


def decode_frame(frame: bytes) -> Iterator[Entry]:
    """The entries of a relay message.

    Raises:
        DecodeError: the frame is cut or of another version.
    """
    offset, size = 0, len(frame)
    try:
        while offset < size:
            attempt, seq, name_length, length = _HEADER.unpack_from(frame, offset)
            start = offset + _HEADER.size
            offset = start + name_length + length
            job_id = frame[start : start + name_length].decode()
            value = frame[start + name_length : offset]
            yield Entry(job_id, Position(attempt, seq), _KINDS[value[0]], value[1:])
    except (struct.error, ValueError, IndexError) as broken:
        raise DecodeError(f"relay frame: {broken}") from broken


@dataclass(frozen=True, slots=True)
class Start:
    """Data of a START entry: the response's head, and how the job got there."""

    status: int
    headers: list[tuple[str, str]]
    queue_ms: int
    attempt: int

    def encode(self) -> bytes:
        return orjson.dumps([self.status, self.headers, self.queue_ms, self.attempt])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads what `encode` writes.

        Raises:
            DecodeError: it is something else.
        """
        try:
            status, headers, queue_ms, attempt = orjson.loads(data)
            return cls(status, [(name, value) for name, value in headers], queue_ms, attempt)
        except (ValueError, TypeError, KeyError) as broken:
            raise DecodeError(f"no start of an answer: {data[:100]!r}") from broken

    @property
    def content_type(self) -> str:
        return dict(self.headers).get("content-type", "application/json")

    @property
    def is_event_stream(self) -> bool:
        return self.content_type.startswith("text/event-stream")


@dataclass(frozen=True, slots=True)
class End:
    """Data of an END entry: the job's final state, the error object if it has one.

    Also the answer's usage, as far as its engine knows: no event of a stream may report it.
    """

    state: State
    error: dict[str, Any] = field(default_factory=dict)
    status: int = 500
    usage: dict[str, Any] | None = None

    @classmethod
    def failed(cls, error: SluiceError, state: State = State.FAILED) -> Self:
        """The end of a job with this error."""
        return cls(state, error.body(), error.status)

    def encode(self) -> bytes:
        return orjson.dumps([self.state, self.error, self.status, self.usage])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads what `encode` writes.

        Raises:
            DecodeError: it is something else.
        """
        try:
            state, *rest = orjson.loads(data)
            return cls(State(state), *rest)
        except (ValueError, TypeError, KeyError) as broken:
            raise DecodeError(f"no end of an answer: {data[:100]!r}") from broken
