"""How a worker ends: drained on command, or because its engine or a part of it fails."""

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import psutil

from gpu_worker.engines.engine import Engine, Watched
from tasks.contract import logs
from tasks.contract.events import Attempt
from tasks.contract.job import Cause
from tasks.queue.control import WorkerState

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

CHECK_S = 0.2
PROGRESS_LINE_S = 5.0
# How long a worker may take to hand back its jobs and close. Without Redis it can do neither, and
# the jobs run elsewhere when their leases have expired.
FORCED_EXIT_S = 10.0
ENGINE_DIED = "the engine died"


def drain(worker: "Worker") -> None:
    """Lets running jobs finish up to the limit, hands on the rest, then ends the worker."""
    worker.stop_consuming()
    worker.claims.close()
    deadline_s = time.monotonic() + worker.settings.drain_s
    while not worker.claims.is_idle() and (left_s := deadline_s - time.monotonic()) > 0:
        held = len(worker.claims.held())
        log.info("draining: %d jobs run, %.0f s left for them", held, left_s)
        worker.claims.await_idle(min(left_s, PROGRESS_LINE_S))
    threading.Thread(target=_force_exit, daemon=True).start()
    for claim in worker.claims.give_up(Cause.HANDED_BACK):
        worker.hand_back(claim, Cause.HANDED_BACK, "its worker was stopped")
        worker.stop_job(Attempt.of(claim))
    worker.shut_down(0)


class Watch:
    """Sees that an engine is dead or hangs.

    A hung engine passes its health check, but makes no step although it has work.
    """

    def __init__(self, engine: Watched, stall_s: float) -> None:
        self._engine = engine
        self._stall_s = stall_s
        self._seen: int | None = None
        self._moved_s = time.monotonic()

    def failure(self) -> str | None:
        """What is wrong with it, at one of many looks; None: nothing."""
        steps, now_s = self._engine.progress(), time.monotonic()
        if steps is None or steps != self._seen:
            self._seen, self._moved_s = steps, now_s
        if self._engine.is_dead():
            return ENGINE_DIED
        if now_s - self._moved_s > self._stall_s:
            return f"the engine made no step for {self._stall_s:g} s"
        return None


def watch_engine(worker: "Worker", engine: Engine) -> None:
    """Until the worker closes; ends it when the engine is dead or hung: its jobs run elsewhere."""
    watch = Watch(engine, worker.settings.engine_stall_s)
    while not worker.closing.wait(CHECK_S):
        reason = ENGINE_DIED if worker.has_lost_engine.is_set() else watch.failure()
        if reason:
            _end_with_error(worker, reason, Cause.ENGINE_DIED)


def crash(worker: "Worker", part: str, failure: Exception) -> None:
    """Ends the worker, one of whose own parts has failed: one of its jobs may be the reason."""
    log.error("%s failed", part, exc_info=failure)
    _end_with_error(worker, f"{part} failed", Cause.WORKER_FAILED)


def _end_with_error(worker: "Worker", reason: str, cause: Cause) -> None:
    """Ends the worker with an error, after handing on its jobs."""
    log.error("%s; the worker ends and its jobs run elsewhere", reason)
    worker.state = WorkerState.DRAINING
    worker.stop_consuming()
    threading.Thread(target=_force_exit, daemon=True).start()
    for claim in worker.claims.give_up(cause):
        worker.hand_back(claim, cause, reason)
    worker.loop.call_soon_threadsafe(worker.runner.stop_all, cause)
    kill_children()
    worker.shut_down(1)


def kill_children() -> None:
    """Ends the engine's processes: a stopped or hung one reacts to nothing else."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _force_exit() -> None:
    """Ends this process when it does not exit by itself."""
    time.sleep(FORCED_EXIT_S)
    log.error("the worker does not end by itself")
    logs.flush()
    os._exit(1)
