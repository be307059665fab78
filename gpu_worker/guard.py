"""How a worker ends: drained when it is told to, or because its engine is dead or hangs."""

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import psutil

from gpu_worker.engine import Engine
from tasks.control import WorkerState
from tasks.message import Cause

if TYPE_CHECKING:
    from gpu_worker.main import Worker

log = logging.getLogger(__name__)

LOOK_S = 0.2
PROGRESS_LINE_S = 5.0
# What is left of a worker without an engine is worth no waiting.
LAST_MOMENT_S = 8.0


def drain(worker: "Worker") -> None:
    """Lets running jobs finish up to the limit, hands on the rest, then ends the worker."""
    worker.stop_consuming()
    deadline_s = time.monotonic() + worker.settings.drain_s
    while (left := worker.claims()) and (left_s := deadline_s - time.monotonic()) > 0:
        log.info("draining: %d jobs run, %.0f s left for them", len(left), left_s)
        with worker.idle:
            worker.idle.wait_for(lambda: not worker.claims(), min(left_s, PROGRESS_LINE_S))
    for claim in left:
        worker.hand_back(claim, Cause.HANDED_BACK, "its worker was stopped")
        worker.stop_job(claim.job.id)
    worker.shut_down(0)


def watch(worker: "Worker", engine: Engine) -> None:
    """Until the worker closes; a dead or hung engine ends it, and its jobs run elsewhere.

    A hung engine answers its health check: only that it makes no step, with work to do, tells.
    """
    stall_s = worker.settings.engine_stall_s
    seen, moved_s = None, time.monotonic()
    while not worker.closing.wait(LOOK_S):
        steps, now_s = engine.progress(), time.monotonic()
        if steps is None or steps != seen:
            seen, moved_s = steps, now_s
        if engine.is_dead():
            _abandon(worker, "the engine died")
        elif now_s - moved_s > stall_s:
            _abandon(worker, f"the engine made no step for {stall_s:g} s")


def _abandon(worker: "Worker", reason: str) -> None:
    """Ends the worker with an error, after handing on its jobs."""
    log.error("%s; the worker ends and its jobs run elsewhere", reason)
    worker.state = WorkerState.DRAINING
    worker.stop_consuming()
    threading.Thread(target=_end_at_last, daemon=True).start()
    for claim in worker.claims():
        worker.hand_back(claim, Cause.ENGINE_DIED, reason)
    worker.loop.call_soon_threadsafe(worker.runner.stop_all)
    _kill_children()
    worker.shut_down(1)


def _kill_children() -> None:
    """Ends the engine's processes: a stopped or hung one takes no notice of anything else."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _end_at_last() -> None:
    """Ends this process when it cannot end by itself."""
    time.sleep(LAST_MOMENT_S)
    log.error("the worker does not end by itself")
    os._exit(1)
