"""Traces in OpenTelemetry's form; without SLUICE_OTLP_ENDPOINT nothing of it is even imported.

A job carries the context of its request as W3C's `traceparent`, and whoever works on it records
spans under that when they are over, from times that it has noted anyway. The API samples; the flag
in the context tells all others. No span holds what was asked or answered.

The id of an attempt's span follows from the job and the attempt's number: so that maintenance can
record the attempt of a worker that was killed, and the next attempt link to it.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Self

from tasks.contract.errors import ConfigurationError
from tasks.contract.settings import Settings, get_settings

if TYPE_CHECKING:
    from tasks.contract.tracer import Tracer

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_SAMPLED = 1
_TRACEPARENT = re.compile(
    "(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)

Attribute = str | int | float | bool | Sequence[str]
Attributes = Mapping[str, Attribute]


class Context(NamedTuple):
    """A span that others are recorded under."""

    trace_id: int
    span_id: int
    flags: int

    @classmethod
    def parse(cls, traceparent: str) -> Self | None:
        """Reads W3C's form; None: it is something else, and says nothing."""
        match = _TRACEPARENT.fullmatch(traceparent)
        return cls(*(int(part, 16) for part in match.groups()[:3])) if match else None

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & _SAMPLED)

    def __str__(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that is over."""

    name: str
    begun_ns: int
    """Since the epoch."""
    ended_ns: int
    attributes: Attributes = field(default_factory=dict)
    error: str = ""
    """Why it failed: a word that few others share; empty: it did not."""
    id: int = 0
    """0: a random one."""
    linked_id: int = 0
    """A span of the same trace that came before it; 0: none."""
    is_call: bool = False
    """Whether it is a request to another server."""


def log_fields(traceparent: str) -> dict[str, object]:
    """What log lines have of a trace."""
    return {"trace_id": traceparent[3:35]} if traceparent else {}


def is_sampled(traceparent: str) -> bool:
    """Whether spans of this trace are to be recorded."""
    context = Context.parse(traceparent) if traceparent else None
    return context is not None and context.is_sampled


def span_id(job_id: str, attempt: int) -> int:
    """Of the span of that attempt; 0 for that before the first."""
    if attempt < 1:
        return 0
    digest = hashlib.blake2b(f"{job_id} {attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) or 1


def under(traceparent: str, parent_id: int) -> str:
    """The same trace below another of its spans."""
    context = Context.parse(traceparent)
    return str(context._replace(span_id=parent_id)) if context else ""


def attempt_span(
    job_id: str, number: int, model: str, endpoint: str, times_ns: tuple[int, int]
) -> Span:
    """One attempt of a job, from its claim to its end, linked to the one before."""
    operation = OPERATIONS.get(endpoint, endpoint.rpartition("/")[2])
    return Span(
        name=f"{operation} {model}",
        begun_ns=times_ns[0],
        ended_ns=times_ns[1],
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "sluice",
            "gen_ai.request.model": model,
            "sluice.job.id": job_id,
            "sluice.job.attempt": number,
        },
        id=span_id(job_id, number),
        linked_id=span_id(job_id, number - 1),
    )


def refuse_missing(settings: Settings) -> None:
    """Refuses to trace without what that takes.

    Raises:
        ConfigurationError: it is not installed.
    """
    if not settings.otlp_endpoint:
        return
    try:
        import tasks.contract.tracer  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "SLUICE_OTLP_ENDPOINT is set, and OpenTelemetry is not installed; "
            "install Sluice with the extra `tracing`, or unset it"
        ) from None


@cache
def get_tracer(part: str) -> "Tracer | None":
    """That of this process, whose spans show as the service `part`; None: tracing is off."""
    endpoint = get_settings().otlp_endpoint
    if not endpoint:
        return None
    from tasks.contract.tracer import Tracer

    return Tracer(part, endpoint)


def record(part: str, traceparent: str, *spans: Span) -> None:
    """Records spans under that one, if tracing is on and the trace sampled."""
    if is_sampled(traceparent) and (tracer := get_tracer(part)):
        for span in spans:
            tracer.record(traceparent, span)
