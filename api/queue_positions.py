"""Where the jobs stand that clients watch while they are queued: one look for all of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import gevent
from redis import Redis
from redis.exceptions import RedisError

from api.relay import JobStream
from tasks.contract.job import State
from tasks.queue.backlog import Backlog
from tasks.queue.depth import QueuePosition, places

log = logging.getLogger(__name__)

INTERVAL_S = 2.0


class PositionWatcher:
    """A watched job's last known place, and whether its watcher has been told."""

    def __init__(self, stream: JobStream) -> None:
        self._stream = stream
        self._place: QueuePosition | None = None
        self._is_news = False

    @property
    def job_id(self) -> str:
        return self._stream.job_id

    @property
    def has_nothing(self) -> bool:
        return self._stream.position is None

    def put(self, place: QueuePosition | None) -> None:
        """Wakes the watcher when the job has moved."""
        if place is not None and place != self._place:
            self._place, self._is_news = place, True
            self._stream.wake_up()

    def take(self) -> QueuePosition | None:
        """The place, once after each change."""
        self._is_news, is_news = False, self._is_news
        return self._place if is_news else None


class QueuePositions:
    """All watched jobs of an API process."""

    def __init__(self, redis: Redis, backlog: Backlog) -> None:
        self._redis = redis
        self._backlog = backlog
        self._watched: set[PositionWatcher] = set()

    def start(self) -> None:
        """Starts looking."""
        gevent.spawn(self._look_for_ever)

    @contextmanager
    def watching(self, stream: JobStream) -> Iterator[PositionWatcher]:
        """The job's place, kept up to date until exit; the stream is woken when it changes."""
        watched = PositionWatcher(stream)
        self._watched.add(watched)
        try:
            yield watched
        finally:
            self._watched.discard(watched)

    def _look_for_ever(self) -> None:
        while True:
            gevent.sleep(INTERVAL_S)
            try:
                self._look()
            except RedisError as away:
                log.warning("places in the queue are not known: %s", away)
            except Exception:  # who waits is told in the next round
                log.exception("places in the queue were not read")

    def _look(self) -> None:
        # One that has sent something has left the queue.
        waiting = [watched for watched in self._watched if watched.has_nothing]
        found = self._backlog.snapshots(sorted({watched.job_id for watched in waiting}))
        queued = {each.job.id: each.job for each in found if each and each.state is State.QUEUED}
        at = dict(zip(queued, places(self._redis, list(queued.values())), strict=True))
        for watched in waiting:
            watched.put(at.get(watched.job_id))
