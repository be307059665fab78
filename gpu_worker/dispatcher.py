"""From tickets to running jobs: as many as there is room for, each with a thread that waits."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self
from uuid import uuid4

from tasks.contract.job import Claim, Room

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

# Bounds one script's run in Redis; the next claim takes more.
MOST_CLAIMED = 8


class Dispatcher:
    """Claims jobs for the worker's free slots, and runs them in its threads."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._claims = worker.claims
        self._threads = ThreadPoolExecutor(worker.model.slots, "job")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Claims no more, and waits for the threads."""
        self._claims.close()
        self._threads.shutdown()

    def serve_ticket(self, _model_name: str) -> None:
        """The Celery task: claims jobs of the backlog, best first, and starts them.

        A ticket only wakes a worker that has room.
        """
        while (claimed := self._claims.take(self._claim)) is None:
            # Leaves the ticket to others; this worker takes no other one until there is room.
            self._send_ticket()
            if not self._claims.await_room():
                return
        self._start(claimed)

    def _send_ticket(self) -> None:
        worker = self._worker
        worker.persist(lambda: worker.backlog.send_ticket(worker.model.name))

    def _claim(self, room: Room) -> list[Claim]:
        """The next jobs. A claim whose reply is lost took effect: its token finds the same jobs."""
        worker, model, token = self._worker, self._worker.model, uuid4().hex
        claim = lambda: worker.backlog.claim_several(
            model.name, worker.id, token, room, model.reserved_slots, MOST_CLAIMED
        )
        return worker.persist(claim) or []

    def _start(self, claimed: Iterable[Claim]) -> None:
        for claim in claimed:
            self._threads.submit(self._run, claim)

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
