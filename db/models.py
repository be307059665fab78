"""The tables."""

from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A moment with microseconds: timezone-aware in Python, UTC in every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no timezone")
        return value.astimezone(UTC)

    def process_result_value(self, value: Any, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        # SQLite has no timezones, PostgreSQL answers in the session's.
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class Base(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """What all tables share: names of constraints (migrations need them), the type of moments."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    # SQLAlchemy's own form; which type a float gets differs between its releases.
    type_annotation_map = {  # noqa: RUF012
        datetime: UtcDateTime,
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        float: Double(),
    }


_IS_OPEN = text("completed_at IS NULL")
_IS_WAITING = text("next_at IS NOT NULL")


class JobRecord(Base):
    """A job that was accepted in the background, or another that has started.

    `status` follows what the queue reports; only a job that has not ended changes.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant", "idempotency_key"),
        Index(None, "tenant", "id"),
        Index(None, "tenant", "model", "id"),
        Index(None, "tenant", "status", "id"),
        Index(None, "status", "id"),
        Index(None, "completed_at"),
        Index(None, "died_at"),
        # The jobs that have not ended, few among many.
        Index("ix_jobs_open", "id", sqlite_where=_IS_OPEN, postgresql_where=_IS_OPEN),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    model: Mapped[str]
    endpoint: Mapped[str]
    lane: Mapped[str]
    created_at: Mapped[datetime]
    priority: Mapped[int] = mapped_column(default=0)
    status: Mapped[str] = mapped_column(default="queued")
    attempts: Mapped[int] = mapped_column(default=0)
    dispatches: Mapped[int] = mapped_column(default=1)
    """How often it was put in the queue: once, and again whenever Redis lost it."""
    sequences: Mapped[int] = mapped_column(default=1, server_default="1")
    """How many the engine generates at once for it."""
    weight: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """Share of the model's service that its tenant gets, beside those of others."""
    max_tokens: Mapped[int | None] = mapped_column(default=None)
    """Most that the engine generates of one sequence; None: it ends by itself."""
    request: Mapped[bytes | None] = mapped_column(default=None, repr=False)
    """Body for the engine; None: not accepted in the background, lives in Redis only."""
    meta: Mapped[dict[str, Any]] = mapped_column("metadata", default_factory=dict)
    webhook: Mapped[str | None] = mapped_column(default=None)
    idempotency_key: Mapped[str | None] = mapped_column(default=None)
    fingerprint: Mapped[str | None] = mapped_column(default=None)
    deadline_s: Mapped[float | None] = mapped_column(default=None)
    """From its creation; one that has not started by then expires."""
    timeout_s: Mapped[float | None] = mapped_column(default=None)
    """From its creation; one that has not ended by then fails."""
    key_id: Mapped[str] = mapped_column(default="", server_default=text("''"))
    """The API key that it came with; empty: none was needed."""
    traceparent: Mapped[str] = mapped_column(default="", server_default=text("''"))
    """The trace and span of its request; empty: tracing is off."""
    started_at: Mapped[datetime | None] = mapped_column(default=None)
    completed_at: Mapped[datetime | None] = mapped_column(default=None)
    died_at: Mapped[datetime | None] = mapped_column(default=None)
    """When it was given up after failing too often; a dead letter until it is retried or purged."""


class JobResult(Base):
    """The answer of an ended job."""

    __tablename__ = "results"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    status_code: Mapped[int | None]
    """None: it ended without an answer of the engine."""
    body: Mapped[bytes | None] = mapped_column(repr=False)
    """The response's body, JSON; of a stream, its chunks put together."""
    error: Mapped[dict[str, Any] | None]
    usage: Mapped[dict[str, Any] | None]


class JobEvent(Base):
    """A change of a job's state."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    record_id: Mapped[str] = mapped_column(primary_key=True)
    """Id of the queue's record: one that is read twice is written once."""
    at: Mapped[datetime]
    state: Mapped[str]
    attempt: Mapped[int]
    worker: Mapped[str]
    reason: Mapped[str | None] = mapped_column(default=None)
    """Why that attempt failed."""


class WebhookDelivery(Base):
    """A call requested for when the job has ended."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index(None, "next_at"),
        # The receivers with calls that wait, however many calls each has.
        Index(
            "ix_webhook_deliveries_waiting",
            "receiver",
            "next_at",
            sqlite_where=_IS_WAITING,
            postgresql_where=_IS_WAITING,
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    url: Mapped[str]
    type: Mapped[str]
    """job.completed, job.failed, job.cancelled or job.expired."""
    created_at: Mapped[datetime]
    next_at: Mapped[datetime | None]
    """When it is tried next; None: never again."""
    state: Mapped[str] = mapped_column(default="pending")
    """pending, delivered, failed (given up) or disabled (the receiver answered 410)."""
    attempts: Mapped[int] = mapped_column(default=0)
    receiver: Mapped[str] = mapped_column(default="?", server_default="?")
    """Host and port of the URL; `?`: an earlier version has planned it."""


class WebhookAttempt(Base):
    """One try of a delivery."""

    __tablename__ = "webhook_attempts"

    job_id: Mapped[str] = mapped_column(
        ForeignKey("webhook_deliveries.job_id", ondelete="CASCADE"), primary_key=True
    )
    attempt: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    status_code: Mapped[int | None]
    error: Mapped[str | None]
    duration_ms: Mapped[int]


class LedgerEntry(Base):
    """A job that has ended: whose it was and how it went. All times are the queue's Redis's."""

    __tablename__ = "ledger"
    # What a tenant used in a span of time.
    __table_args__ = (Index(None, "tenant", "ended_at"),)

    job_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    tenant: Mapped[str]
    endpoint: Mapped[str]
    lane: Mapped[str]
    state: Mapped[str]
    """completed, failed, cancelled or expired."""
    attempts: Mapped[int]
    """How often a worker took it: 0 when it was cancelled in the queue."""
    queued_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    """Start of the last attempt; None: no worker took it."""
    ended_at: Mapped[datetime]


class Tenant(Base):
    """Whom keys and jobs belong to; none sees what is another's."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(primary_key=True)
    """Its name."""
    created_at: Mapped[datetime]
    weight: Mapped[float] = mapped_column(default=1.0)
    limits: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    is_enabled: Mapped[bool] = mapped_column(default=True)


class ApiKey(Base):
    """A key without its secret, of which only digests are kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    """How the secret begins, to tell keys apart."""
    digest: Mapped[str] = mapped_column(unique=True, repr=False)
    created_at: Mapped[datetime]
    roles: Mapped[list[str]]
    models: Mapped[list[str] | None] = mapped_column(default=None)
    """None: all of them, as with the endpoints."""
    endpoints: Mapped[list[str] | None] = mapped_column(default=None)
    weight: Mapped[float] = mapped_column(default=1.0)
    limits: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    expires_at: Mapped[datetime | None] = mapped_column(default=None)
    is_enabled: Mapped[bool] = mapped_column(default=True)
    last_used_at: Mapped[datetime | None] = mapped_column(default=None)
    """To the minute or so."""
    old_digest: Mapped[str | None] = mapped_column(unique=True, default=None, repr=False)
    """Of the secret before this one, which lives until `old_until`."""
    old_until: Mapped[datetime | None] = mapped_column(default=None)


class UsageDay(Base):
    """What a tenant's jobs of a model have used that ended on one day (UTC)."""

    __tablename__ = "usage_days"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    jobs: Mapped[int] = mapped_column(BigInteger)
    failed_jobs: Mapped[int] = mapped_column(BigInteger)
    """Of these, those that failed; cancelled and expired ones are neither failed nor completed."""
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    """Of the prompts' tokens, those that were in the engine's prefix cache."""
    completion_tokens: Mapped[int] = mapped_column(BigInteger)


class ModelEntry(Base):
    """A model that was added or changed at run time."""

    __tablename__ = "model_entries"

    name: Mapped[str] = mapped_column(primary_key=True)
    entry: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """As in models.yaml, without its name; None: the model is removed."""
    changed_at: Mapped[datetime]
