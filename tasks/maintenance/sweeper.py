"""Checks all jobs and places in Redis, in slices, and repairs inconsistencies (lua/sweep.lua).

Nothing depends on it: what it finds is a fault of a script or of Redis, and counts as a repair.
"""

import logging
from collections.abc import Iterator
from typing import Any

from redis import Redis

from tasks.contract import keys
from tasks.queue.jobs import Jobs

log = logging.getLogger(__name__)

KEYS_AT_ONCE = 1000
REPAIRS = ("misplaced", "stray", "unrecorded")


class Sweeper:
    """One per process; two may run."""

    def __init__(self, queue: Jobs) -> None:
        self._queue = queue
        self._slices = self._cycle()

    def sweep(self) -> int:
        """Checks the next slice; returns the number of repairs.

        Raises:
            RedisError: Redis does not answer.
        """
        try:
            return next(self._slices)
        except BaseException:
            # A generator that has raised is over.
            self._slices = self._cycle()
            raise

    def _cycle(self) -> Iterator[int]:
        while True:
            yield from self._sweep_hashes()
            yield from self._sweep_places()
            yield from self._sweep_logs()

    def _sweep_hashes(self) -> Iterator[int]:
        for found in _scan(self._queue.backlog.redis, keys.JOB_PREFIX):
            yield self._repair([key.removeprefix(keys.JOB_PREFIX) for key in found])

    def _sweep_places(self) -> Iterator[int]:
        for place, members in self._queue.backlog.members():
            yield self._repair(members, place)

    def _sweep_logs(self) -> Iterator[int]:
        """Logs that no job's end will give a TTL any more."""
        for found in _scan(self._queue.bus, keys.LOG_PREFIX):
            ids = [key.removeprefix(keys.LOG_PREFIX) for key in found]
            jobs = self._queue.backlog.snapshots(ids)
            lost = [job_id for job_id, job in zip(ids, jobs, strict=True) if job is None]
            self._queue.log.expire(lost)
            yield 0

    def _repair(self, job_ids: list[str], place: str = "") -> int:
        repairs = 0
        for job_id, kind in zip(
            job_ids, self._queue.backlog.sweep(job_ids, place=place), strict=True
        ):
            if kind in REPAIRS:
                log.error("job %s was %s; repaired", job_id, kind)
                repairs += 1
        return repairs


def _scan(redis: Redis, prefix: str) -> Iterator[list[str]]:
    """The keys of that prefix, in slices."""
    cursor = 0
    while True:
        reply: Any = redis.scan(cursor, match=f"{prefix}*", count=KEYS_AT_ONCE)
        cursor, found = reply
        yield [key.decode() for key in found]
        if cursor == 0:
            return
