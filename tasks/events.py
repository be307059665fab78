"""What a worker sends back: entries of a job's token log, also published to the relay.

An entry is START (status and headers), BODY (a piece of the response's body) or END (how it ended).
Its position is `<attempt>-<seq>`: the id in the log, where Redis refuses ids that do not grow, so
nothing that a worker writes after another took over can enter. `seq` counts from 0 without gaps.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, Self

import orjson

from tasks.errors import DecodeError, SluiceError
from tasks.message import State

LOG_FIELD = b"e"


class Kind(IntEnum):
    START = 0
    BODY = 1
    END = 2


class Position(NamedTuple):
    """Where an entry stands in a job's log; positions compare in the order of the log."""

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"

    @classmethod
    def parse(cls, log_id: bytes) -> Self:
        attempt, _, seq = log_id.partition(b"-")
        return cls(int(attempt), int(seq))


# attempt u32, seq u32, kind u8, length of the job id u8, length of the data u32, then id and data.
_HEADER = struct.Struct("!IIBBI")


class Entry(NamedTuple):
    job_id: str
    position: Position
    kind: Kind
    data: bytes

    def encode_log(self) -> bytes:
        """The value of LOG_FIELD: one byte kind, then the data."""
        return bytes((self.kind,)) + self.data

    @classmethod
    def decode_log(cls, job_id: str, log_id: bytes, value: bytes) -> Self:
        """Reads an entry of the log.

        Raises:
            DecodeError: the value has another shape.
        """
        try:
            return cls(job_id, Position.parse(log_id), Kind(value[0]), value[1:])
        except (ValueError, IndexError) as broken:
            raise DecodeError(f"log entry {log_id!r} of {job_id}: {broken}") from broken


def encode_frame(entries: Iterable[Entry]) -> bytes:
    """One relay message: the entries one after the other."""
    parts: list[bytes] = []
    for job_id, (attempt, seq), kind, data in entries:
        name = job_id.encode()
        parts += (_HEADER.pack(attempt, seq, kind, len(name), len(data)), name, data)
    return b"".join(parts)


def decode_frame(frame: bytes) -> Iterator[Entry]:
    """The entries of a relay message.

    Raises:
        DecodeError: the frame is cut or of another version.
    """
    offset, size = 0, len(frame)
    try:
        while offset < size:
            attempt, seq, kind, name_length, length = _HEADER.unpack_from(frame, offset)
            start = offset + _HEADER.size
            offset = start + name_length + length
            job_id = frame[start : start + name_length].decode()
            data = frame[start + name_length : offset]
            yield Entry(job_id, Position(attempt, seq), Kind(kind), data)
    except (struct.error, ValueError) as broken:
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
        status, headers, queue_ms, attempt = orjson.loads(data)
        return cls(status, [(name, value) for name, value in headers], queue_ms, attempt)

    @property
    def content_type(self) -> str:
        return dict(self.headers).get("content-type", "application/json")

    @property
    def is_event_stream(self) -> bool:
        return self.content_type.startswith("text/event-stream")


@dataclass(frozen=True, slots=True)
class End:
    """Data of an END entry: the job's final state, and the error object if it has one."""

    state: State
    error: dict[str, Any] = field(default_factory=dict)
    status: int = 500

    @classmethod
    def failed(cls, error: SluiceError, state: State = State.FAILED) -> Self:
        """The end that this error is."""
        return cls(state, error.body(), error.status)

    def encode(self) -> bytes:
        return orjson.dumps([self.state, self.error, self.status])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        state, error, status = orjson.loads(data)
        return cls(State(state), error, status)
