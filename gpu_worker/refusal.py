"""An engine's refusal in the shape of OpenAI's errors, whatever shape the engine used.

vLLM answers in that shape where it has a handler. For an unknown path its framework
answers `{"detail": ...}`, and servers behind a remote engine have shapes of their own.
"""

from dataclasses import replace
from typing import Any

import orjson

from tasks.contract.errors import EndpointNotSupportedError, HttpError, SluiceError
from tasks.contract.events import Start
from tasks.contract.job import Job
from tasks.contract.response import read_object

_FIELDS = {"message", "type", "param", "code"}
_MOST_CHARS = 1000
# Starlette's message.
_UNKNOWN_PATH = "Not Found"
# Of the body that is replaced.
_HEADERS = {"content-type", "content-length", "content-encoding"}


def in_our_shape(head: Start, body: bytes, job: Job) -> tuple[Start, bytes]:
    """The refusal as it is, or, if clients could not read it, the same in that shape."""
    document = read_object(body)
    given = document.get("error")
    if isinstance(given, dict) and given.keys() >= _FIELDS:
        return head, body
    error = _error(head.status, document, job).body()["error"]
    if isinstance(given, dict):
        error |= given
    headers = [(name, value) for name, value in head.headers if name not in _HEADERS]
    headers.append(("content-type", "application/json"))
    return replace(head, headers=headers), orjson.dumps({"error": error})


def _error(status: int, document: dict[str, Any], job: Job) -> SluiceError:
    texts = (document.get(name) for name in ("error", "message", "detail"))
    reason = next((text for text in texts if text and isinstance(text, str)), "")
    if status == EndpointNotSupportedError.status and reason in ("", _UNKNOWN_PATH):
        return EndpointNotSupportedError(job.model, job.endpoint)
    return HttpError(status, reason[:_MOST_CHARS] or f"The engine of {job.model} answers {status}.")
