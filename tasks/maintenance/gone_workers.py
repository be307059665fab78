"""Hands on the jobs of a worker that is gone, seconds before its leases would end.

When a process is killed, the kernel closes its connections, and Redis knows at once that nobody
listens on the worker's control channel any more. Connections break for other reasons, too: so its
leases end early only if it has sent no heartbeat either, look after look. A worker that is stopped,
that stalls, or whose network swallows everything keeps its connection, and with it its leases. So
does one whose machine has lost power: then its jobs go on when their leases are over.

A worker that lives after all is in the same position as any whose leases are over: what it writes
once the next attempt has begun is refused.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from tasks.contract import keys
from tasks.queue.backlog import MEMBERS_AT_ONCE, load_script
from tasks.queue.control import BEAT_S, BEATS, workers
from tasks.queue.jobs import Jobs

log = logging.getLogger(__name__)

LOOK_S = 0.5
# A worker that has lost all its connections at once, as by a restart of Redis, has so long to come
# back; looks are counted, not time, so that none of it passes while Redis does not answer.
MISSED_BEATS = 3
LOOKS = round(MISSED_BEATS * BEAT_S / LOOK_S)


class Silence(NamedTuple):
    """What was seen of a worker that has no connection."""

    beats: bytes
    """The number of its last heartbeat."""
    looks: int
    """At which that was still so, in a row."""


class GoneWorkers:
    """Looks for them in a thread; one per process, two may run."""

    def __init__(self, queue: Jobs) -> None:
        self._queue = queue
        self._redis = queue.backlog.redis
        self._lapse = load_script(self._redis, "lapse")
        self._silences: dict[str, Silence] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gone workers", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it, after the look that is under way."""
        self._stopping.set()
        self._thread.join(LOOK_S)

    def _run(self) -> None:
        is_failing = False
        while not self._stopping.wait(LOOK_S):
            try:
                self.look()
                is_failing = False
            except Exception as failure:  # a thread's boundary
                # The workers' connections may have broken with this one: all of them begin anew.
                self._silences.clear()
                if not is_failing:
                    log.warning(
                        "killed workers are noticed only when their leases are over: %s",
                        failure,
                        exc_info=not isinstance(failure, RedisError),
                    )
                is_failing = True

    def look(self) -> None:
        """Hands on the jobs of workers that have been silent for `LOOKS` looks after the first.

        But not where no other worker of their model is connected: nobody could go on with them,
        and where all are gone at once, it is rather the network or Redis that has failed.

        Raises:
            RedisError: Redis does not answer.
        """
        unconnected = self._unconnected()
        if not unconnected:
            self._silences.clear()
            return
        models = {worker.id: worker.model for worker in workers(self._redis)}
        served = {model for worker, model in models.items() if worker not in unconnected}
        self._silences = self._silent(unconnected & models.keys())
        for worker, (beats, looks) in self._silences.items():
            if looks >= LOOKS and models[worker] in served:
                self.hand_on(worker, beats)

    def _unconnected(self) -> set[str]:
        """The listed workers that do not listen on their control channels."""
        listed: Any = self._redis.smembers(keys.WORKERS)
        ids = [name.decode() for name in listed]
        if not ids:
            return set()
        counted: Any = self._queue.bus.pubsub_numsub(*map(keys.control, ids))
        return {worker for worker, (_, number) in zip(ids, counted, strict=True) if number == 0}

    def _silent(self, unconnected: set[str]) -> dict[str, Silence]:
        """These workers, and since how many looks each has sent no heartbeat either."""
        silences = {}
        for worker in unconnected:
            beats: Any = self._redis.hget(keys.worker(worker), BEATS)
            if beats is None:
                continue  # it has just ended, or is of an older version, which does not count them
            known = self._silences.get(worker)
            looks = known.looks + 1 if known and known.beats == beats else 0
            silences[worker] = Silence(beats, looks)
        return silences

    def hand_on(self, worker: str, beats: bytes) -> None:
        """Ends the leases of a worker, unless it has sent another heartbeat than that.

        Raises:
            RedisError: Redis does not answer; done again, it ends the rest.
        """
        ended = 0
        for job_ids in self._running():
            number = self._lapse(keys=[keys.worker(worker)], args=[worker, beats, *job_ids])
            if number is None:
                return
            ended += number
        # Nobody counts on it any more; if it lives, its next heartbeat lists it again.
        self._redis.delete(keys.worker(worker))
        log.warning("worker %s is gone, and %d leases with it", worker, ended)
        self._queue.reap()

    def _running(self) -> Iterator[list[bytes]]:
        """The ids of all running jobs, a slice at a time; one may come twice."""
        cursor = 0
        while True:
            reply: Any = self._redis.zscan(keys.LEASES, cursor, count=MEMBERS_AT_ONCE)
            cursor, members = reply
            yield [job_id for job_id, _ in members]
            if cursor == 0:
                return
