"""From a job's log to its clients: any state of a log, and no effect of one job on others.

There is no worker: the tests write what one would.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import orjson
import pytest

from bench.stack import Stack, await_that, running, send
from tasks.contract import keys
from tasks.contract.events import End, Entry, Kind, Position, Start
from tasks.contract.job import State
from tasks.contract.settings import Settings
from tasks.queue.token_log import Addressed, TokenLog, append_arguments
from tests.conftest import SIM
from tests.test_jobs import STREAM, call, submit
from tests.test_metrics import open_streams

HEAD = Start(200, [("content-type", "text/event-stream; charset=utf-8")], 0, 1).encode()
END = End(State.COMPLETED).encode()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(Stack(tmp_path_factory.mktemp("relay"), [SIM], keep_alive_s=10), 0) as stack:
        yield stack


class Worker:
    """Writes a job's log, and publishes it as asked."""

    def __init__(self, stack: Stack, job_id: str) -> None:
        self._redis = stack.redis
        self._log = TokenLog(stack.redis, Settings())
        self.job_id = job_id
        listener: Any = stack.redis.hget(keys.job(job_id), "listener")
        self._listener = listener.decode()

    def write(self, position: str, kind: Kind, data: bytes, is_published: bool = True) -> None:
        entry = Entry(self.job_id, Position.parse(position.encode()), kind, data)
        addressed = Addressed(entry, self._listener if is_published else "")
        assert not self._log._append(**append_arguments([addressed], Settings()))

    def begin(self) -> None:
        """Two pieces: `1` and `2`."""
        self.write("1-0", Kind.START, HEAD)
        self.write("1-1", Kind.BODY, b"data: 1\n\n")
        self.write("1-2", Kind.BODY, b"data: 2\n\n")

    def go_on(self) -> None:
        """A third one, by a second attempt, and the end."""
        self.write("2-1", Kind.BODY, b"data: 3\n\n")
        self.write("2-2", Kind.BODY, b"data: [DONE]\n\n")
        self.write("2-3", Kind.END, END)

    def lose(self, *positions: str) -> None:
        self._redis.xdel(keys.log(self.job_id), *positions)


class Client:
    """Reads a stream, event by event."""

    def __init__(self, lines: BinaryIO) -> None:
        self._lines = lines

    def next(self) -> str:
        """The data of the next event, of those that the engine sends."""
        return self._next(lambda data: "position" not in data)

    def next_place(self) -> str:
        """The data of the next event that has a place in the queue."""
        return self._next(lambda data: "position" in data)

    def _next(self, is_wanted: Callable[[str], bool]) -> str:
        for line in self._lines:
            data = line.removeprefix(b"data: ").decode().strip()
            if line.startswith(b"data: ") and is_wanted(data):
                return data
        raise AssertionError("the stream is over")


@contextmanager
def listening(connection: socket.socket) -> Iterator[Client]:
    connection.settimeout(60)
    with connection, connection.makefile("rb") as lines:
        yield Client(lines)


@contextmanager
def follow(stack: Stack, job_id: str, after: str = "") -> Iterator[Client]:
    """A client of the job's events."""
    connection = socket.create_connection(("127.0.0.1", stack.api_ports[0]), timeout=10)
    path = f"/v1/jobs/{job_id}/events" + (after and f"?starting_after={after}")
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    with listening(connection) as client:
        yield client


@contextmanager
def asking(stack: Stack) -> Iterator[tuple[Client, Worker]]:
    """A client that asks for a stream, and the worker that has its job."""
    before = set(stack.redis.keys(keys.job("*")))
    connection = send(stack, STREAM)
    await_that(lambda: set(stack.redis.keys(keys.job("*"))) - before)
    (key,) = set(stack.redis.keys(keys.job("*"))) - before
    with listening(connection) as client:
        yield client, Worker(stack, key.decode().removeprefix(keys.JOB_PREFIX))


@contextmanager
def following(stack: Stack) -> Iterator[tuple[Client, Worker]]:
    """A client of a job's events, and the worker that has the job."""
    job_id = submit(stack, STREAM)["id"]
    with follow(stack, job_id) as client:
        yield client, Worker(stack, job_id)


@pytest.fixture(params=["its own stream", "the job's events"])
def begun(request: pytest.FixtureRequest, stack: Stack) -> Iterator[tuple[Client, Worker]]:
    """A client that has got `1` and `2`, and the worker that has sent them."""
    with asking(stack) if request.param == "its own stream" else following(stack) as both:
        client, worker = both
        worker.begin()
        assert [client.next(), client.next()] == ["1", "2"]
        yield client, worker


