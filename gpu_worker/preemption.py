"""Batch jobs make way for interactive ones that find all slots taken, and go on later."""

import asyncio
import logging
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from gpu_worker.engines.engine import Engine
from tasks.contract.job import Lane

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

LOOK_S = 0.05


def run(worker: "Worker", engine: Engine) -> None:
    """Until the worker closes: looks whether interactive jobs wait while batch jobs run here.

    One look later they still do, so that no idle worker has taken them: then half as many batch
    jobs make way, and at the next look half of the rest. A job that needs several slots is waited
    for in the same way.
    """
    waited, steps = False, engine.progress()
    while not worker.closing.wait(LOOK_S):
        before, steps = steps, engine.progress()
        waiting = _count_waiting(worker)
        # An engine that stands still may do so because of a job, which would carry that elsewhere.
        if waiting and waited and steps != before:
            pausing = worker.runner.pause(Lane.BATCH, (waiting + 1) // 2)
            asyncio.run_coroutine_threadsafe(pausing, worker.loop).result()
        waited = waiting > 0


def _count_waiting(worker: "Worker") -> int:
    """Interactive jobs that wait; 0 while no batch job runs here, and nothing is asked."""
    if not any(claim.job.lane is Lane.BATCH for claim in worker.claims.held()):
        return 0
    try:
        return worker.backlog.waiting(worker.model.name, Lane.INTERACTIVE)
    except RedisError as away:
        log.warning("whether chats wait is not known: %s", away)
        return 0
