"""OpenTelemetry's SDK, which only a process that traces imports (tracing.py)."""

import atexit
import threading
from contextvars import ContextVar

from opentelemetry import trace
from opentelemetry.context import Context as Carrier
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from tasks.contract.tracing import Attributes, Context, Span

TRACES_PATH = "/v1/traces"
# What is not sent by then when a process ends is lost: the receiver may be away.
LAST_S = 2.0

# The id that the span which is made just now gets; 0: a random one.
_wanted_id: ContextVar[int] = ContextVar("wanted_id", default=0)


class _Ids(RandomIdGenerator):
    def generate_span_id(self) -> int:
        return _wanted_id.get() or super().generate_span_id()


class Tracer:
    """Samples, and sends what is recorded from a thread of its own.

    OpenTelemetry's own variables hold for sampling, resources, batches, headers and TLS.
    """

    def __init__(self, part: str, endpoint: str) -> None:
        resource = Resource.create({"service.name": part, "service.namespace": "sluice"})
        # Its own way to end may take half a minute when the receiver is away.
        provider = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=_Ids())
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES_PATH)
        self._processor = BatchSpanProcessor(exporter)
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("sluice")
        atexit.register(self._flush)

    def begin(
        self, name: str, parent: Context | None, begun_ns: int, attributes: Attributes
    ) -> "Open":
        """The span of a request, under its client's if there is one."""
        return Open(
            self._tracer.start_span(
                name,
                context=_carrier(parent),
                kind=trace.SpanKind.SERVER,
                attributes=attributes,
                start_time=begun_ns,
            )
        )

    def record(self, traceparent: str, span: Span) -> None:
        """Records a span under that one."""
        parent = Context.parse(traceparent)
        links = []
        if parent and span.linked_id:
            links = [trace.Link(_remote(parent._replace(span_id=span.linked_id)))]
        token = _wanted_id.set(span.id)
        recorded = self._tracer.start_span(
            span.name,
            context=_carrier(parent),
            kind=trace.SpanKind.CLIENT if span.is_call else trace.SpanKind.INTERNAL,
            attributes=span.attributes,
            links=links,
            start_time=span.begun_ns,
        )
        _wanted_id.reset(token)
        Open(recorded).end({}, span.error, span.ended_ns)

    def _flush(self) -> None:
        flushing = threading.Thread(target=self._processor.force_flush, daemon=True)
        flushing.start()
        flushing.join(LAST_S)


class Open:
    """A span that has begun."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def context(self) -> Context:
        """For what is recorded under it."""
        own = self._span.get_span_context()
        return Context(own.trace_id, own.span_id, int(own.trace_flags))

    def end(self, attributes: Attributes, error: str, ended_ns: int | None = None) -> None:
        """Ends it now, or at that time; it has failed unless `error` is empty."""
        self._span.set_attributes(attributes)
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end(ended_ns)


def _carrier(parent: Context | None) -> Carrier:
    """As the SDK wants to be told of a parent."""
    if parent is None:
        return Carrier()
    return trace.set_span_in_context(trace.NonRecordingSpan(_remote(parent)), Carrier())


def _remote(parent: Context) -> trace.SpanContext:
    return trace.SpanContext(parent.trace_id, parent.span_id, True, trace.TraceFlags(parent.flags))
