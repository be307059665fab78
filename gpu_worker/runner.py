"""One job on the engine: its request goes in as ASGI, the response's pieces become log entries."""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_worker.engine import Engine, Message
from gpu_worker.metrics import Meter
from gpu_worker.publisher import Publisher
from gpu_worker.tape import Tape, current_tape
from tasks.errors import JobFailedError, StreamBrokenError
from tasks.events import End, Entry, Kind, Position, Start
from tasks.message import Claim, State
from tasks.token_log import Addressed

log = logging.getLogger(__name__)

# The moment at which the first attempt began stands in each chunk, before anything of the model's.
_CREATED = re.compile(rb'"created": ?\d+')
NOT_IMPLEMENTED = 501


class EngineDiedError(Exception):
    """The engine is dead; its jobs must run elsewhere."""


class EngineFailedError(Exception):
    """The engine answered 5xx, and nothing of it was sent: the job is to be tried again."""


class DivergedError(Exception):
    """The engine did not say again what clients have already."""


@dataclass(frozen=True)
class History:
    """What earlier attempts of a job have left in its log."""

    head: Start | None = None
    events: Sequence[bytes] = ()
    records: Sequence[bytes] = ()
    end: End | None = None

    @classmethod
    def read(cls, entries: Sequence[Entry]) -> "History":
        by_kind: dict[Kind, list[Entry]] = {kind: [] for kind in Kind}
        for entry in entries:
            by_kind[entry.kind].append(entry)
        starts, ends = by_kind[Kind.START], by_kind[Kind.END]
        return cls(
            Start.decode(starts[0].data) if starts else None,
            [entry.data for entry in by_kind[Kind.BODY]],
            [entry.record for entry in entries if entry.record],
            End.decode(ends[0].data) if ends else None,
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
    tape: Tape = field(init=False)
    meter: Meter = field(init=False)
    task: "asyncio.Task[None] | None" = None
    head: Start | None = None
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    body_given: bool = False
    _whole: list[bytes] = field(default_factory=list)
    """The pieces of a body that is not streamed: clients get all of it or nothing."""
    has_diverged: bool = False
    _repeated: int = 0
    _created: tuple[bytes, bytes] = (b"", b"")

    def __post_init__(self) -> None:
        self.tape = Tape(self.history.records)
        self.meter = Meter(self.claim)
        # The first entry of a later attempt is its takeover.
        self._next_seq = 0 if self.claim.attempt == 1 else 1

    async def receive(self) -> Message:
        """ASGI's receive: the request's body, then nothing until the task is cancelled."""
        if self.body_given:
            await self.has_ended.wait()
            return {"type": "http.disconnect"}
        self.body_given = True
        return {"type": "http.request", "body": self.claim.job.body, "more_body": False}

    async def send(self, message: Message) -> None:
        """ASGI's send: each message becomes an entry of the job's log.

        Raises:
            EngineDiedError: what the app says is the engine's death, not the job's answer.
            DivergedError: it is not what clients have.
        """
        if self.engine.is_dead():
            raise EngineDiedError
        if self.has_diverged:
            raise DivergedError
        if message["type"] == "http.response.start":
            self._begin(message)
            return
        if body := bytes(message.get("body", b"")):
            if self.head and self.head.is_event_stream:
                self._send_event(body)
            else:
                self._whole.append(body)
        if not message.get("more_body"):
            self.has_ended.set()

    async def close(self) -> State:
        """Ends the job as the engine has answered it.

        Raises:
            EngineFailedError: that is to be tried again.
            DivergedError: the engine has said less than clients have.
        """
        if self.head is None:
            raise DivergedError
        status = self.head.status
        if status >= 500 and status != NOT_IMPLEMENTED and not self.claim.is_last:
            raise EngineFailedError(f"the engine answered {status}")
        if self.history.head and self.history.head.status != status:
            raise DivergedError
        if self._repeated < len(self.history.events):
            raise DivergedError
        if not self.head.is_event_stream:
            body = b"".join(self._whole)
            self._put((Kind.START, self.head.encode()), *([(Kind.BODY, body)] if body else []))
        return await self.end(End(State.COMPLETED if status < 400 else State.FAILED))

    async def end(self, end: End) -> State:
        """Ends the log. Whoever sees the job in its final state then finds the end there."""
        self.meter.end(self.tape.input_tokens, self.tape.output_tokens)
        self._put((Kind.END, end.encode()))
        await self.publisher.written()
        return end.state

    def _begin(self, message: Message) -> None:
        claim = self.claim
        headers = _text(message["headers"])
        self.head = Start(message["status"], headers, claim.queue_ms, claim.attempt)
        if self.head.is_event_stream and self.history.head is None:
            self._put((Kind.START, self.head.encode()))

    def _send_event(self, event: bytes) -> None:
        """Sends the event, unless clients have it."""
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
        self.meter.output(self.tape.output_tokens)
        self._put((Kind.BODY, event))

    def _put(self, *pieces: tuple[Kind, bytes]) -> None:
        """Puts entries that stand in the log together or not at all."""
        claim, entries = self.claim, []
        for kind, data in pieces:
            position = Position(claim.attempt, self._next_seq)
            record = self.tape.take() if kind is Kind.BODY else b""
            entry = Entry(claim.job.id, position, kind, data, record)
            entries.append(Addressed(entry, claim.job.listener))
            self._next_seq += 1
        self.publisher.put(entries)


def _found(pattern: re.Pattern[bytes], text: bytes) -> bytes:
    match = pattern.search(text)
    return match.group() if match else b""


def _text(headers: Any) -> list[tuple[str, str]]:
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]


