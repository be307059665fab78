"""Clients that go away, and those that wait."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import orjson
import psutil
import pytest
import redis
import requests

from bench.stack import Stack, await_that, running, send, slack
from tasks.contract import keys
from tasks.contract.job import Lane
from tests.conftest import SIM

CLIENTS = 50
SLOW = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2000}


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Slow tokens, leases and heartbeats at their shortest."""
    model = SIM | {"slots": 1, "args": {"tokens-per-s": 20, "first-token-s": 0.05}}
    home = tmp_path_factory.mktemp("small")
    with running(Stack(home, [model], lease_s=3, keep_alive_s=1)) as stack:
        yield stack


@pytest.fixture
def small_stack(one_slot: Stack) -> Stack:
    """The same without any job."""
    one_slot.clear()
    return one_slot


def _state(bus: redis.Redis, job_id: str) -> bytes | None:
    return bus.hget(keys.job(job_id), "state")  # type: ignore[return-value]


def _only_job(stack: Stack) -> str:
    (key,) = stack.redis.keys(keys.job("*"))
    return key.decode().removeprefix(keys.JOB_PREFIX)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_and_its_place(
    small_stack: Stack, stream: bool
) -> None:
    stack = small_stack
    running_client = send(stack, SLOW | {"stream": stream})
    await_that(lambda: stack.redis.zcard(keys.LEASES) == 1)
    first = _only_job(stack)
    queued_client = send(stack, SLOW | {"stream": stream})
    backlog = keys.backlog("sim", Lane.INTERACTIVE)
    await_that(lambda: stack.redis.zcard(backlog) == 1)
    queued_client.close()
    with soon():
        await_that(lambda: stack.redis.zcard(backlog) == 0)
    running_client.close()
    with soon():
        await_that(lambda: _state(stack.redis, first) == b"cancelled")
    with soon():
        answer = requests.post(f"{stack.url}/v1/chat/completions", json=SLOW | {"max_tokens": 1})
    assert answer.status_code == 200


@contextmanager
def soon() -> Iterator[None]:
    """What takes the block at most two seconds, by the load before or after it."""
    allowed_s, begun_s = slack(2), time.monotonic()
    yield
    took_s = time.monotonic() - begun_s
    assert took_s < max(allowed_s, slack(2)), "neither slot nor place was free soon"


def test_a_queued_stream_gets_keep_alives_and_then_its_answer(small_stack: Stack) -> None:
    stack = small_stack
    with send(stack, SLOW | {"stream": True}) as blocker:
        await_that(lambda: stack.redis.zcard(keys.LEASES) == 1)
        with requests.post(
            f"{stack.url}/v1/chat/completions",
            json=SLOW | {"stream": True, "max_tokens": 2},
            stream=True,
            timeout=60,
        ) as queued:
            lines = queued.iter_lines()
            assert next(lines) == b": keep-alive"
            assert queued.status_code == 200
            blocker.close()
            assert list(lines)[-2] == b"data: [DONE]"


def test_a_late_refusal_of_a_queued_stream_is_an_event(small_stack: Stack) -> None:
    stack = small_stack
    with send(stack, SLOW | {"stream": True}) as blocker:
        await_that(lambda: stack.redis.zcard(keys.LEASES) == 1)
        with requests.post(
            f"{stack.url}/v1/chat/completions",
            json=SLOW | {"stream": True, "max_tokens": -1},
            stream=True,
            timeout=60,
        ) as queued:
            lines = queued.iter_lines()
            assert next(lines) == b": keep-alive"
            blocker.close()
            events = [line for line in lines if line.startswith(b"data: ")]
    assert orjson.loads(events[0][6:])["error"]["param"] == "max_tokens"
    assert events[1] == b"data: [DONE]"


def _leave_at_random(stack: Stack, number: int) -> None:
    chance = random.Random(number)
    body = SLOW | {"stream": chance.random() < 0.5, "max_tokens": chance.randint(1, 40)}
    with send(stack, body) as client:
        patience_s = chance.choice([0.03, 0.1, 0.3, 1.0])
        # Two of three leave when they have read something: their requests have become jobs.
        client.settimeout(60 if number % 3 else patience_s)
        try:
            while client.recv(4096):
                client.settimeout(patience_s)
                if chance.random() < 0.2:
                    return
        except TimeoutError:
            return


@pytest.mark.timeout(600)
def test_a_thousand_requests_with_random_disconnects_leave_nothing_behind(home) -> None:  # type: ignore[no-untyped-def]
    with running(Stack(home, [SIM], lease_s=3, keep_alive_s=1)) as stack:
        requests.post(f"{stack.url}/v1/chat/completions", json=SLOW | {"max_tokens": 1}, timeout=60)
        with ThreadPoolExecutor(CLIENTS) as clients:
            leave = lambda number: _leave_at_random(stack, number)
            for done in clients.map(leave, range(1000)):
                assert done is None
        lane = keys.backlog("sim", Lane.INTERACTIVE)
        await_that(lambda: stack.redis.zcard(keys.LEASES) == 0)
        await_that(lambda: stack.redis.zcard(lane) == 0)
        jobs = stack.redis.keys(keys.job("*"))
        # A client that leaves at once may be gone before its request is read.
        assert len(jobs) > 500
        ended = {b"completed", b"cancelled"}
        await_that(lambda: {stack.redis.hget(job, "state") for job in jobs} <= ended)
        await_that(
            lambda: all(stack.redis.ttl(k) > 0 for k in [*jobs, *stack.redis.keys(keys.log("*"))])
        )
        (worker,) = stack.redis.keys(keys.worker("*"))
        await_that(lambda: stack.redis.hmget(worker, "running", "waiting") == [b"0", b"0"])
        await_that(lambda: _in_use(stack) == (0, 1))  # the one that asks
        stack.check_alive()


def _in_use(stack: Stack) -> tuple[int, int]:
    """Requests that the API waits for, and its clients' connections; each has a greenlet."""
    with requests.get(f"{stack.url}/health/live", timeout=30) as health:
        streams = health.json()["streams"]
    (worker,) = psutil.Process(stack.api_processes[0].pid).children()
    clients = [c for c in worker.net_connections("tcp") if c.laddr.port == stack.api_ports[0]]
    return streams, len([c for c in clients if c.status != "LISTEN"])
