"""Attempts that stall, lose what they wrote, or are stopped; with the sim engine."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.stack import Stack, await_that, running
from tasks.contract import keys
from tests.faults.clients import Client, ask, await_claims, await_tokens, chat, compare
from tests.faults.conftest import LEASE_S, SLOW_SIM, Fault
from tests.test_jobs import get, submit, wait

pytestmark = pytest.mark.timeout(600)


def _stored(stack: Stack, job_id: str) -> dict[str, Any]:
    """The stored answer, without what differs from request to request."""
    body = get(stack, job_id)["response"]["body"]
    return {k: v for k, v in body.items() if k not in ("id", "created")}


class Disk:
    """Where Redis keeps its data, and how it was there a moment ago."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        (self._file,) = Path(stack.home).rglob("*.incr.aof")
        self._size = self._file.stat().st_size

    def lose_power(self) -> None:
        """Redis comes back as it was when this was made: nothing later had reached the disk."""
        self._stack.part("redis").kill()
        with self._file.open("r+b") as aof:
            aof.truncate(self._size)
        self._stack.start_redis()


def _stand_still(stack: Stack) -> None:
    (worker,) = stack.workers
    worker.signal(signal.SIGSTOP)
    await_that(lambda: stack.redis.zcard(keys.LEASES) == 0)
    worker.signal(signal.SIGCONT)


def _expire_leases(stack: Stack) -> None:
    """The clock of Redis steps forward: the worker claims again before it detects the loss."""
    leased: Any = stack.redis.zrange(keys.LEASES, 0, -1)

    def seen(job: bytes) -> Any:
        return stack.redis.hmget(keys.job(job.decode()), "attempt", "state")

    def is_to_be_claimed_again(job: bytes) -> bool:
        attempt, state = seen(job)
        return bool(attempt == b"1" and state != b"completed")

    def all_are_claimed_again() -> bool:
        # A renewal may come before the reaper.
        if first := [job for job in leased if is_to_be_claimed_again(job)]:
            stack.redis.zadd(keys.LEASES, dict.fromkeys(first, 1), xx=True)
        return not first

    await_that(all_are_claimed_again)
    assert any(seen(job)[0] != b"1" for job in leased)


@pytest.mark.parametrize("lose_leases", [_stand_still, _expire_leases])
def test_a_worker_that_claims_its_own_jobs_again_loses_nothing(
    stack: Stack, fault: Fault, lose_leases: Callable[[Stack], None]
) -> None:
    bodies = [chat(n, stream=True, max_tokens=200) for n in range(8)]
    expected = ask(stack, bodies)
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 10)
    fault.inflict(f"leases lost: {lose_leases.__name__.strip('_').replace('_', ' ')}")
    lost_s = time.monotonic()
    lose_leases(stack)
    compare(fault, clients, expected, lost_s)
    for client, wanted in zip(clients, expected, strict=True):
        job_id = client.headers["x-sluice-job"]
        await_that(lambda job_id=job_id: get(stack, job_id)["status"] == "completed")
        assert _stored(stack, job_id) == wanted
    assert len(stack.workers) == 1


def test_a_redis_without_its_last_second_has_it_written_again(stack: Stack, fault: Fault) -> None:
    bodies = [chat(n, stream=True, max_tokens=200) for n in range(8)]
    expected = ask(stack, bodies)
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 25)
    disk = Disk(stack)
    await_tokens(clients, 50)
    fault.inflict("Redis without its last second")
    lost_s = time.monotonic()
    disk.lose_power()
    compare(fault, clients, expected, lost_s)
    for client, wanted in zip(clients, expected, strict=True):
        job_id = client.headers["x-sluice-job"]
        await_that(lambda job_id=job_id: get(stack, job_id)["status"] == "completed")
        assert _stored(stack, job_id) == wanted


def test_what_cannot_be_written_again_the_next_attempt_makes_again(home: Any, fault: Fault) -> None:
    """More is lost than a worker keeps."""
    fast = SLOW_SIM | {"args": {"tokens-per-s": 400, "first-token-s": 0.05}}
    with running(Stack(home, [fast], lease_s=LEASE_S)) as stack:
        body = chat(1, stream=True, max_tokens=3000)
        job_id = submit(stack, body)["id"]
        log = keys.log(job_id)
        await_that(lambda: stack.redis.xlen(log) > 50)
        disk = Disk(stack)
        there: Any = stack.redis.xlen(log)
        await_that(lambda: stack.redis.xlen(log) > there + 700)
        fault.inflict("Redis without its last two seconds")
        disk.lose_power()
        ended = wait(stack, job_id).json()
        # Counted on from its age: Redis may have given out numbers that it does not know any more.
        assert ended["status"] == "completed"
        assert ended["attempts"] > 1
        (expected,) = ask(stack, [body])
        assert _stored(stack, job_id) == expected


@pytest.mark.parametrize("stack", [{"drain_s": 1, "lease_s": 10}], indirect=True)
def test_whole_answers_are_handed_on_when_a_worker_drains(stack: Stack, fault: Fault) -> None:
    clients = [Client(stack, chat(n, max_tokens=250)) for n in range(4)]
    (worker,) = stack.workers
    await_claims(worker, 4)
    fault.inflict("SIGTERM worker")
    worker.signal(signal.SIGTERM)
    stack.start_worker("sim")
    assert worker.popen.wait(120) == 0
    assert {client.answer()["usage"]["completion_tokens"] for client in clients} == {250}
    assert {client.headers["x-sluice-attempts"] for client in clients} == {"2"}