class Runner:
    """Runs claimed jobs on the engine, all at once, on its event loop."""

    def __init__(self, engine: Engine, publisher: Publisher) -> None:
        self._engine = engine
        self._publisher = publisher
        self._running: dict[str, Running] = {}

    async def run(self, claim: Claim, history: History) -> State | None:
        """Runs the job to its end, from where earlier attempts have brought it.

        Returns:
            Its final state; None when it was stopped and is no longer this worker's.

        Raises:
            EngineDiedError: the engine died; nothing that it said of its death was sent.
            EngineFailedError: the job is to be tried again.
        """
        running = Running(claim, self._publisher, self._engine, history)
        if history.end:
            return await running.end(history.end)
        if history.is_lost:
            return await running.end(End.failed(StreamBrokenError()))
        self._running[claim.job.id] = running
        try:
            return await self._answer(running)
        finally:
            self._running.pop(claim.job.id, None)

    async def _answer(self, running: Running) -> State | None:
        claim = running.claim
        current_tape.set(running.tape)
        running.task = asyncio.ensure_future(
            self._engine.app(_scope(claim), running.receive, running.send)
        )
        try:
            await running.task
            return await running.close()
        except asyncio.CancelledError:
            return None
        except EngineFailedError:
            raise
        except Exception as failure:  # the process boundary of foreign code: vLLM's app
            if self._engine.is_dead():
                raise EngineDiedError from failure
            if running.has_diverged or isinstance(failure, DivergedError):
                log.warning("job %s: cannot be continued as it began", claim.job.id)
                return await running.end(End.failed(StreamBrokenError()))
            log.exception("job %s: the engine's app failed", claim.job.id)
            failed = End.failed(JobFailedError("the engine failed on this request"))
            return await running.end(failed)

    def stop(self, job_id: str) -> None:
        """Stops a job that is no longer this worker's: the engine frees its slot."""
        running = self._running.get(job_id)
        if running and running.task:
            log.info("job %s: stopped", job_id)
            running.task.cancel()

    def stop_all(self) -> None:
        """Stops whatever runs."""
        for job_id in list(self._running):
            self.stop(job_id)


def _scope(claim: Claim) -> Message:
    """The ASGI scope of the job's request; its id becomes the id that vLLM gives the answer."""
    job = claim.job
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": job.endpoint,
        "raw_path": job.endpoint.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"sluice"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(job.body)).encode()),
            (b"x-request-id", job.id.encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
