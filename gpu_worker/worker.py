"""A worker: one engine on an event loop of its own, and a Celery worker that takes tickets.

dispatcher.py         a thread per job     engine's loop                 other threads
ticket -> claim jobs                                                     renew leases (heartbeat.py)
                 -->  start the job   -->  run it on the engine          listen for commands
                      (waits)              pieces -> publisher -> Redis  watch engine (shutdown.py)
                      finish, claim   <--  state
"""

import asyncio
import functools
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import uvloop
from redis.exceptions import RedisError

from gpu_worker import heartbeat, metrics, orphans, preemption, shutdown, traces
from gpu_worker.claims import Claims
from gpu_worker.dispatcher import Dispatcher
from gpu_worker.engines.engine import Engine, Seat, cores_per_gpu, count_front_ends, open_engine
from gpu_worker.publisher import Publisher
from gpu_worker.runner import Ended, Runner
from gpu_worker.running import (
    AnswerRefusedError,
    EngineDiedError,
    EngineFailedError,
    History,
    LogLostError,
    PausedError,
)
from tasks.contract import logs, tracing
from tasks.contract.connections import connect, connect_async
from tasks.contract.errors import ConfigurationError, ModelNotFoundError, SluiceError
from tasks.contract.events import Attempt
from tasks.contract.job import Cause, Claim, State
from tasks.contract.models import Catalog, Model, get_catalog
from tasks.contract.response import assemble
from tasks.contract.settings import get_settings
from tasks.contract.trouble import refuse_unusable
from tasks.queue import entries
from tasks.queue.backlog import Backlog, Finished
from tasks.queue.celery_worker import TicketConsumer
from tasks.queue.control import WorkerState
from tasks.queue.token_log import TokenLog

log = logging.getLogger(__name__)

RETRY_S = 0.5
# All processes of the API know of a model within seconds.
MOST_ADDING_S = 5.0
# Between tries of a job that has failed in itself: 0.5 s, 1 s, 2 s…, with up to half more.
FAILED_RETRY_S = 0.5
# How long Celery's threads may keep the engine's loop from running; Python's own 5 ms is a token.
SWITCH_INTERVAL_S = 0.0005

Result = TypeVar("Result")


def run(model_name: str | None) -> int:
    """Serves the model until a signal or the engine's failure; returns the exit code.

    Raises:
        SluiceError: the model or a setting is wrong, or the engine cannot be loaded.
    """
    prepare()
    orphans.refuse_orphans()
    found = _find(model_name)
    count = count_front_ends(found, cores_per_gpu(), get_settings().metrics_bind)
    model = found.model_copy(update={"frontends": count})
    if model.frontends > 1:
        from gpu_worker import front_ends  # it imports this module

        return front_ends.run(model)
    return Worker(model).run()


def prepare() -> None:
    """Sets up a worker's process.

    Raises:
        SluiceError: a setting is wrong.
    """
    logs.configure(get_settings())
    refuse_unusable(get_settings())
    tracing.get_tracer(traces.PART)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def _find(model_name: str | None) -> Model:
    """The model of that name or alias, not what a wildcard leads to; it may be just added."""
    deadline_s = time.monotonic() + MOST_ADDING_S
    while True:
        catalog = _read_catalog()
        if not model_name or model_name in catalog.names:
            return catalog.resolve(model_name)
        if time.monotonic() > deadline_s:
            raise ModelNotFoundError(model_name, catalog.names)
        time.sleep(RETRY_S)


def _read_catalog() -> Catalog:
    try:
        return entries.apply(connect(get_settings().redis_url), get_catalog())
    except RedisError as away:
        log.warning("what was changed since models.yaml is not known, Redis is away: %s", away)
        return get_catalog()


class TakeoverRefusedError(Exception):
    """A later attempt has written into the job's log."""


