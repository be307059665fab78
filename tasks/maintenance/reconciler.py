"""Compares what SQL has accepted with what Redis holds, and queues again what Redis lost."""

import logging
import time
from collections.abc import Sequence

from db import jobs
from tasks.contract.errors import SluiceError
from tasks.contract.job import State
from tasks.contract.job_errors import JobLostError
from tasks.maintenance import accepted
from tasks.queue import counts
from tasks.queue.counts import Counted
from tasks.queue.jobs import Jobs

log = logging.getLogger(__name__)

# A younger job is still on its way from the API.
OLD_ENOUGH_S = 5.0
# Recently accepted jobs are checked in each round, the rest a slice at a time.
YOUNG_S = 60.0
JOBS_AT_ONCE = 1000


class Reconciler:
    """Checks the open jobs in cycles; one per process. Two may run."""

    def __init__(self, queue: Jobs, database_url: str, jobs_at_once: int = JOBS_AT_ONCE) -> None:
        self._queue = queue
        self._jobs_at_once = jobs_at_once
        self._url = database_url
        self._after = ""
        self._redis_run = ""

    def reconcile(self) -> int:
        """Checks a slice of the open jobs, or all when Redis was away or has restarted.

        Returns:
            How many were queued again.

        Raises:
            RedisError: Redis does not answer.
            SQLAlchemyError: the database is away.
        """
        known, self._redis_run = self._redis_run, ""
        run = self._run_of_redis()
        if run == known:
            again = self._scan_on()
        else:
            again = self._scan_all()
            for _, members in self._queue.backlog.members():
                self._cancel_ended(members)
        self._redis_run = run
        return again

    def _run_of_redis(self) -> str:
        """Changes when Redis has restarted or failed over."""
        redis = self._queue.backlog.redis
        return f"{redis.info('server')['run_id']} {redis.info('replication')['master_replid']}"

    def _cancel_ended(self, job_ids: Sequence[str]) -> None:
        """Cancels those that Redis holds open though SQL has their end: it had not heard of it."""
        ended = jobs.ended(self._url, job_ids) if job_ids else []
        for seen in self._queue.backlog.snapshots(ended):
            # No end comes to SQL but by Redis, or when Redis does not have the job.
            if seen and not seen.state.is_final:
                job = seen.job
                log.warning("job %s has ended, and Redis did not know: cancelled", job.id)
                self._queue.cancel(job.id, job.model)

    def _scan_on(self) -> int:
        again, self._after = self._scan(self._after)
        if self._after:
            again += self._scan(_id_at(YOUNG_S))[0]
        return again

    def _scan_all(self) -> int:
        again, self._after = self._scan("")
        while self._after:
            more, self._after = self._scan(self._after)
            again += more
        return again

    def _scan(self, after: str) -> tuple[int, str]:
        """One slice: how many were queued again, and where the next one begins ('': over)."""
        lost, last = self.find_lost(after)
        return self.queue_again(lost), last

    def find_lost(self, after: str) -> tuple[dict[str, int], str]:
        """Finds what Redis lacks of one slice.

        Returns:
            How often each lost job was dispatched, by id; where the next slice begins ('': over).
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
        again = [job_id for job_id, dispatches in lost.items() if self._repair(job_id, dispatches)]
        # Who cancels a job that Redis does not hold can tell SQL alone.
        self._cancel_ended(again)
        return len(again)

    def _repair(self, job_id: str, dispatches: int) -> bool:
        """Queues one job again; or ends it, if only its client held it, which got the error.

        A failure does not keep the others from being checked.
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
            accepted.enqueue(self._queue.backlog, job, dispatches)
        except SluiceError as failure:
            log.error("job %s cannot be queued again: %s", job_id, failure)
            return False
        counts.add(self._queue.backlog.redis, Counted.REPAIRS, "lost")
        return True


def _id_at(ago_s: float) -> str:
    """A job's id of that moment: ids begin with their time in ms (RFC 9562, UUIDv7)."""
    at_ms = int((time.time() - ago_s) * 1000)
    return f"job_{at_ms:012x}"
