"""Queues again what was accepted in SQL and is not in Redis: lost with it, or never got there."""

import logging
from datetime import UTC, datetime

import orjson

from db import jobs
from db.models import JobRecord
from tasks.jobs import Jobs
from tasks.message import Job, Lane, State, Terms

log = logging.getLogger(__name__)

# A younger job is still on its way from the API.
OLD_ENOUGH_S = 5.0
JOBS_AT_ONCE = 500
# More attempts than a job may have before Redis loses it: what they left there stays older.
ATTEMPTS_PER_DISPATCH = 100


def reconcile(queue: Jobs, database_url: str) -> int:
    """Looks at all jobs that have not ended; returns how many it queued again.

    Two may run: only who counts the dispatch in SQL queues.

    Raises:
        OverloadedError: a lane is full; the rest has time.
        SQLAlchemyError: the database is away.
    """
    again, after = 0, ""
    while True:
        ids = jobs.still_open(database_url, after, OLD_ENOUGH_S, JOBS_AT_ONCE)
        for job_id in queue.backlog.missing(ids):
            again += _mend(queue, database_url, job_id)
        if len(ids) < JOBS_AT_ONCE:
            return again
        after = ids[-1]


def _mend(queue: Jobs, database_url: str, job_id: str) -> bool:
    """Queues one job again; or ends it, when it was its client that held it, and has been told."""
    job = jobs.load(database_url, job_id)
    if job is None:
        return False
    if job.request is None:
        jobs.end_lost(database_url, job_id, State.FAILED)
        return False
    if not jobs.note_dispatch(database_url, job):
        return False
    queue.backlog.submit(queued(job), terms(job, job.dispatches))
    return True


def queued(job: JobRecord) -> Job:
    """The accepted job as the queue takes it."""
    return Job(
        id=job.id,
        model=job.model,
        endpoint=job.endpoint,
        body=job.request or b"",
        lane=Lane(job.lane),
        tenant=job.tenant,
        metadata=orjson.dumps(job.meta).decode(),
    )


def terms(job: JobRecord, dispatches: int = 0) -> Terms:
    """How it is queued; attempts of earlier dispatches stay the older ones."""
    left_s = None
    if job.deadline_s is not None:
        left_s = job.deadline_s - (datetime.now(UTC) - job.created_at).total_seconds()
    return Terms(
        priority=job.priority,
        deadline_s=left_s,
        idempotency_key=job.idempotency_key or "",
        fingerprint=job.fingerprint or "",
        first_attempt=dispatches * ATTEMPTS_PER_DISPATCH,
    )