class Worker:
    """The parts of a worker, and how they see a job through."""

    def __init__(
        self,
        model: Model,
        seat: Seat | None = None,
        place: int = 0,
        on_serving: Callable[[], None] = lambda: None,
    ) -> None:
        """The rest is for one of several front ends (front_ends.py), which `place` counts."""
        self.id = f"{socket.gethostname()}-{os.getpid()}"
        self.model = model
        self.settings = get_settings()
        self.backlog = Backlog(connect(self.settings.redis_url))
        self.log = TokenLog(connect(self.settings.bus_url))
        self.runner: Runner
        self.loop = uvloop.new_event_loop()
        self.metrics_address = self._serve_metrics(place)
        self.state = WorkerState.SERVING
        self.closing = threading.Event()
        self.has_lost_engine = threading.Event()  # another process, which has it, sets this
        self._seat, self._on_serving = seat, on_serving
        self.claims = Claims(model.slots)
        self._loaded = threading.Event()
        self._consumer: TicketConsumer | None = None
        self._exit_code = 0
        self._load_failure: BaseException | None = None
        self._stop_engine = asyncio.Event()

    def _serve_metrics(self, place: int) -> str:
        bind = metrics.bind_of(self.settings.metrics_bind, place)
        try:
            redis_host = urlsplit(self.settings.redis_url).hostname or "127.0.0.1"
            return metrics.serve(bind, redis_host, self.model.name)
        except OSError as taken:
            raise ConfigurationError(
                f"the worker's metrics cannot be served on {bind} ({taken}); "
                "set SLUICE_METRICS_BIND to another address, with port 0 for any free one"
            ) from None

    def run(self) -> int:
        """Loads the engine, works on tickets until a stop is requested, then closes everything."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        engine_thread = self._start(self._run_engine, "engine", daemon=False)
        self._loaded.wait()
        if self._load_failure:
            raise self._load_failure
        if not self.closing.is_set():
            self._consume_tickets()
        self.closing.set()
        self.loop.call_soon_threadsafe(self._stop_engine.set)
        engine_thread.join()
        heartbeat.deregister(self.backlog.redis, self.id)
        return self._exit_code

    def serve(self, claim: Claim) -> bool:
        """Runs the job to its end; returns whether another one may wait without a ticket."""
        about = {"attempt": claim.attempt, "queue_ms": claim.queue_ms}
        log.info("job claimed", extra=claim.job.log_fields | about)
        if self.claims.given_up:
            self.hand_back(claim, Cause.HANDED_BACK, "its worker was stopped")
            traces.record_unrun(claim, Cause.HANDED_BACK)
            return False
        return self._run_job(claim)

    def _run_job(self, claim: Claim) -> bool:
        begun_s = time.monotonic()
        try:
            history = self._take_over(claim) if claim.attempt > 1 else History()
            if history is None:
                return True
            running = self.runner.run(claim, history)
            ended = asyncio.run_coroutine_threadsafe(running, self.loop).result()
        except EngineDiedError:
            self.state = WorkerState.DRAINING
            self.stop_consuming()
            self.claims.close()
            self.hand_back(claim, Cause.ENGINE_DIED, "the engine died")
            return False
        except TakeoverRefusedError:
            self.hand_back(
                claim, Cause.WORKER_FAILED, "its log has later entries than this attempt"
            )
            traces.record_unrun(claim, Cause.WORKER_FAILED)
            return True
        except LogLostError as lost:
            self.hand_back(claim, Cause.HANDED_BACK, str(lost))
            return True
        except PausedError as paused:
            is_ours = self.hand_back(claim, Cause.PREEMPTED, "interactive jobs wait for its slots")
            ended = Ended(None, None if is_ours else paused.usage)
        except (EngineFailedError, AnswerRefusedError) as failed:
            pause_s = FAILED_RETRY_S * 2**claim.failures * random.uniform(1, 1.5)  # noqa: S311
            self.hand_back(claim, failed.cause, str(failed), pause_s)
            return True
        return self._finish(claim, ended, time.monotonic() - begun_s)

    def _finish(self, claim: Claim, ended: Ended, ran_s: float) -> bool:
        """Notes the job's end; returns whether another one may wait without a ticket."""
        state, usage = ended
        if state is None:
            if usage:
                self.persist(lambda: self.backlog.report(claim.job.id, usage))
            return True
        is_dead = state is State.FAILED and claim.failures > 0 and claim.is_last
        reason = "the engine failed on its last attempt too" if is_dead else ""
        finished = self.persist(lambda: self.backlog.finish(claim, state, reason, usage))
        self._log_end(claim, state, ran_s)
        return finished is not Finished.NONE_WAITS

    def _log_end(self, claim: Claim, state: State, ran_s: float) -> None:
        about: dict[str, object] = {
            "attempt": claim.attempt,
            "queue_ms": claim.queue_ms,
            "run_ms": round(ran_s * 1000),
        }
        if self.settings.log_content:
            outcome = self.persist(lambda: assemble(self.log.read_after(claim.job.id)))
            about["answer"] = outcome and outcome.body and outcome.body.decode(errors="replace")
        log.info("job %s", state, extra=claim.job.log_fields | about)

    def _take_over(self, claim: Claim) -> History | None:
        """What earlier attempts wrote; they can write no more from now on."""
        job = claim.job
        take_over = lambda: self.log.take_over(job.id, claim.attempt, job.listener)
        entries = self.persist(take_over)
        if entries is None:
            return None
        if not entries or entries[-1].position != (claim.attempt, 0):
            raise TakeoverRefusedError
        return History.read(entries)

    def hand_back(self, claim: Claim, cause: Cause, reason: str, delay_s: float = 0) -> bool:
        """Gives the job to other workers, at once or later; it may be its end as a dead letter.

        False: it was not this worker's any more.
        """
        state = self.persist(lambda: self.backlog.requeue(claim, cause, reason, delay_s))
        about = {"attempt": claim.attempt, "cause": cause, "state": state}
        log.warning("job handed back: %s", reason, extra=claim.job.log_fields | about)
        if state is State.FAILED:
            self.persist(lambda: self.log.end_given_up(claim))
        return state is not None

    def persist(self, write: Callable[[], Result]) -> Result | None:
        """Writes to Redis as soon as it answers, for as long as this worker lives."""
        while True:
            try:
                return write()
            except RedisError as failure:
                log.warning("Redis does not answer, trying again: %s", failure)
            if self.closing.wait(RETRY_S):
                return None

    def stop_job(self, attempt: Attempt) -> None:
        """Stops a job that is no longer this worker's."""
        # A job that is handed back may be found lost before it is stopped for that.
        cause = self.claims.given_up or State.CANCELLED
        self.loop.call_soon_threadsafe(self.runner.stop, attempt, cause)

    def _clear(self, claim: Claim) -> None:
        """The job has got further than any earlier attempt: it is not what kills its workers."""
        self.persist(lambda: self.backlog.clear(claim))

    def drain(self) -> None:
        """Takes no more jobs, lets running ones finish up to the limit, and ends the worker."""
        if self.state is WorkerState.SERVING:
            self.state = WorkerState.DRAINING
            metrics.report_ready(False)
            self._start_part("the drain", lambda: shutdown.drain(self))

    def stop_consuming(self) -> None:
        """Takes no more tickets."""
        if self._consumer:
            self._consumer.stop()

    def shut_down(self, exit_code: int) -> None:
        """Ends the consumer's loop, and with it the worker."""
        self._exit_code = exit_code
        self.claims.close()
        self.closing.set()
        TicketConsumer.exit(exit_code)

    def _consume_tickets(self) -> None:
        """Works on tickets, in the main thread, until a shutdown is asked for."""
        dispatcher = Dispatcher(self)
        self._consumer = TicketConsumer(self.model.name, dispatcher.serve_ticket)
        log.info("worker %s serves %s with %d slots", self.id, self.model.name, self.model.slots)
        metrics.report_ready(True)
        self._on_serving()
        with dispatcher:
            self._consumer.run()

    def _run_engine(self) -> None:
        """The engine's thread: its event loop, from the load to the end."""
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._engine_main())
        except (Exception, SystemExit) as failure:  # process boundary: raised by run()
            if isinstance(failure, SluiceError):
                self._load_failure = failure
            else:
                log.exception("the engine failed")
                self._load_failure = SluiceError(f"the engine failed: {failure}")
            self.shut_down(1)
        finally:
            self._loaded.set()

    async def _engine_main(self) -> None:
        async with open_engine(self.model, self._seat) as engine:
            with orphans.recorded():
                publisher = Publisher(connect_async(self.settings.bus_url), self.stop_job)
                self.runner = Runner(engine, publisher, self._clear, self.model.timeouts)
                publishing = asyncio.ensure_future(self._publish(publisher))
                # The engine's libraries have configured loggers of their own.
                logs.take_over_loggers()
                # A signal drains from now on; others see the worker by its first heartbeat.
                self._loaded.set()
                self._start_parts(engine)
                await self._stop_engine.wait()
                publishing.cancel()

    async def _publish(self, publisher: Publisher) -> None:
        try:
            await publisher.run()
        except Exception as failure:  # noqa: BLE001 (a part's boundary, as in _start_part)
            part = functools.partial(shutdown.crash, self, "the publisher", failure)
            self._start(part, "publisher failed")

    def _start_parts(self, engine: Engine) -> None:
        self._start_part("the heartbeat", lambda: heartbeat.run(self, engine, self.closing))
        listen = lambda: heartbeat.listen_for_commands(self.id, self.stop_job, self.drain)
        self._start_part("the listener", listen)
        self._start_part("the watch of the engine", lambda: shutdown.watch_engine(self, engine))
        self._start_part("preemption", lambda: preemption.run(self, engine))

    def _start_part(self, name: str, run: Callable[[], None]) -> None:
        """Runs in a thread what the worker cannot do without: if it fails, the worker ends."""

        def run_guarded() -> None:
            try:
                run()
            except Exception as failure:  # noqa: BLE001 (a thread's boundary)
                shutdown.crash(self, name, failure)

        self._start(run_guarded, name)

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self._loaded.is_set():
            os._exit(0)  # nothing is claimed yet; a load may take minutes
        log.info("%s: draining", signal.Signals(number).name)
        self.drain()

    def _start(
        self, target: Callable[[], None], name: str, daemon: bool = True
    ) -> threading.Thread:
        thread = threading.Thread(target=target, daemon=daemon, name=name)
        thread.start()
        return thread


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
