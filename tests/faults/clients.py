"""Clients that note when each token came, and compare what came with an undisturbed run."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
import psutil
import requests
from sqlalchemy import select

from bench.stack import Process, Stack, await_that, slack
from db import reading
from db.models import JobRecord, LedgerEntry
from tasks.contract import keys
from tasks.contract.response import fold
from tests.faults.conftest import Fault

ENDPOINT = "/v1/chat/completions"
LONGEST_S = 240.0


def chat(number: int = 0, **options: Any) -> dict[str, Any]:
    """A request whose answer depends on the number."""
    message = {"role": "user", "content": f"Question {number}"}
    usage = {"stream_options": {"include_usage": True}} if options.get("stream") else {}
    return {"messages": [message], "max_tokens": 100, "temperature": 0} | usage | options


@contextmanager
def paused(stack: Stack) -> Iterator[None]:
    """What is submitted in the block to the first model begins together, after it."""
    stack.redis.sadd(keys.PAUSED, stack.models[0])
    try:
        yield
    finally:
        stack.redis.srem(keys.PAUSED, stack.models[0])


class Client(threading.Thread):
    """A request on its way."""

    def __init__(self, stack: Stack, body: dict[str, Any], **headers: str) -> None:
        super().__init__(daemon=True)
        self.body = body
        self.chunks: list[tuple[float, bytes]] = []
        self.headers: Any = {}
        self.status = 0
        self.document: Any = None
        self._url, self._sent = stack.url + ENDPOINT, headers
        self.start()

    def run(self) -> None:
        with requests.post(
            self._url, json=self.body, headers=self._sent, stream=True, timeout=LONGEST_S
        ) as answer:
            self.status, self.headers = answer.status_code, answer.headers
            if "event-stream" not in answer.headers["content-type"]:
                self.document = answer.json()
                return
            for line in answer.iter_lines():
                if line.startswith(b"data: "):
                    self.chunks.append((time.monotonic(), line[6:]))

    @property
    def tokens(self) -> int:
        """Chunks so far."""
        return len(self.chunks)

    def answer(self) -> dict[str, Any]:
        """What came, as one document; without what differs from request to request.

        Raises:
            AssertionError: it did not end as it should, or changed its id on the way.
        """
        self.join(LONGEST_S)
        assert not self.is_alive(), "still waits for its answer"
        if self.document is not None:
            assert self.status == 200, self.document
            return {k: v for k, v in self.document.items() if k not in ("id", "created")}
        *chunks, done = [data for _, data in self.chunks]
        assert done == b"[DONE]"
        documents = [orjson.loads(data) for data in chunks]
        wrong = [document for document in documents if "error" in document]
        assert not wrong, wrong
        assert len({(document["id"], document["created"]) for document in documents}) == 1
        whole = fold(documents)
        return {k: v for k, v in whole.items() if k not in ("id", "created")}

    def gap_after(self, moment_s: float) -> float:
        """From that moment to the next token."""
        return min(at for at, _ in self.chunks if at > moment_s) - moment_s


def await_tokens(clients: Sequence[Client], number: int, timeout_s: float = 120) -> None:
    """Waits until every client has so many."""
    await_that(lambda: all(client.tokens >= number for client in clients), timeout_s)


def await_claims(worker: Process, number: int) -> None:
    """Waits until the worker knows of so many; in Redis a job is leased before."""
    await_that(lambda: worker.log.read_text().count("job claimed") == number)


def start_replacement(stack: Stack) -> float:
    """Starts a worker; from the moment that is returned it serves, however long it has loaded."""
    worker = stack.start_worker("sim")
    await_that(lambda: stack.redis.keys(keys.worker(f"*-{worker.pid}")))
    return time.monotonic()


def await_rows(stack: Stack, table: type[JobRecord | LedgerEntry], number: int) -> None:
    """Waits until SQL has so many."""

    def count() -> int:
        with reading(stack.database_url) as session:
            return len(list(session.scalars(select(table))))

    await_that(lambda: count() == number)


def ask(stack: Stack, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers, undisturbed."""
    clients = [Client(stack, body) for body in bodies]
    return [client.answer() for client in clients]


def begin(
    stack: Stack, bodies: Sequence[dict[str, Any]], tokens: int
) -> tuple[list[Client], list[dict[str, Any]]]:
    """Streams that have so many tokens, and the answers that they should come to."""
    expected = ask(stack, bodies)
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, tokens)
    return clients, expected


def await_gone(processes: list[psutil.Process]) -> None:
    left = lambda: psutil.wait_procs(processes, timeout=0)[1]
    await_that(lambda: not left(), slack(10), left)


def compare(
    fault: Fault, clients: Sequence[Client], expected: Sequence[dict[str, Any]], since_s: float
) -> None:
    """Every client has what an undisturbed one had; notes how long each had to wait."""
    for client, wanted in zip(clients, expected, strict=True):
        assert client.answer() == wanted
        fault.tokens += wanted["usage"]["completion_tokens"]
        if client.chunks and client.chunks[-1][0] > since_s:
            fault.recovery_s.append(client.gap_after(since_s))
