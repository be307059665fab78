"""The spans of an attempt: recorded when it is over, from what its clock has noted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gpu_worker.running import Running
from tasks.contract import tracing
from tasks.contract.job import State
from tasks.contract.tracing import Attribute, Span, attempt_span

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


def _record(running: Running, error: str) -> None:
    claim, job, meter = running.claim, running.claim.job, running.meter
    since_ns = time.time_ns() - time.monotonic_ns()

    def at_ns(monotonic_s: float) -> int:
        return round(monotonic_s * 1e9) + since_ns

    claimed_ns, begun_ns = at_ns(claim.claimed_s), at_ns(meter.begun_s)
    times_ns = claimed_ns, time.time_ns()
    attempt = attempt_span(job.id, claim.attempt, job.model, job.endpoint, times_ns)
    attributes = {**attempt.attributes, **_attributes(running)}
    spans = [replace(attempt, attributes=attributes, error=error)]
    if claim.attempt == 1:
        queued_ns = claimed_ns - claim.queue_ms * 1_000_000
        spans.append(Span(name="queue", begun_ns=queued_ns, ended_ns=claimed_ns))
    steps = [Span(name="claim", begun_ns=claimed_ns, ended_ns=begun_ns)]
    if meter.first_s:
        first_ns, last_ns = at_ns(meter.first_s), at_ns(meter.last_s)
        steps.append(Span(name="prefill", begun_ns=begun_ns, ended_ns=first_ns))
        steps.append(Span(name="decode", begun_ns=first_ns, ended_ns=last_ns))
    tracing.record(PART, job.traceparent, *spans)
    tracing.record(PART, tracing.under(job.traceparent, attempt.id), *steps)


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
