"""Sockets that end: by the client, while it is served or waits, and by the server, in frames."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from bench.stack import Stack, await_that, running
from tasks.contract import keys
from tasks.queue.backlog import Backlog
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, call, submit
from tests.test_metrics import open_streams

TRY_AGAIN_LATER = 1013
FRAME = orjson.dumps(CHAT).decode()


@pytest.fixture
def own_stack(home: Path) -> Iterator[Stack]:
    """Without a worker: all jobs wait; for a test that ends a part."""
    with running(Stack(home, [SIM], keep_alive_s=1), workers=0) as stack:
        yield stack


def open_socket(stack: Stack, path: str = ENDPOINT, **headers: str) -> ClientConnection:
    return connect(f"ws{stack.url[4:]}{path}", additional_headers=headers)


@contextmanager
def halted(stack: Stack) -> Iterator[None]:
    """Redis answers nobody; for less than a command may take."""
    server = stack.part("redis")
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


def states(stack: Stack) -> list[bytes | None]:
    """Of all jobs that were submitted."""
    found: Any = stack.redis.keys(keys.job("*"))
    return [stack.redis.hget(key, "state") for key in found]  # type: ignore[misc]


def check_end(socket: ClientConnection, code: str) -> None:
    """The error, and the end, as frames; then the server closes."""
    assert orjson.loads(socket.recv(timeout=20))["error"]["code"] == code
    assert socket.recv(timeout=10) == "[DONE]"
    with pytest.raises(ConnectionClosed):
        socket.recv(timeout=10)
    assert socket.close_code == TRY_AGAIN_LATER


def test_a_server_that_stops_reports_it_to_whoever_shares_a_job(own_stack: Stack) -> None:
    """It wrote an HTTP response into the socket."""
    headers = {"Idempotency-Key": "shared"}
    first = headers | {"Prefer": "respond-async", "Content-Type": "application/json"}
    assert call(own_stack, "POST", ENDPOINT, data=FRAME, headers=first).status_code == 202
    with open_socket(own_stack, **headers) as socket:
        socket.send(FRAME)
        await_that(lambda: open_streams(own_stack) == 1)
        own_stack.part("api").ask_to_stop()
        check_end(socket, "server_restarting")


def test_what_waits_on_a_socket_is_not_begun_when_its_client_has_left(idle_stack: Stack) -> None:
    with open_socket(idle_stack) as socket:
        for _ in range(3):
            socket.send(FRAME)
        await_that(lambda: states(idle_stack) == [b"queued"])
    await_that(lambda: states(idle_stack) == [b"cancelled"], 20)
    time.sleep(0.5)
    assert states(idle_stack) == [b"cancelled"]
    await_that(lambda: open_streams(idle_stack) == 0, 20)


def test_a_client_that_leaves_while_its_request_is_submitted(idle_stack: Stack) -> None:
    """It was not noticed, and the job ran for nobody."""
    with halted(idle_stack), open_socket(idle_stack) as socket:
        socket.send(FRAME)
        time.sleep(0.5)
    await_that(lambda: states(idle_stack) == [b"cancelled"], 20)
    await_that(lambda: open_streams(idle_stack) == 0, 20)


def test_a_client_that_leaves_while_the_job_is_looked_up_that_it_follows(idle_stack: Stack) -> None:
    job_id = submit(idle_stack)["id"]
    assert Backlog(idle_stack.redis).claim("sim", "w")
    with halted(idle_stack), open_socket(idle_stack, f"/v1/jobs/{job_id}/events"):
        time.sleep(0.5)
    time.sleep(2)
    await_that(lambda: open_streams(idle_stack) == 0, 20)
