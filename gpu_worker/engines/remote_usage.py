"""Usage of a remote server's answers: requested in every stream, removed where not asked for.

Only a stream whose client has not asked for its usage is changed by it.
"""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx

from gpu_worker.replay_log import get_replay_log

PATHS = {"/v1/chat/completions", "/v1/completions"}
_AFTER_EVENT = re.compile(rb"(?<=\n\n)|(?<=\n\r\n)")


def read_object(text: bytes) -> dict[str, Any]:
    """The object that the text is; {} for all else. Not by orjson, for which 2**64 is a float."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


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
    """The pieces of the answer; the usage in them goes into the replay log.

    With `wants_no_usage` the event that has only the usage is left out.
    """
    pieces = response.aiter_raw()
    if path not in PATHS or response.headers.get("content-encoding", "identity") != "identity":
        async for piece in pieces:
            yield piece
    elif response.headers.get("content-type", "").startswith("text/event-stream"):
        async for events in _whole_events(pieces):
            kept = [event for event in events if not (_has_only_usage(event) and wants_no_usage)]
            if kept:
                yield b"".join(kept)
    else:
        body = b"".join([piece async for piece in pieces])
        _note_usage(body)
        yield body


async def _whole_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    rest = b""
    async for piece in pieces:
        *events, rest = _AFTER_EVENT.split(rest + piece)
        yield events
    yield [rest] if rest else []


def _has_only_usage(event: bytes) -> bool:
    if b'"usage"' not in event:
        return False
    return _note_usage(event.strip().removeprefix(b"data:")).get("choices") == []


def _note_usage(text: bytes) -> dict[str, Any]:
    """Notes the usage of a JSON object; returns the object, {} if it has none."""
    document = read_object(text)
    if not isinstance(document.get("usage"), dict):
        return {}
    get_replay_log().usage = document["usage"]
    return document
