"""One job on the engine: its request goes in as ASGI, the response's pieces become log entries."""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

from gpu_worker.engine import Engine, Message
from gpu_worker.publisher import Publisher
from tasks.errors import JobFailedError, StreamBrokenError
from tasks.events import End, Entry, Kind, Position, Start
from tasks.message import Claim, State
from tasks.token_log import Addressed, TokenLog

log = logging.getLogger(__name__)


class EngineDiedError(Exception):
    """The engine is dead; its jobs must run elsewhere."""


@dataclass
class Running:
    """A job on the engine, and the response that it sends."""

    claim: Claim
    publisher: Publisher
    engine: Engine
    task: "asyncio.Task[None] | None" = None
    status: int = 500
    next_seq: int = 0
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    body_given: bool = False

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
        """
        if self.engine.is_dead():
            raise EngineDiedError
        if message["type"] == "http.response.start":
            self.status = message["status"]
            head = Start(self.status, _text(message["headers"]), *self._history())
            self.put(Kind.START, head.encode())
            return
        if body := message.get("body"):
            self.put(Kind.BODY, bytes(body))
        if not message.get("more_body"):
            self.has_ended.set()

    def put(self, kind: Kind, data: bytes) -> None:
        claim = self.claim
        entry = Entry(claim.job.id, Position(claim.attempt, self.next_seq), kind, data)
        self.next_seq += 1
        self.publisher.put(Addressed(entry, claim.job.listener))

    async def end(self, end: End) -> State:
        """Ends the log. Whoever sees the job in its final state then finds the end there."""
        self.put(Kind.END, end.encode())
        await self.publisher.written()
        return end.state

    def _history(self) -> tuple[int, int]:
        return self.claim.queue_ms, self.claim.attempt


def _text(headers: Any) -> list[tuple[str, str]]:
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]


class Runner:
    """Runs claimed jobs on the engine, all at once, on its event loop."""

    def __init__(self, engine: Engine, publisher: Publisher, token_log: TokenLog) -> None:
        self._engine = engine
        self._publisher = publisher
        self._log = token_log
        self.running: dict[str, Running] = {}

    async def run(self, claim: Claim) -> State | None:
        """Runs the job to its end; None when it was stopped and is no longer this worker's.

        Raises:
            EngineDiedError: the engine died; nothing that it said of its death was sent.
        """
        running = Running(claim, self._publisher, self._engine)
        if claim.attempt > 1:
            settled = await self._settle_earlier_attempt(running)
            if settled:
                return settled
        self.running[claim.job.id] = running
        running.task = asyncio.ensure_future(
            self._engine.app(_scope(claim), running.receive, running.send)
        )
        try:
            await running.task
        except asyncio.CancelledError:
            return None
        except Exception as failure:  # the process boundary of foreign code: vLLM's app
            if self._engine.is_dead():
                raise EngineDiedError from failure
            log.exception("job %s: the engine's app failed", claim.job.id)
            failed = End.failed(JobFailedError("the engine failed on this request"))
            return await running.end(failed)
        finally:
            self.running.pop(claim.job.id, None)
        return await running.end(End(State.COMPLETED if running.status < 400 else State.FAILED))

    async def _settle_earlier_attempt(self, running: Running) -> State | None:
        """Ends a job whose earlier attempt got so far that it must not run again from the start."""
        claim = running.claim
        last = await asyncio.to_thread(self._log.last, claim.job.id)
        if last is None or last.kind is Kind.START:
            return None
        if last.kind is Kind.END:
            return End.decode(last.data).state
        return await running.end(End.failed(StreamBrokenError()))

    def stop(self, job_id: str) -> None:
        """Stops a job that is no longer this worker's: the engine frees its slot."""
        running = self.running.get(job_id)
        if running and running.task:
            log.info("job %s: stopped", job_id)
            running.task.cancel()


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
