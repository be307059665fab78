"""Compares what SQL has accepted with what Redis holds, and queues again what Redis lost."""

import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import orjson
from redis.exceptions import RedisError

from db import jobs
from db.models import JobRecord
from tasks import counts
from tasks.counts import Counted
from tasks.errors import JobLostError, SluiceError
from tasks.jobs import Jobs
from tasks.message import Job, Lane, State, Terms

log = logging.getLogger(__name__)

# A younger job is still on its way from the API.
OLD_ENOUGH_S = 5.0
# What was accepted lately is looked at in each round, the rest a slice at a time.
YOUNG_S = 60.0
JOBS_AT_ONCE = 1000
# More attempts than a job may have before Redis loses it: what they left there stays older.
ATTEMPTS_PER_DISPATCH = 100


class Reconciler:
    """Goes round the open jobs again and again; one per process. Two may run."""

    def __init__(self, queue: Jobs, database_url: str, jobs_at_once: int = JOBS_AT_ONCE) -> None:
        self._queue = queue
        self._jobs_at_once = jobs_at_once
        self._url = database_url
        self._after = ""
        self._redis_run = ""

    def reconcile(self) -> int:
        """Looks at a slice of the open jobs, or at all when Redis was away or has started anew.

        Returns:
            How many were queued again.

        Raises:
            RedisError: Redis does not answer.
            SQLAlchemyError: the database is away.
        """
        known, self._redis_run = self._redis_run, ""
        run = self._run_of_redis()
        if run == known:
            again = self._look_on()
        else:
            again = self._look_at_all()
            for _, members in self._queue.backlog.members():
                self._cancel_ended(members)
        self._redis_run = run
        return again

    def _run_of_redis(self) -> str:
        """Changes when a Redis has started, or another one has taken its part."""
        redis = self._queue.backlog.redis
        return f"{redis.info('server')['run_id']} {redis.info('replication')['master_replid']}"

    def _cancel_ended(self, job_ids: Sequence[str]) -> None:
        """Cancels those that Redis holds open though SQL has their end: it had not heard of it."""
        ended = jobs.ended(self._url, job_ids) if job_ids else []
        for job_id, job in zip(ended, self._queue.backlog.look(ended), strict=True):
            # No end comes to SQL but by Redis, or when Redis does not have the job.
            if job and not job.state.is_final:
                log.warning("job %s has ended, and Redis did not know: cancelled", job_id)
                self._queue.cancel(job_id, job.model)

    def _look_on(self) -> int:
        again, self._after = self._look(self._after)
        if self._after:
            again += self._look(_id_at(YOUNG_S))[0]
        return again

    def _look_at_all(self) -> int:
        again, self._after = self._look("")
        while self._after:
            more, self._after = self._look(self._after)
            again += more
        return again

    def _look(self, after: str) -> tuple[int, str]:
        """One slice: how many were queued again, and where the next one begins ('': anew)."""
        lost, last = self.find_lost(after)
        return self.queue_again(lost), last

    def find_lost(self, after: str) -> tuple[dict[str, int], str]:
        """Finds what Redis lacks of one slice.

        Returns:
            How often each lost job was dispatched, by id; where the next slice begins ('': anew).
        """
        dispatches = jobs.still_open(self._url, after, self._jobs_at_once)
        ids = list(dispatches)
        old = [job_id for job_id in ids if job_id < _id_at(OLD_ENOUGH_S)]
        found = self._queue.backlog.sweep(old, in_sql="open")
        lost = [job_id for job_id, kind in zip(old, found, strict=True) if kind == "missing"]
        doubtful = [job_id for job_id, kind in zip(old, found, strict=True) if kind == "doubtful"]
        # They have been recorded since SQL was asked; if not, SQL has lost it.
        unrecorded = jobs.open_among(self._url, doubtful)
        self._queue.backlog.sweep(unrecorded, in_sql="still open")
        last = ids[-1] if len(ids) == self._jobs_at_once else ""
        return {job_id: dispatches[job_id] for job_id in lost}, last

    def queue_again(self, lost: dict[str, int]) -> int:
        """Queues lost jobs again, but those that another process has dispatched meanwhile.

        Returns:
            How many were queued.
        """
        again = [job_id for job_id, dispatches in lost.items() if self._mend(job_id, dispatches)]
        # Who cancels a job that Redis does not hold can tell SQL alone.
        self._cancel_ended(again)
        return len(again)

    def _mend(self, job_id: str, dispatches: int) -> bool:
        """Queues one job again; or ends it, when it was its client that held it, and has been told.

        Its trouble is its own: the others are looked at all the same.
        """
        job = jobs.load(self._url, job_id)
        if job is None or job.completed_at is not None:
            return False
        if job.request is None:
            jobs.end_lost(self._url, job_id, State.FAILED, JobLostError().body()["error"])
            return False
        if not jobs.note_dispatch(self._url, job_id, dispatches):
            return False
        try:
            self._queue.backlog.queue(queued(job), terms(job, dispatches))
        except SluiceError as failure:
            log.error("job %s cannot be queued again: %s", job_id, failure)
            return False
        counts.add(self._queue.backlog.redis, Counted.REPAIRS, "lost")
        return True


def dispatch(queue: Jobs, job: JobRecord) -> None:
    """Queues a job that was accepted just now; without Redis the reconciler does it later."""
    try:
        queue.backlog.queue(queued(job), terms(job))
    except RedisError as away:
        log.warning("job %s: accepted, to be queued by maintenance: %s", job.id, away)


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
        sequences=job.sequences,
    )


def terms(job: JobRecord, dispatches: int = 0) -> Terms:
    """How it is queued; attempts of earlier dispatches stay the older ones."""
    left_s = None
    # One that has started in time has kept its deadline.
    if job.deadline_s is not None and job.started_at is None:
        left_s = job.deadline_s - (datetime.now(UTC) - job.created_at).total_seconds()
    return Terms(
        priority=job.priority,
        deadline_s=left_s,
        idempotency_key=job.idempotency_key or "",
        fingerprint=job.fingerprint or "",
        first_attempt=_first_attempt(job, dispatches),
    )


def _first_attempt(job: JobRecord, dispatches: int) -> int:
    """Above all that have been: its log may live on another Redis, and refuses older ones."""
    if dispatches == 0:
        return 0
    return max(dispatches * ATTEMPTS_PER_DISPATCH, job.attempts + ATTEMPTS_PER_DISPATCH)


def _id_at(ago_s: float) -> str:
    """A job's id of that moment: ids begin with their time in ms (RFC 9562, UUIDv7)."""
    at_ms = int((time.time() - ago_s) * 1000)
    return f"job_{at_ms:012x}"
