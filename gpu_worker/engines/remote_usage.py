"""Usage of a remote server's answers: requested in every stream, removed where not asked for.

A whole answer is not changed by it; a stream is framed as all others here.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from gpu_worker.engines.event_stream import frame, read_events
from gpu_worker.replay_log import get_replay_log

PATHS = {"/v1/chat/completions", "/v1/completions"}


def read_object(text: bytes) -> dict[str, Any] | None:
    """The object that the text is; None: it is none. Not by orjson, for which 2**64 is a float."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def usage_option(path: str, document: dict[str, Any]) -> dict[str, Any]:
    """The field that asks for the usage of a stream; {} where it is asked for, or is no stream."""
    options = document.get("stream_options") or {}
    if path not in PATHS or document.get("stream") is not True or not isinstance(options, dict):
        return {}
    if options.get("include_usage"):
        return {}
    # Without it this option means nothing; with it each event would have a usage.
    others = {name: value for name, value in options.items() if name != "continuous_usage_stats"}
    return {"stream_options": others | {"include_usage": True}}


async def watched(
    response: httpx.Response, path: str, wants_no_usage: bool
) -> AsyncIterator[bytes]:
    """The pieces of the answer, each one event if it is a stream; its usage goes to the replay log.

    With `wants_no_usage` the event that has only the usage is left out. An encoded answer stays as
    it is.

    Raises:
        StreamBrokenError: an event is too long, or the stream ends in the midst of one.
    """
    pieces = response.aiter_raw()
    tells_usage = path in PATHS
    is_encoded = response.headers.get("content-encoding", "identity") != "identity"
    is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    if is_encoded or not (is_stream or tells_usage):
        async for piece in pieces:
            yield piece
    elif is_stream:
        async for data in read_events(pieces):
            if not (tells_usage and _has_only_usage(data) and wants_no_usage):
                yield frame(data)
    else:
        body = []
        async for piece in pieces:
            body.append(piece)
            yield piece  # at once: an answer that is too large is stopped there
        _note_usage(b"".join(body))


def _has_only_usage(data: bytes) -> bool:
    if b'"usage"' not in data:
        return False
    return _note_usage(data).get("choices") == []


def _note_usage(text: bytes) -> dict[str, Any]:
    """Notes the usage of a JSON object; returns the object, {} if it has none."""
    document = read_object(text)
    if document is None or not isinstance(document.get("usage"), dict):
        return {}
    get_replay_log().usage = document["usage"]
    return document
