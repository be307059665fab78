"""A job on the engine, and the response that it sends: ASGI in, entries of the job's log out."""

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_worker.engines.engine import Engine, Message
from gpu_worker.metrics import Meter
from gpu_worker.publisher import Feed, Publisher
from gpu_worker.refusal import in_our_shape
from gpu_worker.replay_log import ReplayLog
from tasks.contract.errors import SluiceError
from tasks.contract.events import End, Entry, Kind, Start
from tasks.contract.job import Cause, Claim, State, Usage
from tasks.contract.job_errors import AnswerTooLargeError
from tasks.contract.response import Chunk, Finish, Head, read
from tasks.contract.settings import get_settings

log = logging.getLogger(__name__)

# Each chunk has the start time of the first attempt, before any text of the model.
_CREATED = re.compile(rb'"created": ?\d+')
NOT_IMPLEMENTED = 501
# An app that is notified of its client's disconnect ends within milliseconds.
MOST_LEAVING_S = 5.0


class EngineDiedError(Exception):
    """The engine is dead; its jobs must run elsewhere."""

    cause = Cause.ENGINE_DIED


class EngineFailedError(Exception):
    """The engine answered 5xx, and nothing of it was sent: the job is to be tried again."""

    cause = Cause.ENGINE_ERROR


class AnswerRefusedError(Exception):
    """Redis does not take the answer, or a piece of it: the job is to be tried again."""

    cause = Cause.LOG_REFUSED


class LogLostError(Exception):
    """The log has lost entries that only another attempt can restore."""

    cause = Cause.HANDED_BACK


class PausedError(Exception):
    """The job is to go on later, or elsewhere."""

    cause = Cause.PREEMPTED

    def __init__(self, usage: Usage | None) -> None:
        """`usage`: what it has cost so far."""
        super().__init__()
        self.usage = usage


class DivergedError(Exception):
    """The engine did not repeat what clients have already received."""


@dataclass(frozen=True)
class History:
    """What earlier attempts of a job have left in its log, up to the takeover."""

    head: Start | None = None
    events: Sequence[bytes] = ()
    records: Sequence[bytes] = ()
    end: End | None = None
    continued: bytes = b""
    """Position of the last entry, as the takeover records it."""

    @classmethod
    def read(cls, entries: Sequence[Entry]) -> "History":
        parts = list(read(entries))
        chunks = [part for part in parts if isinstance(part, Chunk)]
        return cls(
            next((part.start for part in parts if isinstance(part, Head)), None),
            [chunk.data for chunk in chunks],
            [entry.record for entry in entries if entry.record],
            next((part.end for part in parts if isinstance(part, Finish)), None),
            entries[-1].data if entries[-1].kind is Kind.TAKEOVER else b"",
        )

    @property
    def is_lost(self) -> bool:
        """Whether clients have something that cannot be continued."""
        return bool(self.events) and not self.records


