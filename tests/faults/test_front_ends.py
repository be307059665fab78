"""A worker of several front ends, one of which is killed, or all, with the sim engine."""

import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.stack import Process, Stack, await_that, running
from tasks.contract import keys
from tests.faults.clients import LONGEST_S, Client, await_gone, await_tokens, begin, chat, compare
from tests.faults.conftest import LEASE_S, SLOW_SIM, Fault
from tests.test_client import sluice
from tests.test_jobs import get, submit

pytestmark = pytest.mark.timeout(600)

FRONT_ENDS = 3
# All of them are taken, by as many streams.
SLOTS = 12
SEVERAL = SLOW_SIM | {"frontends": FRONT_ENDS, "slots": SLOTS}


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    """API, maintenance and one worker of several front ends."""
    with running(Stack(home, [SEVERAL], lease_s=LEASE_S, keep_alive_s=1), workers=0) as stack:
        start_worker(stack, FRONT_ENDS)
        yield stack


def start_worker(stack: Stack, front_ends: int) -> Process:
    """A worker, all of whose front ends serve, and no other."""
    stack.await_workers(0)  # a killed one counts as alive for the length of a lease
    worker = stack.start_worker(stack.models[0])
    stack.await_workers(front_ends)
    return worker


def front_ends_of(stack: Stack, worker: Process) -> list[psutil.Process]:
    """The worker's processes that serve jobs."""
    listed: Any = stack.redis.keys(keys.worker("*"))
    serving = {int(name.decode().rpartition("-")[2]) for name in listed}
    started = psutil.Process(worker.pid).children()
    return [process for process in started if process.pid in serving]


def _job_id(client: Client) -> str:
    return str(client.headers["x-sluice-job"])


def test_only_the_streams_of_a_killed_front_end_move_on(stack: Stack, fault: Fault) -> None:
    (worker,) = stack.workers
    bodies = [chat(n, stream=True, max_tokens=200) for n in range(SLOTS)]
    clients, expected = begin(stack, bodies, 10)
    front_ends = front_ends_of(stack, worker)
    held = [stack.jobs_of(front_end) for front_end in front_ends]
    assert [len(jobs) for jobs in held] == [SLOTS // FRONT_ENDS] * FRONT_ENDS
    fault.inflict("SIGKILL front end")
    killed_s = time.monotonic()
    front_ends[0].kill()
    compare(fault, clients, expected, killed_s)
    attempts = {_job_id(client): get(stack, _job_id(client))["attempts"] for client in clients}
    assert attempts == {job: 2 if job in held[0] else 1 for job in attempts}
    # Another one has taken its place.
    stack.await_workers(FRONT_ENDS)
    await_that(lambda: len(front_ends_of(stack, worker)) == FRONT_ENDS)
    assert front_ends[0] not in front_ends_of(stack, worker)


def test_front_ends_end_with_the_process_that_started_them(stack: Stack, fault: Fault) -> None:
    (worker,) = stack.workers
    bodies = [chat(n, stream=True, max_tokens=200) for n in range(SLOTS)]
    clients, expected = begin(stack, bodies, 10)
    front_ends = front_ends_of(stack, worker)
    fault.inflict("SIGKILL the front ends' parent")
    killed_s = time.monotonic()
    worker.kill()
    await_gone(front_ends)
    stack.start_worker("sim")
    compare(fault, clients, expected, killed_s)


def test_a_stopped_worker_drains_all_its_front_ends(stack: Stack, fault: Fault) -> None:
    (worker,) = stack.workers
    bodies = [chat(n, stream=True, max_tokens=50) for n in range(SLOTS)]
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 5)
    front_ends = front_ends_of(stack, worker)
    fault.inflict("SIGTERM worker of several front ends")
    worker.ask_to_stop()
    for client in clients:
        client.answer()
        assert get(stack, _job_id(client))["attempts"] == 1
    assert worker.popen.wait(120) == 0
    await_gone(front_ends)
    await_that(lambda: not stack.redis.keys(keys.worker("*")))
    stack.processes.remove(worker)


def test_a_worker_is_drained_by_any_of_its_front_ends(stack: Stack, fault: Fault) -> None:
    """As it is without several: whoever started it starts it again, with the engine."""
    (worker,) = stack.workers
    listed: Any = stack.redis.smembers(keys.WORKERS)
    client = Client(stack, chat(stream=True, max_tokens=60))
    await_tokens([client], 2)
    fault.inflict("drain front end")
    assert sluice(stack, "drain", min(listed).decode()).returncode == 0
    client.answer()
    assert worker.popen.wait(120) == 0
    stack.processes.remove(worker)


def test_a_request_that_kills_front_ends_is_given_up_by_one_worker(
    stack: Stack, fault: Fault
) -> None:
    (worker,) = stack.workers
    bodies = [chat(n, stream=True, max_tokens=60) for n in range(4)]
    clients, expected = begin(stack, bodies, 5)
    poison = submit(stack, chat(9, stream=True, sim={"failure": "crash"}))["id"]
    fault.inflict("poisoned request")
    await_that(lambda: get(stack, poison)["status"] == "failed", LONGEST_S)
    assert get(stack, poison)["attempts"] == 3
    compare(fault, clients, expected, math.inf)
    stack.await_workers(FRONT_ENDS)
    assert worker.popen.poll() is None


def test_a_front_end_that_cannot_begin_ends_the_worker_and_says_why(
    home: Path, fault: Fault
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        bind = f"127.0.0.1:{taken - 1}"
        with running(Stack(home, [SEVERAL], metrics_bind=bind), workers=0) as stack:
            fault.inflict("a taken port")
            worker = stack.start_worker("sim")
            assert worker.popen.wait(120) == 1
            stack.processes.remove(worker)
            assert "sluice: the worker's metrics cannot be served on" in worker.log.read_text()


def test_a_hung_front_end_does_not_keep_a_stopped_worker(home: Path, fault: Fault) -> None:
    with running(Stack(home, [SEVERAL], lease_s=LEASE_S, drain_s=1), workers=0) as stack:
        worker = start_worker(stack, FRONT_ENDS)
        front_ends = front_ends_of(stack, worker)
        fault.inflict("SIGSTOP front end, SIGTERM worker")
        front_ends[0].suspend()
        worker.ask_to_stop()
        assert worker.popen.wait(120) == 0
        await_gone(front_ends)
        stack.processes.remove(worker)
