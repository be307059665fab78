"""The spans of webhooks, recorded when their calls are noted in SQL."""

from collections.abc import Sequence

from db.models import WebhookAttempt
from db.webhooks import Noted
from tasks.contract import tracing
from tasks.contract.tracing import Attribute, Span
from tasks.queue.jobs import TRACED_AS


def record_calls(notes: Sequence[Noted]) -> None:
    """Records these calls in the traces of their jobs, if tracing is on."""
    for note in notes:
        tracing.record(TRACED_AS, note.traceparent, _span(note.attempt, note.state))


def _span(call: WebhookAttempt, state: str) -> Span:
    begun_ns = round(call.at.timestamp() * 1e9)
    attributes: dict[str, Attribute] = {
        "http.request.method": "POST",
        "sluice.job.id": call.job_id,
        "sluice.webhook.state": state,
    }
    if call.attempt > 1:
        attributes["http.request.resend_count"] = call.attempt - 1
    if call.status_code is not None:
        attributes["http.response.status_code"] = call.status_code
    kind = str(call.status_code or (call.error or "").partition(":")[0])
    return Span(
        name="webhook",
        begun_ns=begun_ns,
        ended_ns=begun_ns + call.duration_ms * 1_000_000,
        attributes=attributes,
        error="" if state == "delivered" else kind,
        is_call=True,
    )
