"""Runs jobs on the engine: each one's request goes in as ASGI, its answer ends the job."""

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from gpu_worker import traces
from gpu_worker.engines.engine import Engine, Message, current_job
from gpu_worker.publisher import Publisher, Refusal
from gpu_worker.replay_log import current_replay_log
from gpu_worker.running import (
    AnswerRefusedError,
    DivergedError,
    EngineDiedError,
    EngineFailedError,
    History,
    LogLostError,
    PausedError,
    Running,
)
from gpu_worker.timeouts import wait_until_late
from tasks.contract.events import Attempt, End
from tasks.contract.job import Cause, Claim, Lane, State, Usage
from tasks.contract.job_errors import JobFailedError, StreamBrokenError
from tasks.contract.models import Timeouts

log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """How the engine has ended a job."""

    state: State | None
    """None: it was stopped, and is no longer this worker's."""
    usage: Usage | None
    """None: it does not tell."""


class Runner:
    """Runs claimed jobs on the engine, all at once, on its event loop."""

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher,
        on_cleared: Callable[[Claim], None],
        timeouts: Timeouts,
    ) -> None:
        """`on_cleared` is called, in a thread, when a suspect has got further than before."""
        self._engine = engine
        self._timeouts = timeouts
        self._publisher = publisher
        self._on_cleared = on_cleared
        self._running: dict[Attempt, Running] = {}

    async def run(self, claim: Claim, history: History) -> Ended:
        """Runs the job to its end, from where earlier attempts ended; then the engine is done.

        Raises:
            PausedError: it is to go on later, and its log has what that takes.
            EngineDiedError: the engine died; its error message was not sent.
            EngineFailedError: the job is to be tried again.
            LogLostError: its log has a gap that only a next attempt can fill.
            AnswerRefusedError: the job is to be tried again, and has failed.
        """
        running = Running(claim, self._publisher, self._engine, history)
        with traces.recorded(running):
            return await self._run_to_end(running)

    async def _run_to_end(self, running: Running) -> Ended:
        attempt = Attempt.of(running.claim)
        self._running[attempt] = running
        try:
            state = await self._run(running)
        finally:
            del self._running[attempt]
            running.meter.close()
        if running.is_paused and await running.feed.written():
            raise PausedError(running.usage)
        if running.feed.refusal is Refusal.GAP:
            raise LogLostError(Refusal.GAP.value)
        if running.feed.refusal is Refusal.UNWRITABLE:
            raise AnswerRefusedError(Refusal.UNWRITABLE.value)
        is_over = running.is_stopped or running.feed.refusal is not None
        return Ended(None if is_over else state, running.usage)

    async def _run(self, running: Running) -> State | None:
        if running.history.end:
            return await running.end(running.history.end)
        if running.history.is_lost:
            return await running.end(End.failed(StreamBrokenError()))
        if not running.claim.is_suspect:
            return await self._answer(running)
        clearing = asyncio.ensure_future(self._clear(running))
        try:
            return await self._answer(running)
        finally:
            clearing.cancel()

    async def _clear(self, running: Running) -> None:
        await running.has_progressed.wait()
        if await running.feed.written():
            await asyncio.to_thread(self._on_cleared, running.claim)

    async def _answer(self, running: Running) -> State | None:
        current_replay_log.set(running.replay_log)
        current_job.set(running.claim.job)
        running.task = asyncio.ensure_future(
            self._engine.app(_scope(running.claim), running.receive, running.send)
        )
        watching = asyncio.ensure_future(self._watch(running))
        try:
            await running.task
            return await running.close()
        except asyncio.CancelledError:
            return await running.close_early() if running.has_left else None
        except EngineFailedError:
            raise
        except Exception as failure:  # noqa: BLE001 (boundary of foreign code: vLLM's app)
            if running.has_left:
                return await running.close_early()
            return await self._fail(running, failure)
        finally:
            watching.cancel()

    async def _watch(self, running: Running) -> None:
        running.end_early(await wait_until_late(running.claim, self._timeouts, running.progress))

    async def _fail(self, running: Running, failure: Exception) -> State:
        """Ends the job that the engine's app has not answered."""
        job_id = running.claim.job.id
        if self._engine.is_dead():
            raise EngineDiedError from failure
        if running.has_diverged or isinstance(failure, DivergedError):
            log.warning("job %s: cannot be continued as it began", job_id)
            return await running.end(End.failed(StreamBrokenError()))
        log.error("job %s: the engine's app failed", job_id, exc_info=failure)
        failed = End.failed(JobFailedError("the engine failed on this request"))
        return await running.end(failed)

    def stop(self, attempt: Attempt, cause: Cause | State) -> None:
        """Stops a job that is no longer this worker's: the engine frees its slot."""
        running = self._running.get(attempt)
        if running and not running.is_stopped:
            log.info("job %s: stopped", attempt)
            running.stop(cause)

    async def pause(self, lane: Lane, count: int) -> None:
        """Stops so many jobs of the lane, or those that can go on later if they are fewer.

        Those that have come furthest here: each attempt is to bring its job on.
        """
        jobs = (job for job in self._running.values() if job.claim.job.lane is lane)
        able = sorted(
            (job for job in jobs if job.can_pause), key=lambda job: -job.replay_log.made()
        )
        for running in able[:count]:
            log.info("job %s: paused", running.claim.job.id)
            running.pause()

    def stop_all(self, cause: Cause) -> None:
        """Stops whatever runs."""
        for attempt in list(self._running):
            self.stop(attempt, cause)


def _scope(claim: Claim) -> Message:
    """The ASGI scope of the job's request; its id becomes the id that vLLM gives the answer."""
    job = claim.job
    return {
        "type": "http",
        # From 2.4 on Starlette's streams do not watch for a disconnect.
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": job.endpoint,
        "raw_path": job.endpoint.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"sluice"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(job.body)).encode()),
            (b"x-request-id", job.id.encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
