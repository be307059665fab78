"""A worker: one engine on an event loop of its own, and a Celery worker whose threads wait for it.

Celery thread            engine's loop                      other threads
ticket -> claim job -->  run the job on the engine          renew leases, beat (keeper)
(waits)                  pieces -> publisher -> Redis       hear cancellations (keeper)
finish job          <--  state
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop
from celery.app.trace import setup_worker_optimizations
from celery.worker import WorkController
from celery.worker import state as celery_state
from redis.exceptions import RedisError

from gpu_worker import keeper, orphans
from gpu_worker.engine import Engine, open_engine
from gpu_worker.pool import SlotPool
from gpu_worker.publisher import Publisher
from gpu_worker.runner import EngineDiedError, Runner
from tasks import keys
from tasks.app import TICKET, get_celery
from tasks.backlog import Backlog
from tasks.connections import connect, connect_async
from tasks.errors import SluiceError
from tasks.message import Claim, State
from tasks.models import Model, get_catalog
from tasks.settings import get_settings
from tasks.token_log import TokenLog

log = logging.getLogger(__name__)

RETRY_S = 0.5
# How long Celery's threads may keep the engine's loop from running; Python's own 5 ms is a token.
SWITCH_INTERVAL_S = 0.0005


def run(model_name: str) -> int:
    """Serves the model until a signal or the engine's death; returns the exit code.

    Raises:
        SluiceError: the model or a setting is wrong, or the engine cannot be loaded.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # One line per job is the runner's; Celery's two per ticket say nothing of it.
    for chatty in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    orphans.refuse_orphans()
    return Worker(get_catalog().resolve(model_name)).run()


class Worker:
    """The parts of a worker, and the way of a ticket through them."""

    def __init__(self, model: Model) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}"
        self.model = model
        self.settings = get_settings()
        self.backlog = Backlog(connect(self.settings.redis_url))
        self.runner: Runner
        self.loop = uvloop.new_event_loop()
        self.is_draining = False
        self._closing = threading.Event()
        self._loaded = threading.Event()
        self._idle = threading.Condition()
        self._held = 0
        self._exit_code = 0
        self._load_failure: BaseException | None = None
        self._stop_engine = asyncio.Event()

    def run(self) -> int:
        """Loads the engine, works on tickets until told to stop, then closes everything."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        engine_thread = self._start(self._run_engine, daemon=False)
        self._loaded.wait()
        if self._load_failure:
            raise self._load_failure
        if not self._closing.is_set():
            self._consume_tickets()
        self._closing.set()
        self.loop.call_soon_threadsafe(self._stop_engine.set)
        engine_thread.join()
        keeper.leave(self.backlog.redis, self.id)
        return self._exit_code

    def serve_ticket(self, _model_name: str) -> None:
        """The Celery task: claims the best job of the backlog and sees it through."""
        if self.is_draining:
            return
        claim = self.backlog.claim(self.model.name, self.id)
        if claim is None:
            return
        with self._idle:
            self._held += 1
        try:
            self._see_through(claim)
        finally:
            with self._idle:
                self._held -= 1
                self._idle.notify_all()

    def _see_through(self, claim: Claim) -> None:
        try:
            state = self._on_loop(self.runner.run(claim))
        except EngineDiedError:
            self._persist(lambda: self.backlog.release([claim]))
            return
        if state is not None:
            self._persist(lambda: self.backlog.finish(claim, state))
            log.info(
                "job %s: %s model=%s attempt=%d queue_ms=%d",
                *(claim.job.id, state, claim.job.model, claim.attempt, claim.queue_ms),
            )

    def _persist(self, write: Callable[[], object]) -> None:
        """Writes to the queue as soon as it answers, for as long as this worker lives."""
        while True:
            try:
                write()
                return
            except RedisError as failure:
                log.warning("queue not written, trying again: %s", failure)
            if self._closing.wait(RETRY_S):
                return

    def _on_loop(self, coroutine: Coroutine[Any, Any, State | None]) -> State | None:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def _consume_tickets(self) -> None:
        """Celery's main loop, in the main thread, until a shutdown is asked for."""
        celery = get_celery()
        celery.task(self.serve_ticket, name=TICKET, shared=False, bind=False)
        # Makes this app the one that Celery's task threads run; they find no tasks without it.
        setup_worker_optimizations(celery)
        controller = WorkController(
            app=celery,
            queues=[keys.ticket_queue(self.model.name)],
            pool_cls=SlotPool,
            concurrency=self.model.slots,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        log.info("worker %s serves %s with %d slots", self.id, self.model.name, self.model.slots)
        controller.start()

    def _run_engine(self) -> None:
        """The engine's thread: its event loop, from the load to the end."""
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._engine_main())
        except (Exception, SystemExit) as failure:  # process boundary: told by run()
            if isinstance(failure, SluiceError):
                self._load_failure = failure
            else:
                log.exception("the engine failed")
                self._load_failure = SluiceError(f"the engine failed: {failure}")
            self._shut_down(1)
        finally:
            self._loaded.set()

    async def _engine_main(self) -> None:
        async with open_engine(self.model) as engine:
            with orphans.recorded():
                publisher = Publisher(connect_async(self.settings.bus_url), self._stop_job)
                token_log = TokenLog(connect(self.settings.bus_url))
                self.runner = Runner(engine, publisher, token_log)
                publishing = asyncio.ensure_future(publisher.run())
                self._start_keepers(engine)
                self._loaded.set()
                await self._watch(engine)
                publishing.cancel()

    def _start_keepers(self, engine: Engine) -> None:
        stop = self._stop_job
        self._start(
            lambda: keeper.keep(
                *(self.id, self.model, self.backlog, self.runner, engine, stop, self._closing)
            )
        )
        self._start(lambda: keeper.hear_cancellations(self.id, stop))

    def _stop_job(self, job_id: str) -> None:
        self.loop.call_soon_threadsafe(self.runner.stop, job_id)

    async def _watch(self, engine: Engine) -> None:
        """Waits until the worker stops; a dead engine is what stops it with an error."""
        while not self._stop_engine.is_set():
            if engine.is_dead() and not self.is_draining:
                log.error("the engine is dead; the worker ends and its jobs run elsewhere")
                self.is_draining = True
                self._shut_down(1)
            try:
                await asyncio.wait_for(self._stop_engine.wait(), timeout=0.2)
            except TimeoutError:
                continue

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self.is_draining:
            log.info("%s: draining", signal.Signals(number).name)
            self.is_draining = True
            self._start(self._drain)

    def _drain(self) -> None:
        """Lets running jobs finish up to the limit, hands the rest back, then stops Celery."""
        if not self._loaded.is_set():
            os._exit(0)  # nothing has been claimed; a load of minutes is not waited for
        with self._idle:
            self._idle.wait_for(lambda: self._held == 0, timeout=self.settings.drain_s)
        left = [running.claim for running in list(self.runner.running.values())]
        if left:
            log.info("handing %d unfinished jobs back", len(left))
            self._persist(lambda: self.backlog.release(left))
            for claim in left:
                self._stop_job(claim.job.id)
        self._shut_down(0)

    def _shut_down(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._closing.set()
        celery_state.should_stop = exit_code

    def _start(self, target: Callable[[], None], daemon: bool = True) -> threading.Thread:
        thread = threading.Thread(target=target, daemon=daemon, name=target.__qualname__)
        thread.start()
        return thread


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
