"""What a job answered, read from its token log: part by part, or put together as a whole.

`read` is how a log is followed: the API's answers, the jobs' events and the replay of an earlier
attempt differ only in what they make of its parts. `assemble` looks at a whole one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from tasks.contract.events import End, Entry, Kind, Position, Start
from tasks.contract.job import State

DONE = b"[DONE]"
# Parts of a delta that name something; all other text is a piece of a longer one.
_NAMES = {"role", "type", "id", "index"}


class Head(NamedTuple):
    """An answer begins. A second head is that of a later attempt, which starts over."""

    position: Position
    start: Start


class Chunk(NamedTuple):
    """It goes on: an event of a stream, or a piece of a whole body."""

    position: Position
    data: bytes
    record: bytes
    """For the next attempt; b"" for none."""

    @property
    def event_data(self) -> bytes:
        """Of an event of a stream: its payload, without the frame of its protocol."""
        return self.data.removeprefix(b"data: ").removesuffix(b"\n\n")


class Finish(NamedTuple):
    """The job has ended."""

    position: Position
    end: End


Part = Head | Chunk | Finish


def read(entries: Iterable[Entry]) -> Iterator[Part]:
    """The parts of an answer, from the entries of its log in order; others are none of them.

    Raises:
        DecodeError: one of them cannot be read.
    """
    for _, position, kind, data, record in entries:
        if kind is Kind.BODY:
            yield Chunk(position, data, record)
        elif kind is Kind.START:
            yield Head(position, Start.decode(data))
        elif kind is Kind.END:
            yield Finish(position, End.decode(data))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended."""

    state: State
    status_code: int | None = None
    """None: it ended without an answer of the engine."""
    body: bytes | None = None
    """JSON; the chunks of a stream put together as if it had not been streamed."""
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


def assemble(entries: Sequence[Entry]) -> Outcome | None:
    """The outcome recorded in a whole log; None when it has no end yet.

    Reads no head but the first, and no end but the last.

    Raises:
        DecodeError: one of these cannot be read.
    """
    if not entries or entries[-1].kind is not Kind.END:
        return None
    end = End.decode(entries[-1].data)
    start = next((Start.decode(e.data) for e in entries if e.kind is Kind.START), None)
    if end.error or start is None:
        return Outcome(end.state, error=end.error.get("error"))
    body = b"".join(entry.data for entry in entries if entry.kind is Kind.BODY)
    if start.is_event_stream:
        document, body = _fold_or_keep(body, end)
    else:
        document = read_object(body)
        body = body if document else orjson.dumps(body.decode(errors="replace"))
    error, usage = document.get("error"), document.get("usage")
    return Outcome(end.state, start.status, body, error, usage)


def _fold_or_keep(events: bytes, end: End) -> tuple[dict[str, Any], bytes]:
    """The chunks put together; or, if they are not as OpenAI's, the text as it came."""
    try:
        document = fold(map(read_object, split_events(events)))
        if end.usage:
            document.setdefault("usage", end.usage)
        return document, orjson.dumps(document)
    except (AttributeError, RecursionError, TypeError):
        return {}, orjson.dumps(events.decode(errors="replace"))


def read_object(body: bytes) -> dict[str, Any]:
    """The object that the body is; {} for all else."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


def split_events(events: bytes) -> Iterator[bytes]:
    """The payloads of a stream's events, without the last one, `[DONE]`."""
    for event in events.split(b"\n\n"):
        data = event.removeprefix(b"data: ").strip()
        if data and data != DONE:
            yield data


def fold(chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The object that an unstreamed request would have got, from OpenAI's chunks."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.pop("choices", None) or ():
            if "delta" in choice:
                choice["message"] = choice.pop("delta")
            _merge(choices.setdefault(choice.get("index", 0), {}), choice)
        whole |= {name: value for name, value in chunk.items() if value is not None}
    if choices:
        whole["choices"] = [_joined(choices[index]) for index in sorted(choices)]
    if "object" in whole:
        whole["object"] = whole["object"].removesuffix(".chunk")
    return whole


class _Pieces(list[str]):
    """A text that grows; put together once, at the end."""


def _merge(known: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds a delta's pieces to what is known: texts grow, lists grow or merge by index."""
    for name, value in delta.items():
        old = known.get(name)
        if value is None:
            known.setdefault(name, None)
        elif isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value)
        elif isinstance(old, _Pieces) and isinstance(value, str):
            old.append(value)
        elif isinstance(old, list) and isinstance(value, list):
            _merge_list(old, value)
        elif isinstance(value, str) and name not in _NAMES:
            known[name] = _Pieces([value])
        else:
            known[name] = _fresh(value)


def _fresh(value: Any) -> Any:
    """A first value, ready to take what comes after it."""
    known: dict[str, Any] = {}
    if isinstance(value, dict):
        _merge(known, value)
        return known
    return [_fresh(piece) for piece in value] if isinstance(value, list) else value


def _merge_list(known: list[Any], pieces: list[Any]) -> None:
    for piece in pieces:
        index = piece.get("index") if isinstance(piece, dict) else None
        # The latest is the most likely one.
        same = (k for k in reversed(known) if isinstance(k, dict) and k.get("index") == index)
        if index is None or (old := next(same, None)) is None:
            known.append(_fresh(piece))
        else:
            _merge(old, piece)


def _joined(value: Any) -> Any:
    if isinstance(value, _Pieces):
        return "".join(value)
    if isinstance(value, dict):
        return {name: _joined(part) for name, part in value.items()}
    return [_joined(part) for part in value] if isinstance(value, list) else value
