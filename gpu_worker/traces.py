"""The spans of an attempt: recorded when it is over, from what its clock has noted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gpu_worker.running import Running
from tasks.contract import tracing
from tasks.contract.job import Cause, Claim, State
from tasks.contract.tracing import Attribute, Attributes, Span, attempt_span

PART = "sluice-worker"


@contextmanager
def recorded(running: Running) -> Iterator[None]:
    """The attempt, which runs in the block; if its trace is not sampled, nothing happens."""
    if not tracing.is_sampled(running.claim.job.traceparent):
        yield
        return
    error = ""
    try:
        yield
    except Exception as failed:
        error = getattr(failed, "cause", type(failed).__name__)
        raise
    finally:
        _record(running, error or _error(running))


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


def _record(running: Running, error: str) -> None:
    claim, meter = running.claim, running.meter
    attempt = _record_attempt(claim, _attributes(running), error)
    begun_ns = _at_ns(meter.begun_s)
    steps = [Span(name="claim", begun_ns=attempt.begun_ns, ended_ns=begun_ns)]
    if meter.first_s:
        first_ns, last_ns = _at_ns(meter.first_s), _at_ns(meter.last_s)
        steps.append(Span(name="prefill", begun_ns=begun_ns, ended_ns=first_ns))
        steps.append(Span(name="decode", begun_ns=first_ns, ended_ns=last_ns))
    tracing.record(PART, tracing.under(claim.job.traceparent, attempt.id), *steps)


def _record_attempt(claim: Claim, attributes: Attributes, error: str) -> Span:
    """Records it, which ends now, and the wait before it; returns it."""
    job, claimed_ns = claim.job, _at_ns(claim.claimed_s)
    waited_ns = claimed_ns - claim.wait_ms * 1_000_000
    waited = Span(name="queue", begun_ns=waited_ns, ended_ns=claimed_ns)
    times_ns = claimed_ns, time.time_ns()
    span = attempt_span(job.id, claim.attempt, job.model, job.endpoint, times_ns)
    span = replace(span, attributes={**span.attributes, **attributes}, error=error)
    tracing.record(PART, job.traceparent, waited, span)
    return span


def _at_ns(monotonic_s: float) -> int:
    return round(monotonic_s * 1e9) + time.time_ns() - time.monotonic_ns()


def _attributes(running: Running) -> dict[str, Attribute]:
    """What OpenTelemetry's conventions for generative AI name, and our own."""
    claim, meter, usage = running.claim, running.meter, running.usage
    attributes: dict[str, Attribute] = {
        "sluice.job.lane": claim.job.lane,
        "sluice.worker.id": claim.worker,
    }
    if claim.job.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = claim.job.max_tokens
    if running.head:
        attributes["gen_ai.request.stream"] = running.head.is_event_stream
    if meter.first_s and claim.attempt == 1:
        attributes["gen_ai.response.time_to_first_chunk"] = meter.first_s - meter.accepted_s
    if usage:
        attributes["gen_ai.usage.input_tokens"] = usage.input_tokens
        attributes["gen_ai.usage.output_tokens"] = usage.output_tokens
    return attributes
