"""What the API and maintenance do with jobs: cancel, report how they ended, hand on lost ones."""

import logging
import time
from dataclasses import replace

from redis import Redis
from redis.exceptions import RedisError

from tasks.contract import keys, tracing
from tasks.contract.errors import SluiceError
from tasks.contract.events import End, Kind
from tasks.contract.job import Cause, State
from tasks.contract.job_errors import (
    JobCancelledError,
    JobExpiredError,
    JobFailedError,
    JobLostError,
)
from tasks.contract.settings import Settings
from tasks.contract.tracing import Span
from tasks.queue import counts
from tasks.queue.backlog import Backlog, Reaped
from tasks.queue.counts import Counted
from tasks.queue.depth import depth
from tasks.queue.token_log import TokenLog

log = logging.getLogger(__name__)

# A job this young has its ticket still on the way.
OLD_ENOUGH_S = 2.0
# The service that its spans show as: it is maintenance that reaps.
TRACED_AS = "sluice-maintenance"

REASONS: dict[State, type[SluiceError]] = {
    State.FAILED: JobFailedError,
    State.EXPIRED: JobExpiredError,
    State.CANCELLED: JobCancelledError,
}


class Jobs:
    """The queue as a whole: backlog, tickets and logs."""

    def __init__(self, redis: Redis, bus: Redis, settings: Settings | None = None) -> None:
        self.backlog = Backlog(redis, settings)
        self.log = TokenLog(bus, settings)
        self.bus = bus

    def cancel(self, job_id: str, model: str, *, unless_attached: bool = False) -> bool:
        """Takes the job out of the backlog, or stops the worker that runs it.

        Doing it again notifies those whom the first try did not reach. With `unless_attached` a job
        that another client has attached to by its key is kept.

        Returns:
            Whether it is cancelled; False: it had ended otherwise, or stays.
        """
        cancelled = self.backlog.cancel(job_id, unless_attached=unless_attached)
        if cancelled is None:
            return False
        end = End.failed(JobCancelledError(), State.CANCELLED)
        self.log.end(job_id, cancelled.attempt, end, cancelled.listener)
        if cancelled.worker:
            channel = keys.control(cancelled.worker)
            self.bus.publish(channel, f"{job_id} {cancelled.attempt}")
        log.info(
            "job cancelled",
            extra={
                "job": job_id,
                "tenant": cancelled.tenant,
                "model": model,
                "attempt": cancelled.attempt,
            },
        )
        return True

    def end_without_log(self, job_id: str) -> End | None:
        """The end of a job whose log has none: lost, or its writer crashed."""
        try:
            (job,) = self.backlog.snapshots([job_id])
            last = self.log.last(job_id)
        except RedisError:
            return None
        if job is None:
            return End.failed(JobLostError())
        if not job.state.is_final or (last and last.kind is Kind.END):
            return None
        return End.failed(REASONS.get(job.state, JobLostError)(), job.state)

    def reap(self) -> int:
        """Hands on the jobs of workers that fell silent, ends those too late; returns how many."""
        number = 0
        while reaped := self.backlog.reap():
            number += len(reaped)
            for job in reaped:
                self._hand_on(job)
        return number

    def _hand_on(self, job: Reaped) -> None:
        log.warning(
            "job taken back: its lease, deadline or delay is over",
            extra={
                "job": job.job_id,
                "tenant": job.tenant,
                "model": job.model,
                "attempt": job.attempt,
                "state": job.state,
                **tracing.log_fields(job.traceparent),
            },
        )
        _record_lost(job)
        if job.state is State.QUEUED:
            self.backlog.send_ticket(job.model)
        else:
            end = End.failed(REASONS[job.state](), job.state)
            self.log.end(job.job_id, job.attempt, end, job.listener)

    def reissue_tickets(self) -> int:
        """Sends a ticket for each model whose jobs wait without one; returns how many."""
        issued, paused = 0, self.backlog.paused()
        for model in self.backlog.models():
            if model in paused:
                continue
            waiting = depth(self.backlog.redis, model)
            # Queued later than now: nobody knows how long ago that was.
            is_young = 0 <= waiting.oldest_age_s < OLD_ENOUGH_S
            if waiting.jobs and not is_young and not self.backlog.redis.exists(keys.tickets(model)):
                self.backlog.send_ticket(model)
                issued += 1
                counts.add(self.backlog.redis, Counted.TICKETS, "reissued", model, 1)
        return issued


def _record_lost(job: Reaped) -> None:
    """The spans of an attempt whose worker cannot record it any more, or of a wait in vain."""
    if job.waited_since_us is None or not job.traceparent:
        return
    now_ns, started_us = time.time_ns(), job.started_us
    begun_ns = now_ns if started_us is None else started_us * 1000
    waited = Span(name="queue", begun_ns=job.waited_since_us * 1000, ended_ns=begun_ns)
    if started_us is None:
        tracing.record(TRACED_AS, job.traceparent, replace(waited, error=job.state))
        return
    times_ns = begun_ns, now_ns
    span = tracing.attempt_span(job.job_id, job.attempt, job.model, job.endpoint, times_ns)
    lost = replace(span, error=Cause.LEASE_EXPIRED)
    tracing.record(TRACED_AS, job.traceparent, waited, lost)
