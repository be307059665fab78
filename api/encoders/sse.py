"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from collections.abc import Iterator

from flask import Response

EVENT_STREAM = "text/event-stream; charset=utf-8"
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event_stream(events: Iterator[bytes]) -> Response:
    """A response of server-sent events that no proxy holds back."""
    response = Response(events, content_type=EVENT_STREAM)
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def error_event(error: bytes) -> bytes:
    return b"data: " + error + b"\n\n" + DONE
