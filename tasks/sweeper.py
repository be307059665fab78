"""Goes round all jobs and places in Redis, in slices, and mends what does not fit (lua/sweep.lua).

Nothing depends on it: what it finds is a fault of a script or of Redis, and counts as a repair.
"""

import logging
from collections.abc import Iterator
from typing import Any

from redis import Redis

from tasks import keys
from tasks.jobs import Jobs

log = logging.getLogger(__name__)

KEYS_AT_ONCE = 1000
REPAIRS = ("misplaced", "stray", "unrecorded")


class Sweeper:
    """One per process; two may run."""

    def __init__(self, queue: Jobs) -> None:
        self._queue = queue
        self._slices = self._go_round()

    def sweep(self) -> int:
        """Looks at the next slice; returns how much was mended.

        Raises:
            RedisError: Redis does not answer.
        """
        try:
            return next(self._slices)
        except BaseException:
            # A generator that has raised is over.
            self._slices = self._go_round()
            raise

    def _go_round(self) -> Iterator[int]:
        while True:
            yield from self._sweep_hashes()
            yield from self._sweep_places()
            yield from self._sweep_logs()

    def _sweep_hashes(self) -> Iterator[int]:
        for found in _scan(self._queue.backlog.redis, keys.JOB_PREFIX):
            yield self._mend([key.removeprefix(keys.JOB_PREFIX) for key in found])

    def _sweep_places(self) -> Iterator[int]:
        for place, members in self._queue.backlog.members():
            yield self._mend(members, place)

    def _sweep_logs(self) -> Iterator[int]:
        """Logs that no job's end will give a TTL any more."""
        for found in _scan(self._queue.bus, keys.LOG_PREFIX):
            ids = [key.removeprefix(keys.LOG_PREFIX) for key in found]
            jobs = self._queue.backlog.look(ids)
            lost = [job_id for job_id, job in zip(ids, jobs, strict=True) if job is None]
            self._queue.log.expire(lost)
            yield 0

    def _mend(self, job_ids: list[str], place: str = "") -> int:
        mended = 0
        for job_id, kind in zip(
            job_ids, self._queue.backlog.sweep(job_ids, place=place), strict=True
        ):
            if kind in REPAIRS:
                log.error("job %s was %s; mended", job_id, kind)
                mended += 1
        return mended


def _scan(redis: Redis, prefix: str) -> Iterator[list[str]]:
    """The keys of that prefix, in slices."""
    cursor = 0
    while True:
        reply: Any = redis.scan(cursor, match=f"{prefix}*", count=KEYS_AT_ONCE)
        cursor, found = reply
        yield [key.decode() for key in found]
        if cursor == 0:
            return
