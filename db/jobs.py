"""The record of jobs: committed before the client gets its 202, changed only forwards, kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session, defer

from db import usage
from db.models import JobEvent, JobRecord, JobResult, LedgerEntry, WebhookDelivery
from db.session import database_now, insert_new, insert_returning, reading, writing

# Megabytes that no view shows.
_WITHOUT_REQUEST = defer(JobRecord.request, raiseload=True)
DELETED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """What the queue reports of a job: that it started, or how it ended."""

    job: JobRecord
    """As it is after the change."""
    event: JobEvent
    result: JobResult | None = None
    """Of one that has ended; so is `ledger`."""
    ledger: LedgerEntry | None = None


def accept(url: str, jobs: Sequence[JobRecord]) -> set[str]:
    """Commits new jobs, created now by the database's clock.

    Returns:
        The ids that are new: all but those whose idempotency key another job of the tenant holds.
    """
    ids = [job.id for job in jobs]
    with writing(url) as session:
        now = database_now(session)
        for job in jobs:
            job.created_at = now
        if insert_new(session, jobs) == len(jobs):
            return set(ids)
        return set(session.scalars(select(JobRecord.id).where(JobRecord.id.in_(ids))))


def get(url: str, tenant: str, job_id: str) -> tuple[JobRecord, JobResult | None] | None:
    """The tenant's job, without its request, and its result."""
    with reading(url) as session:
        job = session.get(JobRecord, job_id, options=[_WITHOUT_REQUEST])
        if job is None or job.tenant != tenant:
            return None
        return job, session.get(JobResult, job_id)


def exists(url: str, tenant: str, job_id: str) -> bool:
    """Whether the tenant has such a job."""
    query = select(JobRecord.id).where(JobRecord.id == job_id, JobRecord.tenant == tenant)
    with reading(url) as session:
        return session.scalar(query) is not None


def results(url: str, job_ids: Sequence[str]) -> dict[str, JobResult]:
    """What those of the jobs answered that have ended, by id."""
    query = select(JobResult).where(JobResult.job_id.in_(job_ids))
    with reading(url) as session:
        return {result.job_id: result for result in session.scalars(query)}


def holder(url: str, tenant: str, idempotency_key: str) -> JobRecord | None:
    """The job that holds the key."""
    query = select(JobRecord).where(
        JobRecord.tenant == tenant, JobRecord.idempotency_key == idempotency_key
    )
    with reading(url) as session:
        return session.scalar(query)


def page(
    url: str,
    tenant: str,
    *,
    model: str | None,
    status: str | None,
    after: str | None,
    limit: int,
) -> list[JobRecord]:
    """The tenant's newest jobs without their requests, those older than `after` only.

    One status is looked up in its index, however many jobs have another.
    """
    query = select(JobRecord).options(_WITHOUT_REQUEST)
    query = query.order_by(JobRecord.id.desc()).limit(limit)
    query = query.where(JobRecord.tenant == tenant)
    if model is not None:
        query = query.where(JobRecord.model == model)
    if status is not None:
        query = query.where(JobRecord.status == status)
    if after is not None:
        query = query.where(JobRecord.id < after)
    with reading(url) as session:
        return list(session.scalars(query))


def still_open(url: str, after: str, limit: int) -> dict[str, int]:
    """How often jobs that have not ended were dispatched, by id, in the order of ids."""
    query = select(JobRecord.id, JobRecord.dispatches).order_by(JobRecord.id).limit(limit)
    query = query.where(JobRecord.completed_at.is_(None), JobRecord.id > after)
    with reading(url) as session:
        return dict(session.execute(query).all())


def open_among(url: str, job_ids: Sequence[str]) -> list[str]:
    """Those of the jobs that have not ended."""
    if not job_ids:
        return []
    query = select(JobRecord.id).where(JobRecord.id.in_(job_ids), JobRecord.completed_at.is_(None))
    with reading(url) as session:
        return list(session.scalars(query))


def load(url: str, job_id: str) -> JobRecord | None:
    """The job, of any tenant."""
    with reading(url) as session:
        return session.get(JobRecord, job_id)


def note_dispatch(url: str, job_id: str, dispatches: int) -> bool:
    """Counts one more dispatch than these; False: another process did so, or the job has ended."""
    query = (
        update(JobRecord)
        .where(JobRecord.id == job_id, JobRecord.dispatches == dispatches)
        .where(JobRecord.completed_at.is_(None))
        .values(dispatches=dispatches + 1, status="queued")
    )
    with writing(url) as session:
        return session.connection().execute(query).rowcount == 1


def apply(url: str, changes: Sequence[Change]) -> int:
    """Writes what the queue reported, in one transaction; doing it again changes nothing.

    A job that has ended stays as it is, and an older attempt does not overwrite a newer one.

    Returns:
        How many jobs have ended by it.
    """
    if not changes:
        return 0
    ended = [change for change in changes if change.result is not None]
    with writing(url) as session:
        insert_new(session, [_as_queued(change.job) for change in changes])
        for change in changes:
            _update(session, change.job)
        insert_new(session, [change.event for change in changes])
        insert_new(session, [change.result for change in ended if change.result])
        _plan_webhooks(session, [change.job.id for change in ended])
        usages = {change.job.id: change.result.usage for change in ended if change.result}
        return _note_ends(session, [change.ledger for change in ended if change.ledger], usages)