@dataclass
class Running:
    """A job on the engine, and the response that it sends."""

    claim: Claim
    publisher: Publisher
    engine: Engine
    history: History
    replay_log: ReplayLog = field(init=False)
    meter: Meter = field(init=False)
    feed: Feed = field(init=False)
    task: "asyncio.Task[None] | None" = None
    head: Start | None = None
    stop_cause: Cause | State | None = None
    """Why the job is no longer this worker's; None: it is."""
    ended: End | None = None
    is_paused: bool = False
    early_end: SluiceError | None = None
    """Why the app is stopped, which is how the job ends."""
    body_given: bool = False
    _has_left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client needs nothing more: the answer is complete, or the job was stopped."""
    _whole: list[bytes] = field(default_factory=list)
    """The pieces of a body that is not streamed: clients get all of it or nothing."""
    on_answer: Callable[[bytes], None] = lambda _: None
    """Is given what the engine answers: each event of a stream, or a whole body."""
    has_diverged: bool = False
    has_progressed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by an event that no earlier attempt has sent."""
    _repeated: int = 0
    _sent_bytes: int = 0
    """Of all attempts: each one sends the answer from its beginning."""
    _most_bytes: int = field(default_factory=lambda: get_settings().max_answer_bytes)
    _created: tuple[bytes, bytes] = (b"", b"")

    def __post_init__(self) -> None:
        self.replay_log = ReplayLog(self.history.records)
        self.meter = Meter(self.claim)
        self.feed = Feed(self.publisher, self.claim, self.history.continued)

    @property
    def usage(self) -> Usage | None:
        """Tokens of prompt and answer, of all attempts; None: nobody has counted them."""
        usage = Usage(*self.replay_log.total())
        is_refused = self.head is not None and 400 <= self.head.status < 500
        return usage if any(usage) or is_refused else None

    async def receive(self) -> Message:
        """ASGI's receive: the request's body, then, when the client has left, the disconnect."""
        if self.body_given or self.has_left:
            await self._has_left.wait()
            return {"type": "http.disconnect"}
        self.body_given = True
        return {"type": "http.request", "body": self.claim.job.body, "more_body": False}

    @property
    def has_left(self) -> bool:
        """Whether nobody hears what the app still says."""
        return self.is_stopped or self.early_end is not None

    @property
    def is_stopped(self) -> bool:
        return self.stop_cause is not None

    def stop(self, cause: Cause | State) -> None:
        """Stops the job, which is no longer this worker's."""
        self.stop_cause = cause
        self._leave()

    @property
    def can_pause(self) -> bool:
        """Whether it has come further here, and another attempt can go on from where it is."""
        is_answering = self.task is not None and not self.task.done()
        is_answering &= not self._has_left.is_set()
        return is_answering and self.replay_log.can_continue and self.replay_log.made() > 0

    def pause(self) -> None:
        """Stops the job, with all that its next attempt needs to go on in its log."""
        if not self.replay_log.catch_up():
            return  # all of it is made
        if record := self.replay_log.take():
            self.feed.put((Kind.NOTE, b"", record))
        self.is_paused = True
        self.stop(Cause.PREEMPTED)

    def end_early(self, reason: SluiceError) -> None:
        """Stops the app, and has the job end with that error."""
        if self.has_left:
            return
        log.warning("job %s: %s", self.claim.job.id, reason)
        self.early_end = reason
        self._whole.clear()
        self._leave()

    def progress(self) -> object:
        """Changes with whatever the engine makes of the answer."""
        return self._sent_bytes, self.replay_log.made()

    def _leave(self) -> None:
        """Notifies the app of its client's disconnect; what it still sends is dropped.

        An app may run its handler in a task of its own, as vLLM's does for an answer that is not
        streamed: to cancel the app's task would leave that one running.
        """
        self._has_left.set()
        if self.task:
            asyncio.get_running_loop().call_later(MOST_LEAVING_S, self.task.cancel)

    async def send(self, message: Message) -> None:
        """ASGI's send: each message becomes an entry of the job's log.

        Raises:
            EngineDiedError: the app reports the engine's failure, not the job's answer.
            DivergedError: it differs from what clients have.
        """
        if self.has_left:
            return
        if self.engine.is_dead():
            raise EngineDiedError
        if self.has_diverged:
            raise DivergedError
        if message["type"] == "http.response.start":
            self._begin(message)
            return
        if body := bytes(message.get("body", b"")):
            self._send_body(body)
        if not message.get("more_body"):
            self._has_left.set()

    async def close(self) -> State | None:
        """Ends the job as the engine has answered it; None: it was stopped.

        Raises:
            EngineFailedError: the job is to be tried again.
            DivergedError: the engine sent less than clients have.
        """
        if self.has_left:
            return await self.close_early()
        if self.head is None:
            raise DivergedError
        status = self.head.status
        if status >= 500 and status != NOT_IMPLEMENTED and not self.claim.is_last:
            raise EngineFailedError(f"the engine answered {status}")
        if self.history.head and self.history.head.status != status:
            raise DivergedError
        if self._repeated < len(self.history.events):
            raise DivergedError
        whole: list[tuple[Kind, bytes]] = []
        if not self.head.is_event_stream:
            head, body = self.head, b"".join(self._whole)
            self.on_answer(body)
            if status >= 400:
                head, body = in_our_shape(head, body, self.claim.job)
            whole = [(Kind.START, head.encode()), *([(Kind.BODY, body)] if body else [])]
        state = State.COMPLETED if status < 400 else State.FAILED
        return await self.end(End(state, usage=self.replay_log.usage), *whole)

    async def close_early(self) -> State | None:
        """Ends the job whose app was stopped, if it still is this worker's."""
        if self.is_stopped or self.early_end is None:
            return None
        return await self.end(End.failed(self.early_end))

    async def end(self, end: End, *whole: tuple[Kind, bytes]) -> State:
        """Ends the log, before the job's final state can be seen.

        `whole`: the answer, if it is not streamed; it is written together with the end.
        """
        self.ended = end
        self.meter.end(*self.replay_log.total())
        self._put(*whole, (Kind.END, end.encode()))
        await self.feed.written()
        return end.state

    def _begin(self, message: Message) -> None:
        claim = self.claim
        headers = _text(message["headers"])
        self.head = Start(message["status"], headers, claim.queue_ms, claim.attempt)
        if self.head.is_event_stream and self.history.head is None:
            self._put((Kind.START, self.head.encode()))

    def _send_body(self, body: bytes) -> None:
        """Sends a piece, unless that makes more of the answer than may be kept of one."""
        self._sent_bytes += len(body)
        if self._sent_bytes > self._most_bytes:
            self.end_early(AnswerTooLargeError(self._most_bytes))
        elif self.head and self.head.is_event_stream:
            self._send_event(body)
        else:
            self._whole.append(body)

    def _send_event(self, event: bytes) -> None:
        """Sends the event, unless clients have it."""
        self.on_answer(event)
        known = self.history.events
        if not self._repeated and known:
            self._created = _found(_CREATED, event), _found(_CREATED, known[0])
        event = event.replace(*self._created, 1) if self._created[0] else event
        if self._repeated < len(known):
            if event != known[self._repeated]:
                self.has_diverged = True
                raise DivergedError
            self._repeated += 1
            return
        self.meter.output(self.replay_log.output_tokens)
        self.feed.put((Kind.BODY, event, self.replay_log.take()))
        self.has_progressed.set()

    def _put(self, *pieces: tuple[Kind, bytes]) -> None:
        """Puts entries that are written together or not at all."""
        take = self.replay_log.take
        self.feed.put(
            *((kind, data, take() if kind is Kind.BODY else b"") for kind, data in pieces)
        )


def _found(pattern: re.Pattern[bytes], text: bytes) -> bytes:
    match = pattern.search(text)
    return match.group() if match else b""


def _text(headers: Any) -> list[tuple[str, str]]:
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]
