"""Batch jobs make way for interactive ones that find all slots taken, and go on later."""

import asyncio
import logging
import random
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from gpu_worker.engines.engine import Engine
from tasks.contract import keys
from tasks.contract.job import Lane
from tasks.queue.depth import Waiting, read_waiting

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

LOOK_S = 0.05
NONE_WAITS = Waiting(0, "")


def run(worker: "Worker", engine: Engine) -> None:
    """Until the worker closes: looks whether interactive jobs wait while batch jobs run here.

    If the first of them still waits one look later, no idle worker has taken it: then half as many
    batch jobs make way, of all workers together, and at the next look half of the rest. A job that
    needs several slots is waited for in the same way.
    """
    before, before_steps = NONE_WAITS, None
    while not worker.closing.wait(LOOK_S):
        waiting = _look(worker)
        steps = engine.progress() if waiting.first else None
        # An engine that stands still may do so because of a job, which would carry that elsewhere.
        if waiting.first and waiting.first == before.first and steps != before_steps:
            _make_way(worker, waiting.number)
        before, before_steps = waiting, steps


def _look(worker: "Worker") -> Waiting:
    """What waits; nothing is asked while no batch job runs here."""
    if not any(claim.job.lane is Lane.BATCH for claim in worker.claims.held()):
        return NONE_WAITS
    try:
        return read_waiting(worker.backlog.redis, worker.model.name, Lane.INTERACTIVE)
    except RedisError as away:
        log.warning("whether chats wait is not known: %s", away)
        return NONE_WAITS


def _make_way(worker: "Worker", waiting: int) -> None:
    """Pauses this worker's share; each worker looks for itself, and rounds at random."""
    try:
        workers = worker.backlog.redis.scard(keys.WORKERS)
    except RedisError:
        return  # the next look reports it
    share = (waiting + 1) / 2 / max(int(workers), 1)
    count = int(share + random.random())  # noqa: S311
    pausing = worker.runner.pause(Lane.BATCH, count)
    asyncio.run_coroutine_threadsafe(pausing, worker.loop).result()
