"""From tickets to running jobs: as many as there is room for, each with a thread that waits."""

import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Self
from uuid import uuid4

from redis.exceptions import RedisError

from tasks.contract import keys
from tasks.contract.job import Cause, Claim, Room
from tasks.queue.depth import depth

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

# A worker that is stopped waits so long for its end; one that is idle, until Celery listens.
TICKET_WAIT_S = 0.5
# So often at most a worker leaves the ticket to others though it has room.
PASS_ON_S = 0.5
# Bounds one script's run in Redis; the next claim takes more.
MOST_CLAIMED = 8


def _threads(count: int) -> ThreadPoolExecutor:
    """So many, all of them running: where the system does not allow it nothing is claimed yet."""
    threads, are_there = ThreadPoolExecutor(count, "job"), Event()
    for _ in range(count):
        threads.submit(are_there.wait)
    are_there.set()
    return threads


class Dispatcher:
    """Claims jobs for the worker's free slots, and runs them in its threads."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._claims = worker.claims
        self._threads = _threads(worker.model.slots)
        self._passes_on_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Claims no more, and waits for the threads."""
        self._claims.close()
        self._threads.shutdown()

    def serve_ticket(self, _model_name: str) -> None:
        """The Celery task: takes this ticket, and all others that come while a job runs here.

        Celery does not listen meanwhile: what it does for each message would keep the engine's loop
        waiting, which shares the interpreter with it.
        """
        self._claim_and_start()
        while self._claims.await_room() and not self._claims.is_idle():
            if self._take_ticket():
                self._claim_and_start()

    def _take_ticket(self) -> bool:
        """Waits a while for a ticket; True also when one may have got lost."""
        try:
            name = keys.tickets(self._worker.model.name)
            return self._worker.backlog.redis.brpop([name], TICKET_WAIT_S) is not None
        except RedisError as away:
            log.warning("Redis does not answer, trying again: %s", away)
            self._worker.closing.wait(TICKET_WAIT_S)
            return True

    def _claim_and_start(self) -> None:
        claimed = self._claims.take(self._claim)
        if claimed:
            self._start(claimed)
        elif claimed is None:  # there is no room
            self._leave_to_others()
        elif time.monotonic() >= self._passes_on_s and self._worker.persist(self._is_work_left):
            # What waits does not fit here, but perhaps elsewhere. Not at once again, or two workers
            # that it does not fit would pass the ticket to and fro.
            self._passes_on_s = time.monotonic() + PASS_ON_S
            self._leave_to_others()

    def _leave_to_others(self) -> None:
        worker = self._worker
        worker.persist(lambda: worker.backlog.send_ticket(worker.model.name))

    def _is_work_left(self) -> bool:
        backlog, model = self._worker.backlog, self._worker.model.name
        return model not in backlog.paused() and depth(backlog.redis, model).jobs > 0

    def _claim(self, room: Room) -> list[Claim]:
        """The next jobs. A claim whose reply is lost took effect: its token finds the same jobs."""
        worker, model, token = self._worker, self._worker.model, uuid4().hex
        claim = lambda: worker.backlog.claim_several(
            model.name, worker.id, token, room, model.reserved_slots, MOST_CLAIMED
        )
        return worker.persist(claim) or []

    def _start(self, claimed: Iterable[Claim]) -> None:
        for claim in claimed:
            try:
                self._threads.submit(self._run, claim)
            except RuntimeError:  # a claim whose reply came after the end
                self._worker.hand_back(claim, Cause.HANDED_BACK, "its worker was stopped")
                self._claims.release(claim)

    def _run(self, claim: Claim) -> None:
        """Runs the job, then others in its slots as long as such wait: they need no ticket."""
        next_one: Claim | None = claim
        try:
            while next_one:
                next_one = self._run_one(next_one)
        except Exception:
            log.exception("the thread of a job failed")

    def _run_one(self, claim: Claim) -> Claim | None:
        """Runs the job; returns another one that this thread is to run then."""
        may_wait = False
        try:
            may_wait = self._worker.serve(claim)
        finally:
            if not may_wait:
                self._claims.release(claim)
        if not may_wait:
            return None
        claimed = self._claims.take(self._claim, claim) or []
        self._start(claimed[1:])
        return claimed[0] if claimed else None
