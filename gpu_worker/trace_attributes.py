"""What OpenTelemetry's conventions for generative AI name of an attempt, and our own.

None of it is what was asked or answered.
"""

import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from gpu_worker.running import Running
from tasks.contract.response import read_object
from tasks.contract.tracing import Attribute

# What is longer is not read: that would hold up the streams of all others.
MOST_READ_BYTES = 2**20
LONGEST_TEXT = 255
# What a span can hold.
_MOST = 2**63
_HAS_FINISHED = re.compile(rb'"finish_reason": ?"')
# Fields of a request, with their types in the conventions.
_REQUESTED: dict[str, type[int] | type[float]] = {
    "seed": int,
    "top_k": int,
    "top_p": float,
    "temperature": float,
    "frequency_penalty": float,
    "presence_penalty": float,
}
# Which part of which total they are.
_USED = {
    "cache_read.input_tokens": ("prompt_tokens", "cached_tokens"),
    "reasoning.output_tokens": ("completion_tokens", "reasoning_tokens"),
}


class Answer:
    """What is told of the engine's answer, read as it passes."""

    def __init__(self) -> None:
        self.attributes: dict[str, Attribute] = {}
        self._reasons: dict[int, str] = {}

    def note(self, piece: bytes) -> None:
        """An event of a stream, or a whole body.

        Of a stream the first event is read, and those that end a choice.
        """
        if self.attributes and not _HAS_FINISHED.search(piece):
            return
        document = _read(piece.removeprefix(b"data: "))
        for name in ("id", "model"):
            if isinstance(text := document.get(name), str):
                self.attributes[f"gen_ai.response.{name}"] = text[:LONGEST_TEXT]
        for choice in _objects(document.get("choices")):
            index, reason = choice.get("index"), choice.get("finish_reason")
            if isinstance(index, int) and isinstance(reason, str):
                self._reasons[index] = reason[:LONGEST_TEXT]
        if self._reasons:
            reasons = [self._reasons[index] for index in sorted(self._reasons)]
            self.attributes["gen_ai.response.finish_reasons"] = reasons


def attributes_of(running: Running, answer: Answer) -> dict[str, Attribute]:
    """Those of the attempt, which is over."""
    claim, meter = running.claim, running.meter
    attributes = _asked(claim.job.body) | answer.attributes | _used(running)
    attributes["sluice.job.lane"] = claim.job.lane
    attributes["sluice.worker.id"] = claim.worker
    if claim.job.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = claim.job.max_tokens
    if running.head and running.head.is_event_stream:
        attributes["gen_ai.request.stream"] = True
    if meter.first_s and claim.attempt == 1:
        attributes["gen_ai.response.time_to_first_chunk"] = meter.first_s - meter.accepted_s
    if running.engine.server:
        attributes["server.address"], attributes["server.port"] = running.engine.server
    return attributes


def _asked(body: bytes) -> dict[str, Attribute]:
    document = _read(body)
    asked: dict[str, Attribute] = {
        f"gen_ai.request.{name}": kind(document[name])
        for name, kind in _REQUESTED.items()
        if _is_number(document.get(name))
    }
    choices = document.get("n")
    if _is_number(choices) and choices != 1:
        asked["gen_ai.request.choice.count"] = int(choices)
    return asked


def _used(running: Running) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {}
    if usage := running.usage:
        attributes["gen_ai.usage.input_tokens"] = usage.input_tokens
        attributes["gen_ai.usage.output_tokens"] = usage.output_tokens
    for name, part in _USED.items():
        if (tokens := running.replay_log.part_of_usage(*part)) is not None:
            attributes[f"gen_ai.usage.{name}"] = tokens
    return attributes


def _read(document: bytes) -> dict[str, Any]:
    return read_object(document) if len(document) <= MOST_READ_BYTES else {}


def _objects(given: Any) -> Iterator[dict[str, Any]]:
    """A server's answer may be anything."""
    return (one for one in given if isinstance(one, dict)) if isinstance(given, list) else iter(())


def _is_number(given: Any) -> TypeGuard[float]:
    return type(given) in (int, float) and abs(given) < _MOST
