"""A job as the API submits it and as a worker claims it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Self

from uuid_utils import uuid7

from tasks.contract import tracing
from tasks.contract.errors import DecodeError


class Lane(StrEnum):
    """The two lanes of a backlog, in the order of service."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class State(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self not in (State.QUEUED, State.IN_PROGRESS)


class Cause(StrEnum):
    """Why a job was taken from its worker; each but the last two is a failure of the job."""

    LEASE_EXPIRED = "lease_expired"
    ENGINE_DIED = "engine_died"
    WORKER_FAILED = "worker_failed"
    ENGINE_ERROR = "engine_error"
    LOG_REFUSED = "log_refused"
    HANDED_BACK = "handed_back"
    PREEMPTED = "preempted"


class Usage(NamedTuple):
    """What a job has cost."""

    input_tokens: int
    output_tokens: int


class Room(NamedTuple):
    """How many jobs a worker may claim."""

    slots: int
    first: int
    """Slots that the first job may take, which are more if the worker is idle."""


def new_id() -> str:
    """A job's id; later ones are greater."""
    return f"job_{uuid7().hex}"


LOWEST_PRIORITY = 100
# Between two priorities in the order of service (depth.py).
ONE_PRIORITY = 1e13


@dataclass(frozen=True, slots=True)
class EnqueueOptions:
    """How a job is queued, beside its place at the end of its lane."""

    priority: int = 0
    """Order within the lane, from -LOWEST_PRIORITY (first) to LOWEST_PRIORITY."""
    deadline_s: float | None = None
    """From its acceptance; a job that has never started by then expires."""
    idempotency_key: str = ""
    """Another job of the tenant with this key is taken instead of queueing this one."""
    fingerprint: str = ""
    """Hash of the request with the key."""


