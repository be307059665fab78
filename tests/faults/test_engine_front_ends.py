"""Several front ends over one EngineCore: each of these processes is killed or stopped."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.stack import Process, Stack, await_that, running, slack
from tasks.contract import keys
from tasks.contract.models import Model
from tests.faults.clients import Client, await_gone, await_tokens, begin, chat, compare, paused
from tests.faults.conftest import LEASE_S, Fault
from tests.faults.test_engines import STALL_S
from tests.faults.test_front_ends import front_ends_of, start_worker
from tests.test_metrics import Metrics

# An engine's load takes half a minute, and minutes where processors are short.
pytestmark = pytest.mark.timeout(900)

FRONT_ENDS = 2
SLOTS = 16
MOST_TOKENS = 1500
LONG = {"stream": True, "max_tokens": MOST_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory, demo_model: Model) -> Iterator[Stack]:
    """A deployment whose worker is killed, again and again."""
    home: Path = tmp_path_factory.mktemp("front-ends")
    shared = {"frontends": FRONT_ENDS, "slots": SLOTS}
    models = [demo_model.model_dump(mode="json") | shared]
    stack = Stack(home, models, lease_s=LEASE_S, engine_stall_s=STALL_S)
    with running(stack, workers=0):
        yield stack


def _worker(stack: Stack) -> Process:
    return stack.workers[0] if stack.workers else start_worker(stack, FRONT_ENDS)


def _started(worker: Process) -> list[psutil.Process]:
    return psutil.Process(worker.pid).children(recursive=True)


def _core(worker: Process) -> psutil.Process:
    (core,) = [p for p in _started(worker) if "EngineCore" in p.cmdline()[0]]
    return core


def _heartbeats(stack: Stack, pid: int | str = "*") -> list[Any]:
    found: Any = stack.redis.keys(keys.worker(f"*-{pid}"))
    return list(found)


def _in_engine(stack: Stack, front_end: psutil.Process) -> float:
    """Requests in EngineCore, of whichever front end, as this one has last heard."""
    (key,) = _heartbeats(stack, front_end.pid)
    address: Any = stack.redis.hget(key, "metrics_address")
    seen = Metrics(f"http://{address.decode()}/metrics", "vllm:num_requests_running")
    return seen.total("vllm:num_requests_running")


def test_a_killed_front_end_leaves_nothing_in_the_engine_and_its_streams_move_on(
    own_stack: Stack, fault: Fault
) -> None:
    stack = own_stack
    worker = _worker(stack)
    bodies = [chat(n, **LONG) for n in range(SLOTS)]
    clients, expected = begin(stack, bodies, 20)
    core, (victim, survivor) = _core(worker), front_ends_of(stack, worker)
    kept = stack.jobs_of(survivor)
    assert len(kept) == SLOTS // FRONT_ENDS
    with paused(stack):  # nobody else begins the victim's jobs meanwhile
        fault.inflict("SIGKILL front end")
        killed_s = time.monotonic()
        victim.kill()
        await_that(lambda: _in_engine(stack, survivor) == len(kept), slack(20))
        # They have not simply come to their ends.
        at_work = [client for client in clients if client.headers["x-sluice-job"] in kept]
        assert all(client.tokens < MOST_TOKENS for client in at_work)
    compare(fault, clients, expected, killed_s)
    stack.await_workers(FRONT_ENDS)
    assert (_core(worker), worker.popen.poll()) == (core, None)


def test_what_each_front_end_reports_is_its_own(own_stack: Stack) -> None:
    stack = own_stack
    _worker(stack)
    clients = [Client(stack, chat(n, **LONG)) for n in range(SLOTS)]
    await_tokens(clients, 5)

    def reported() -> list[int]:
        fields: Any = [stack.redis.hmget(key, "running", "waiting") for key in _heartbeats(stack)]
        return [sum(int(number or 0) for number in numbers) for numbers in fields]

    await_that(lambda: reported() == [SLOTS // FRONT_ENDS] * FRONT_ENDS, 60, reported)
    for client in clients:
        client.answer()
    await_that(lambda: reported() == [0] * FRONT_ENDS, 60, reported)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_enginecore_ends_all_its_front_ends(
    own_stack: Stack, fault: Fault, how: signal.Signals
) -> None:
    stack = own_stack
    worker = _worker(stack)
    bodies = [chat(n, **LONG) for n in range(8)]
    started = _started(worker)
    clients, expected = begin(stack, bodies, 20)
    fault.inflict(f"{how.name} EngineCore")
    lost_s = time.monotonic()
    _core(worker).send_signal(how)
    assert worker.popen.wait(120) == 1
    await_gone(started)
    stack.processes.remove(worker)
    start_worker(stack, FRONT_ENDS)
    compare(fault, clients, expected, lost_s)


def test_all_end_with_the_process_that_has_the_engine(own_stack: Stack, fault: Fault) -> None:
    stack = own_stack
    worker = _worker(stack)
    bodies = [chat(n, **LONG) for n in range(8)]
    started = _started(worker)
    clients, expected = begin(stack, bodies, 20)
    fault.inflict("SIGKILL the front ends' parent")
    killed_s = time.monotonic()
    worker.kill()
    await_gone(started)
    start_worker(stack, FRONT_ENDS)
    compare(fault, clients, expected, killed_s)


def test_sigterm_ends_all_front_ends_and_the_engine(own_stack: Stack) -> None:
    worker = _worker(own_stack)
    started = _started(worker)
    worker.ask_to_stop()
    assert worker.popen.wait(120) == 0
    await_gone(started)
    await_that(lambda: not own_stack.redis.keys(keys.worker("*")))