def is_broken(event: str) -> bool:
    return bool(orjson.loads(event)["error"]["code"] == "stream_broken")


def test_a_client_that_leaves_with_the_whole_answer_cancels_nothing(stack: Stack) -> None:
    """OpenAI's SDK closes the connection when it has read `[DONE]`, which may be before the end."""
    with asking(stack) as (client, worker):
        worker.begin()
        worker.write("1-3", Kind.BODY, b"data: [DONE]\n\n")
        assert [client.next() for _ in range(3)] == ["1", "2", "[DONE]"]
    await_that(lambda: open_streams(stack) == 0)
    assert stack.redis.hget(keys.job(worker.job_id), "state") == b"queued"
    # One that has not got all of it wants no more.
    with asking(stack) as (client, worker):
        worker.begin()
        assert [client.next() for _ in range(2)] == ["1", "2"]
    await_that(lambda: stack.redis.hget(keys.job(worker.job_id), "state") == b"cancelled")


def test_an_attempt_that_goes_on_from_what_the_client_has_is_not_noticed(
    begun: tuple[Client, Worker],
) -> None:
    client, worker = begun
    worker.write("2-0", Kind.TAKEOVER, b"1-2")
    worker.go_on()
    assert [client.next(), client.next()] == ["3", "[DONE]"]


@pytest.mark.parametrize("left", [b"1-1", b"1-0", b""])
def test_a_client_that_has_what_redis_lost_gets_an_error_instead_of_repeats(
    begun: tuple[Client, Worker], left: bytes
) -> None:
    client, worker = begun
    worker.lose(*(p for p in ("1-0", "1-1", "1-2") if p.encode() > left))
    worker.write("2-0", Kind.TAKEOVER, left)
    worker.go_on()
    assert is_broken(client.next())
    assert client.next() == "[DONE]"


def test_what_was_not_received_before_a_takeover_is_read_from_the_log(
    begun: tuple[Client, Worker],
) -> None:
    client, worker = begun
    worker.write("1-3", Kind.BODY, b"data: 2.5\n\n", is_published=False)
    worker.write("2-0", Kind.TAKEOVER, b"1-3")
    worker.go_on()
    assert [client.next() for _ in range(3)] == ["2.5", "3", "[DONE]"]


def test_a_client_that_comes_back_with_what_redis_lost_gets_an_error(stack: Stack) -> None:
    job_id = submit(stack, STREAM)["id"]
    worker = Worker(stack, job_id)
    worker.begin()
    worker.lose("1-2")
    worker.write("2-0", Kind.TAKEOVER, b"1-1")
    worker.go_on()
    with follow(stack, job_id, "1-2") as client:
        assert is_broken(client.next())
    with follow(stack, job_id, "1-1") as client:
        assert client.next() == "3"


def test_a_log_that_cannot_be_read_ends_the_streams_of_its_job_alone(stack: Stack) -> None:
    broken_id, whole_id = submit(stack, STREAM)["id"], submit(stack, STREAM)["id"]
    with follow(stack, broken_id) as broken, follow(stack, whole_id) as whole:
        for job_id, client in ((broken_id, broken), (whole_id, whole)):
            Worker(stack, job_id).begin()
            assert [client.next(), client.next()] == ["1", "2"]
        stack.redis.xadd(keys.log(broken_id), {"no": "entry"}, "1-3")
        assert is_broken(broken.next())
        # Sooner than by the check that a stream makes of its log every ten seconds.
        for number in range(3, 8):
            begun_s = time.monotonic()
            data = f"data: {number}\n\n".encode()
            Worker(stack, whole_id).write(f"1-{number}", Kind.BODY, data)
            assert whole.next() == str(number)
            assert time.monotonic() - begun_s < 8


def test_places_are_sent_although_one_job_cannot_be_read(stack: Stack) -> None:
    first, second = submit(stack, STREAM)["id"], submit(stack, STREAM)["id"]
    with follow(stack, first), follow(stack, second) as client:
        client.next_place()
        state: Any = stack.redis.hget(keys.job(first), "state")
        stack.redis.hset(keys.job(first), "state", "no state")
        log = stack.api_processes[0].log
        await_that(lambda: "places in the queue were not read" in log.read_text())
        stack.redis.hset(keys.job(first), "state", state)
        call(stack, "POST", f"/v1/jobs/{first}/cancel").raise_for_status()
        client.next_place()
