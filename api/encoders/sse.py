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
    """The event that an error is, in one line: some servers write theirs in many."""
    # In JSON a line's end is white space. Read and written anew, numbers could change.
    return b"data: " + b" ".join(error.splitlines()) + b"\n\n" + DONE
