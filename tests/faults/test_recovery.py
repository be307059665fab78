"""A killed worker is noticed long before its leases end, and no other one is taken for killed."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.relay import Relay
from bench.stack import Process, Stack, await_that, running, serving
from tasks.contract import keys
from tasks.maintenance.gone_workers import MISSED_BEATS
from tasks.queue.control import BEATS
from tests.faults.clients import Client, ask, await_tokens, chat, compare
from tests.faults.conftest import SLOW_SIM, Fault

pytestmark = pytest.mark.timeout(600)

# Longer than a client waits for its answer: what goes on before has not waited for its lease.
LEASE_S = 900
STREAMS = 8
# So many heartbeats of others long is what must not cost a worker its jobs.
BEATS_LONG = 3 * MISSED_BEATS


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    """API, maintenance and two slow workers."""
    with running(Stack(home, [SLOW_SIM], lease_s=LEASE_S, keep_alive_s=1), 2) as stack:
        yield stack


@pytest.fixture
def network(home: Path) -> Iterator[tuple[Stack, Relay, Process]]:
    """The same, but one of the workers, which is returned, reaches Redis through the relay."""
    stack = Stack(home, [SLOW_SIM], lease_s=LEASE_S, keep_alive_s=1)
    with serving(Relay(stack.redis_port)) as relay, running(stack):
        direct = stack.env
        stack.env = direct | {"SLUICE_REDIS_URL": f"redis://127.0.0.1:{relay.port}/0"}
        worker = stack.start_worker("sim")
        stack.env = direct
        stack.await_workers(2)
        yield stack, relay, worker
        relay.resume()


def _begin(
    stack: Stack, worker: Process, tokens: int = 200
) -> tuple[list[Client], list[dict[str, Any]]]:
    """Streams that have begun, all on that worker, and the answers that they should come to."""
    bodies = [chat(n, stream=True, max_tokens=tokens) for n in range(STREAMS)]
    expected = ask(stack, bodies)
    (other,) = [one for one in stack.workers if one is not worker]
    other.signal(signal.SIGSTOP)
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 10)
    other.signal(signal.SIGCONT)
    assert len(stack.jobs_of(worker)) == STREAMS
    return clients, expected


def _beats(stack: Stack, worker: Process) -> int:
    """The number of the worker's last heartbeat."""
    (key,) = stack.redis.keys(keys.worker(f"*-{worker.pid}"))
    return int(stack.redis.hget(key, BEATS) or 0)


def _await_beats(stack: Stack, worker: Process, number: int) -> None:
    """Waits for so many more heartbeats of the worker."""
    wanted = _beats(stack, worker) + number
    await_that(lambda: _beats(stack, worker) >= wanted)


def _attempts(stack: Stack, clients: list[Client]) -> set[Any]:
    jobs = [keys.job(client.headers["x-sluice-job"]) for client in clients]
    return {stack.redis.hget(job, "attempt") for job in jobs}


def test_the_streams_of_a_killed_worker_do_not_wait_for_its_leases(
    stack: Stack, fault: Fault
) -> None:
    victim, _ = stack.workers
    clients, expected = _begin(stack, victim)
    ends_us = min(stack.redis.zscore(keys.LEASES, job) or 0 for job in stack.jobs_of(victim))
    fault.inflict("SIGKILL worker")
    victim.kill()
    compare(fault, clients, expected, time.monotonic())
    seconds, _ = stack.redis.time()
    assert seconds < ends_us / 1e6
    assert _attempts(stack, clients) == {b"2"}
    stack.await_workers(1)


def test_a_stopped_worker_keeps_its_jobs(stack: Stack, fault: Fault) -> None:
    victim, other = stack.workers
    clients, expected = _begin(stack, victim)
    fault.inflict("SIGSTOP worker, shorter than its leases")
    victim.signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    _await_beats(stack, other, BEATS_LONG)
    victim.signal(signal.SIGCONT)
    compare(fault, clients, expected, stopped_s)
    assert _attempts(stack, clients) == {b"1"}


def test_workers_whose_connections_were_all_closed_keep_their_jobs(
    stack: Stack, fault: Fault
) -> None:
    clients, expected = _begin(stack, stack.workers[0], 500)
    cut_s = 0.0
    for _ in range(3):
        fault.inflict("CLIENT KILL of all connections")
        cut_s = time.monotonic()
        for kind in ("pubsub", "normal"):
            stack.redis.client_kill_filter(_type=kind, skipme=True)
        for worker in stack.workers:
            _await_beats(stack, worker, 2)
    compare(fault, clients, expected, cut_s)
    assert _attempts(stack, clients) == {b"1"}


def test_workers_keep_their_jobs_when_redis_is_restarted(stack: Stack, fault: Fault) -> None:
    clients, expected = _begin(stack, stack.workers[0])
    fault.inflict("SIGKILL Redis, with AOF")
    stack.part("redis").kill()
    stack.start_redis()
    back_s = time.monotonic()
    for worker in stack.workers:
        _await_beats(stack, worker, BEATS_LONG)
    compare(fault, clients, expected, back_s)
    assert _attempts(stack, clients) == {b"1"}


def test_a_worker_whose_network_stalls_keeps_its_jobs(
    network: tuple[Stack, Relay, Process], fault: Fault
) -> None:
    stack, relay, worker = network
    clients, expected = _begin(stack, worker)
    (other,) = [one for one in stack.workers if one is not worker]
    fault.inflict("network stalls, shorter than the leases")
    relay.stall()
    stalled_s = time.monotonic()
    _await_beats(stack, other, BEATS_LONG)
    relay.resume()
    compare(fault, clients, expected, stalled_s)
    assert _attempts(stack, clients) == {b"1"}


def test_a_worker_that_was_cut_off_adds_nothing_when_it_comes_back(
    network: tuple[Stack, Relay, Process], fault: Fault
) -> None:
    """It lives, but Redis sees all its connections closed, and no heartbeat."""
    stack, relay, worker = network
    clients, expected = _begin(stack, worker)
    fault.inflict("network cut")
    relay.cut()
    compare(fault, clients, expected, time.monotonic())
    assert _attempts(stack, clients) == {b"2"}
    logs = {key: stack.redis.xlen(key) for key in stack.redis.keys(keys.log("*"))}
    relay.resume()
    await_that(lambda: "stopped" in worker.log.read_text())
    stack.await_workers(2)
    assert {key: stack.redis.xlen(key) for key in stack.redis.keys(keys.log("*"))} == logs