@dataclass(frozen=True, slots=True)
class Job:
    """One generation: an HTTP request to the engine, byte for byte, and who waits for it.

    Redis holds it as a hash: `encode` writes its fields, `decode` reads them, wherever it goes.
    SQL has a row of it (maintenance/accepted.py).
    """

    id: str
    model: str
    endpoint: str
    body: bytes
    lane: Lane = Lane.INTERACTIVE
    tenant: str = "default"
    listener: str = ""
    """The API process whose relay channel gets the output."""
    metadata: str = "{}"
    """JSON object of the user's own."""
    sequences: int = 1
    """How many the engine generates at once for it: so many slots it takes."""
    weight: float = 1.0
    """Share of the model's service that its tenant gets, beside those of others."""
    max_tokens: int | None = None
    """Most that the engine generates of one sequence; None: it ends by itself."""
    timeout_s: float | None = None
    """From its acceptance to its end."""
    key_id: str = ""
    """The API key that it came with, for limits; empty: none was needed."""
    traceparent: str = ""
    """The trace and span of its request (W3C's form); empty: tracing is off."""
    options: EnqueueOptions = field(default_factory=EnqueueOptions, compare=False)

    # What `decode` reads; the body comes separately, as it may be megabytes.
    FIELDS = (
        *("model", "endpoint", "lane", "tenant", "listener", "metadata"),
        *("sequences", "weight", "max_tokens", "order", "timeout_s", "key_id", "traceparent"),
    )

    @classmethod
    def create(
        cls, *, model: str, endpoint: str, body: bytes, listener: str = "", sequences: int = 1
    ) -> Self:
        return cls(new_id(), model, endpoint, body, listener=listener, sequences=sequences)

    def encode(self) -> list[str | bytes]:
        """Field, value, field, value… of the job's hash; lua/submit.lua adds the order."""
        return [
            *("endpoint", self.endpoint),
            *("body", self.body),
            *("model", self.model),
            *("lane", self.lane),
            *("tenant", self.tenant),
            *("listener", self.listener),
            *("metadata", self.metadata),
            *("sequences", str(self.sequences)),
            *("weight", str(self.weight)),
            *("max_tokens", "" if self.max_tokens is None else str(self.max_tokens)),
            *("timeout_s", "" if self.timeout_s is None else repr(self.timeout_s)),
            *("key_id", self.key_id),
            *("traceparent", self.traceparent),
        ]

    @classmethod
    def decode(cls, job_id: str, values: Sequence[bytes | None], body: bytes = b"") -> Self:
        """Reads FIELDS of a job's hash; the last seven may be missing.

        Raises:
            DecodeError: they have another shape.
        """
        try:
            *texts, sequences, weight, max_tokens, order, timeout_s, key_id, trace = values
            # None has no decode: an AttributeError.
            text = [value.decode() for value in texts]  # type: ignore[union-attr]
            model, endpoint, lane, tenant, listener, metadata = text
            return cls(
                *(job_id, model, endpoint, body, Lane(lane), tenant, listener, metadata or "{}"),
                sequences=int(sequences or 1),
                weight=float(weight or 1),
                max_tokens=int(max_tokens) if max_tokens else None,
                timeout_s=float(timeout_s) if timeout_s else None,
                key_id=(key_id or b"").decode(),
                traceparent=(trace or b"").decode(),
                options=EnqueueOptions(priority=int(float(order or 0) // ONE_PRIORITY)),
            )
        except (ValueError, AttributeError) as broken:
            raise DecodeError(f"job {job_id} cannot be read: {broken}") from broken

    @property
    def log_fields(self) -> dict[str, object]:
        """What each log line about the job has in `extra`."""
        fields: dict[str, object] = {"job": self.id, "tenant": self.tenant, "model": self.model}
        return fields | tracing.log_fields(self.traceparent)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job as Redis has it, without its body; times in us since the epoch, None: not yet."""

    job: Job
    state: State
    attempt: int
    queued_us: int
    started_us: int | None
    ended_us: int | None

    FIELDS = (*Job.FIELDS, "state", "attempt", "queued_us", "started_us", "ended_us")

    @classmethod
    def decode(cls, job_id: str, values: Sequence[bytes | None]) -> Self | None:
        """Reads FIELDS of a job's hash; None: there is no such job. Texts may be missing.

        Raises:
            DecodeError: they have another shape.
        """
        *fields, state, attempt, queued, started, ended = values
        if state is None:
            return None
        job = Job.decode(job_id, [value or b"" for value in fields])
        try:
            times = (int(value) if value else None for value in (started, ended))
            return cls(job, State(state.decode()), int(attempt or 0), int(queued or 0), *times)
        except ValueError as broken:
            raise DecodeError(f"job {job_id} cannot be read: {broken}") from broken


@dataclass(frozen=True, slots=True)
class Claim:
    """A job held by a worker: the job, the number of the attempt, and how long it waited."""

    job: Job
    attempt: int
    queue_ms: int
    """Since it was accepted."""
    failures: int
    """How often it has failed before: its worker died, or the engine could not answer."""
    max_failures: int
    worker: str = ""
    wait_ms: int = 0
    """Since it was queued last."""
    claimed_s: float = field(default_factory=time.monotonic, compare=False)
    """When the worker got it, by its own clock."""

    # The order in which claim.lua returns the fields of the hash.
    FIELDS = (*Job.FIELDS, "body", "failures", "max_failures", "worker")

    @property
    def is_last(self) -> bool:
        """Whether its next failure ends it; it may be what kills its workers then."""
        return self.failures + 1 >= self.max_failures

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what killed its workers: they run one of these at a time."""
        return self.failures > 0 and self.is_last

    @classmethod
    def decode(cls, reply: Sequence[bytes]) -> Self:
        """Reads claim.lua's reply: id, attempt, queue_ms, wait_ms, then FIELDS.

        Raises:
            DecodeError: the reply has another shape.
        """
        try:
            job_id, attempt, queue_ms, wait_ms, *fields, body, failures, most, worker = reply
            job = Job.decode(job_id.decode(), fields, body)
            counts = int(failures or 0), int(most)
            return cls(job, int(attempt), int(queue_ms), *counts, worker.decode(), int(wait_ms))
        except (ValueError, AttributeError) as broken:
            raise DecodeError(f"a claimed job cannot be read: {broken}") from broken
