"""A job that was accepted in the background: its row in SQL, and back."""

import logging
from dataclasses import replace
from datetime import UTC, datetime

import orjson
from redis.exceptions import RedisError

from db.models import JobRecord
from tasks.contract.job import EnqueueOptions, Job, Lane, new_id
from tasks.queue.backlog import Backlog

log = logging.getLogger(__name__)

# More attempts than a job may have before Redis loses it: what they left there stays older.
ATTEMPTS_PER_DISPATCH = 100


def to_record(job: Job, webhook: str | None = None) -> JobRecord:
    """The row of a job that is accepted now."""
    return JobRecord(
        id=job.id,
        tenant=job.tenant,
        model=job.model,
        endpoint=job.endpoint,
        lane=job.lane,
        created_at=datetime.now(UTC),
        request=job.body,
        sequences=job.sequences,
        weight=job.weight,
        max_tokens=job.max_tokens,
        timeout_s=job.timeout_s,
        key_id=job.key_id,
        traceparent=job.traceparent,
        priority=job.options.priority,
        deadline_s=job.options.deadline_s,
        idempotency_key=job.options.idempotency_key or None,
        fingerprint=job.options.fingerprint or None,
        webhook=webhook,
        meta=orjson.loads(job.metadata),
    )


def to_job(record: JobRecord) -> Job:
    """The job of a row that has kept its request."""
    return Job(
        id=record.id,
        model=record.model,
        endpoint=record.endpoint,
        body=record.request or b"",
        lane=Lane(record.lane),
        tenant=record.tenant,
        metadata=orjson.dumps(record.meta).decode(),
        sequences=record.sequences,
        weight=record.weight,
        max_tokens=record.max_tokens,
        timeout_s=record.timeout_s,
        key_id=record.key_id,
        traceparent=record.traceparent,
        options=EnqueueOptions(
            priority=record.priority,
            deadline_s=record.deadline_s,
            idempotency_key=record.idempotency_key or "",
            fingerprint=record.fingerprint or "",
        ),
    )


def renew(record: JobRecord, job: Job | None = None) -> JobRecord:
    """A new job that asks for the same, or as `job` does; the old one keeps the Idempotency-Key."""
    old = job or to_job(record)
    options = replace(old.options, idempotency_key="", fingerprint="")
    return to_record(replace(old, id=new_id(), options=options), record.webhook)


def enqueue(backlog: Backlog, record: JobRecord, dispatches: int = 0) -> None:
    """Queues an accepted job, after so many dispatches that Redis has lost; never refused.

    Raises:
        RedisError: Redis does not answer.
    """
    job = to_job(record)
    left_s = None
    # One that has started in time has kept its deadline.
    if record.deadline_s is not None and record.started_at is None:
        left_s = record.deadline_s - (datetime.now(UTC) - record.created_at).total_seconds()
    job = replace(job, options=replace(job.options, deadline_s=left_s))
    backlog.queue(job, _first_attempt(record, dispatches))


def _first_attempt(record: JobRecord, dispatches: int) -> int:
    """Above all that have been: its log may live on another Redis, and refuses older ones."""
    if dispatches == 0:
        return 0
    return max(dispatches * ATTEMPTS_PER_DISPATCH, record.attempts + ATTEMPTS_PER_DISPATCH)


def dispatch(backlog: Backlog, record: JobRecord) -> None:
    """Queues a job that was accepted just now; without Redis the reconciler does it later."""
    try:
        enqueue(backlog, record)
    except RedisError as away:
        log.warning("job %s: accepted, to be queued by maintenance: %s", record.id, away)
