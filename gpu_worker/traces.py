"""The spans of an attempt: recorded when it is over, from what its clock has noted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gpu_worker.running import Running
from gpu_worker.trace_attributes import Answer, attributes_of
from tasks.contract import tracing
from tasks.contract.job import Cause, Claim, State
from tasks.contract.tracing import Attributes, Span, attempt_span

PART = "sluice-worker"


@contextmanager
def recorded(running: Running) -> Iterator[None]:
    """The attempt, which runs in the block; if its trace is not sampled, nothing happens."""
    if not tracing.is_sampled(running.claim.job.traceparent):
        yield
        return
    error, answer = "", Answer()
    running.on_answer = answer.note
    try:
        yield
    except Exception as failed:
        error = getattr(failed, "cause", type(failed).__name__)
        raise
    finally:
        _record(running, answer, error or _error(running))


def _error(running: Running) -> str:
    """Why the job has not completed, as far as it has not."""
    ended = running.ended
    if ended is None or running.is_stopped:
        return running.stop_cause or State.CANCELLED
    if ended.state is State.COMPLETED:
        return ""
    return str(ended.error.get("error", {}).get("code") or ended.state)


def record_unrun(claim: Claim, cause: Cause) -> None:
    """Records an attempt that has ended before the engine got its request."""
    _record_attempt(claim, {}, cause)


def _record(running: Running, answer: Answer, error: str) -> None:
    claim, meter, is_call = running.claim, running.meter, running.engine.server is not None
    attempt = _record_attempt(claim, attributes_of(running, answer), error, is_call=is_call)
    begun_ns = _at_ns(meter.begun_s)
    steps = [Span(name="claim", begun_ns=attempt.begun_ns, ended_ns=begun_ns)]
    if meter.first_s:
        first_ns, last_ns = _at_ns(meter.first_s), _at_ns(meter.last_s)
        steps.append(Span(name="prefill", begun_ns=begun_ns, ended_ns=first_ns))
        steps.append(Span(name="decode", begun_ns=first_ns, ended_ns=last_ns))
    tracing.record(PART, tracing.under(claim.job.traceparent, attempt.id), *steps)


def _record_attempt(
    claim: Claim, attributes: Attributes, error: str, *, is_call: bool = False
) -> Span:
    """Records it, which ends now, and the wait before it; returns it."""
    job, claimed_ns = claim.job, _at_ns(claim.claimed_s)
    waited_ns = claimed_ns - claim.wait_ms * 1_000_000
    waited = Span(name="queue", begun_ns=waited_ns, ended_ns=claimed_ns)
    times_ns = claimed_ns, time.time_ns()
    span = attempt_span(job.id, claim.attempt, job.model, job.endpoint, times_ns)
    attributes = {**span.attributes, **attributes}
    span = replace(span, attributes=attributes, error=error, is_call=is_call)
    tracing.record(PART, job.traceparent, waited, span)
    return span


def _at_ns(monotonic_s: float) -> int:
    return round(monotonic_s * 1e9) + time.time_ns() - time.monotonic_ns()
