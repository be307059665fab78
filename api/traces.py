"""The span of a request that makes a job, under the one that its client names in `traceparent`.

What is refused makes no job, and is not traced.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flask import g, request

from tasks.contract import tracing
from tasks.contract.tracing import Attribute, Context, Span

if TYPE_CHECKING:
    from tasks.contract.tracer import Open

PART = "sluice-api"


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """A request until its answer has been given; with tracing off nothing."""

    traceparent: str = ""
    """What its job carries."""
    _span: "Open | None" = None

    def end(
        self, job_id: str, model: str, status: int, error: str = "", answered_ns: int = 0
    ) -> None:
        """Ends it now; `answered_ns`: since when the answer was relayed, 0: it was not."""
        if self._span is None:
            return
        if answered_ns:
            relay = Span(name="relay", begun_ns=answered_ns, ended_ns=time.time_ns())
            tracing.record(PART, self.traceparent, relay)
        attributes: dict[str, Attribute] = {
            "gen_ai.request.model": model,
            "http.response.status_code": status,
            "sluice.job.id": job_id,
        }
        self._span.end(attributes, error or (str(status) if status >= 500 else ""))


def begin() -> RequestTrace:
    """That of the current request: from its first byte; of one on a WebSocket, from now."""
    tracer = tracing.get_tracer(PART)
    rule = request.url_rule
    if tracer is None or rule is None:
        return RequestTrace()
    begun_ns = time.time_ns()
    if not rule.websocket:
        begun_ns -= round((time.perf_counter() - g.begun_s) * 1e9)
    client = request.headers.get("traceparent", "")
    attributes: dict[str, Attribute] = {
        "http.request.method": request.method,
        "http.route": rule.rule,
        "url.path": request.path,
        "url.scheme": request.scheme,
    }
    name = f"{request.method} {rule.rule}"
    span = tracer.begin(name, Context.parse(client), begun_ns, attributes)
    return RequestTrace(str(span.context), span)
