"""Accepting jobs in the background: committed to SQL first, then queued.

Requests that come at the same time share a commit: one greenlet writes for all of them, so that the
database, and under SQLite the whole process, is held up once and not for each.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import gevent
from gevent.event import AsyncResult
from gevent.queue import Queue
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from api import told
from db import jobs
from db.models import JobRecord
from tasks.contract.errors import DatabaseUnavailableError, IdempotencyError, KeyInUseError
from tasks.contract.job import State
from tasks.maintenance.accepted import dispatch, to_job
from tasks.queue.jobs import Jobs
from tasks.queue.limits import Limited

log = logging.getLogger(__name__)

JOBS_PER_COMMIT = 200
LONGEST_COMMIT_S = 10.0


@dataclass
class _Waiting:
    job: JobRecord
    is_new: "AsyncResult[bool]" = field(default_factory=AsyncResult)


class Acceptance:
    """Takes responsibility for jobs; one per API process."""

    def __init__(self, queue: Jobs, database_url: str) -> None:
        self._queue = queue
        self._url = database_url
        self._waiting: Queue[_Waiting] = Queue()

    def start(self) -> None:
        """Starts the greenlet that commits."""
        gevent.spawn(self._commit_for_ever)

    def accept(self, job: JobRecord, limits: Sequence[Limited] = ()) -> str:
        """Commits and queues the job; its `created_at` becomes the database's.

        Returns:
            Its id, or that of the job that holds its idempotency key.

        Raises:
            IdempotencyError: another request holds the key.
            KeyInUseError: the job that held the key was deleted just now; or it is a chat's, which
                Redis alone knows until it ends.
            OverloadedError: the lane is full; nothing is stored.
            RateLimitError: it is more than a limit allows; nothing is stored.
            RedisError: whether a limit allows it cannot be told; nothing is stored.
            SQLAlchemyError: the database is away; nothing is stored.
            DatabaseUnavailableError: it does not answer; the job may be stored nevertheless.
        """
        holder = self._reserve(job, limits)
        if holder != job.id and self._is_accepted(holder):
            return holder
        # Of equal requests that are being accepted at once, the one that SQL has first is it.
        if not self._commit(job):
            self._release(job)
            return self._holder(job)
        dispatch(self._queue.backlog, job)
        return job.id

    def _reserve(self, job: JobRecord, limits: Sequence[Limited]) -> str:
        """What may refuse the job comes before its commit: an accepted one is never forgotten."""
        try:
            return self._queue.backlog.reserve(to_job(job), limits, told.note_left)
        except RedisError as away:
            if limits:  # nobody can tell whether they allow it
                raise
            log.warning("job %s: to be accepted without the queue: %s", job.id, away)
            return job.id

    def _commit(self, job: JobRecord) -> bool:
        waiting = _Waiting(job)
        self._waiting.put(waiting)
        try:
            return bool(waiting.is_new.get(timeout=LONGEST_COMMIT_S))
        except gevent.Timeout:
            raise DatabaseUnavailableError from None
        except SQLAlchemyError:
            self._release(job)
            raise

    def _release(self, job: JobRecord) -> None:
        with suppress(RedisError):  # it runs out by itself
            self._queue.backlog.release(to_job(job))

    def _is_accepted(self, job_id: str) -> bool:
        # Before SQL: what is accepted is there before it is queued.
        is_queued = self._queue.backlog.snapshots([job_id]) != [None]
        job = jobs.load(self._url, job_id)
        # Of a chat that runs SQL knows that it has begun, but not what it asks for.
        if job and (job.request is not None or State(job.status).is_final):
            return True
        if is_queued:
            raise KeyInUseError
        return False

    def _holder(self, job: JobRecord) -> str:
        held = jobs.holder(self._url, job.tenant, job.idempotency_key or "")
        if held is None:
            raise KeyInUseError
        if held.fingerprint != job.fingerprint:
            raise IdempotencyError
        return held.id

    def _commit_for_ever(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < JOBS_PER_COMMIT and not self._waiting.empty():
                batch.append(self._waiting.get())
            try:
                new = jobs.accept(self._url, [waiting.job for waiting in batch])
            except Exception as failure:  # noqa: BLE001 (told to each request that waits)
                for waiting in batch:
                    waiting.is_new.set_exception(failure)
                continue
            for waiting in batch:
                waiting.is_new.set(waiting.job.id in new)