def _note_ends(
    session: Session,
    entries: Sequence[LedgerEntry],
    usages: Mapping[str, dict[str, Any] | None],
) -> int:
    """Adds to the ledger, and to the sums of what tenants use; returns how many were new."""
    new = insert_returning(session, entries, LedgerEntry.job_id)
    # Of one that is there twice the first one was written.
    first = {entry.job_id: entry for entry in reversed(entries)}
    usage.add(session, [first[job_id] for job_id in new], usages)
    return len(new)


def _as_queued(job: JobRecord) -> JobRecord:
    """What a job that was not accepted in the background starts with."""
    names = ("id", "tenant", "model", "endpoint", "lane", "meta", "created_at")
    return JobRecord(**{name: getattr(job, name) for name in names})


def _update(session: Session, job: JobRecord) -> None:
    dead: dict[str, Any] = {}
    if job.died_at and job.request:
        kept = ("died_at", "request", "sequences", "weight", "max_tokens", "timeout_s", "key_id")
        dead = {name: getattr(job, name) for name in (*kept, "traceparent")}
    newer = update(JobRecord).where(JobRecord.id == job.id, JobRecord.completed_at.is_(None))
    # An end counts, even if Redis has lost attempts that were recorded here.
    if job.completed_at is None:
        newer = newer.where(JobRecord.attempts <= job.attempts)
    session.execute(
        newer.values(
            status=job.status,
            attempts=job.attempts,
            started_at=job.started_at,
            completed_at=job.completed_at,
            **dead,
        ).execution_options(synchronize_session=False)
    )


def _plan_webhooks(session: Session, job_ids: Sequence[str]) -> None:
    now = database_now(session)
    query = select(JobRecord).where(JobRecord.id.in_(job_ids), JobRecord.webhook.is_not(None))
    insert_new(
        session,
        [
            WebhookDelivery(
                job_id=job.id,
                url=job.webhook or "",
                receiver=_receiver(job.webhook or ""),
                type=f"job.{job.status}",
                created_at=now,
                next_at=now,
            )
            for job in session.scalars(query)
        ],
    )


def _receiver(url: str) -> str:
    """Host and port, which identify the receiver of a call."""
    try:
        return urlsplit(url).netloc.lower() or "?"
    except ValueError:
        return "?"


def end_lost(url: str, job_id: str, status: str, error: dict[str, Any]) -> bool:
    """Ends a job that the queue does not know; False: it has ended already."""
    with writing(url) as session:
        now = database_now(session)
        query = (
            update(JobRecord)
            .where(JobRecord.id == job_id, JobRecord.completed_at.is_(None))
            .values(status=status, completed_at=now)
        )
        if session.connection().execute(query).rowcount == 0:
            return False
        job = session.get_one(JobRecord, job_id)
        result = JobResult(job_id=job_id, status_code=None, body=None, error=error, usage=None)
        insert_new(session, [result])
        _note_ends(session, [ledger_entry(job, now)], {})
        _plan_webhooks(session, [job_id])
        return True


def ledger_entry(job: JobRecord, ended_at: datetime) -> LedgerEntry:
    """What stays of a job that has ended."""
    return LedgerEntry(
        job_id=job.id,
        model=job.model,
        tenant=job.tenant,
        endpoint=job.endpoint,
        lane=job.lane,
        state=job.status,
        attempts=job.attempts,
        queued_at=job.created_at,
        started_at=job.started_at,
        ended_at=ended_at,
    )


def accepted(url: str, job_ids: Sequence[str]) -> set[str]:
    """Those of the jobs that were accepted in the background and have not ended."""
    query = select(JobRecord.id).where(
        JobRecord.id.in_(job_ids),
        JobRecord.request.is_not(None),
        JobRecord.completed_at.is_(None),
    )
    with reading(url) as session:
        return set(session.scalars(query))


def ended(url: str, job_ids: Sequence[str]) -> list[str]:
    """Those of the jobs that have ended."""
    query = select(JobRecord.id).where(
        JobRecord.id.in_(job_ids), JobRecord.completed_at.is_not(None)
    )
    with reading(url) as session:
        return list(session.scalars(query))


def delete_old(url: str, age_s: float) -> int:
    """Deletes jobs that ended so long ago, a bounded number at once; returns how many."""
    with writing(url) as session:
        latest = database_now(session) - timedelta(seconds=age_s)
        old = select(JobRecord.id).where(JobRecord.completed_at < latest).limit(DELETED_AT_ONCE)
        query = delete(JobRecord).where(JobRecord.id.in_(old))
        return session.connection().execute(query).rowcount
