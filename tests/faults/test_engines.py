"""Real vLLM that is killed, stopped or hung in the middle of answers."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.stack import Process, Stack, await_that, running, slack
from tasks.contract import keys
from tasks.contract.models import Model
from tests.faults.clients import Client, ask, await_gone, await_tokens, begin, chat, compare
from tests.faults.conftest import LEASE_S, Fault

# An engine's load takes half a minute, and minutes where processors are short.
pytestmark = pytest.mark.timeout(900)

MODEL = "sluice-demo"
LONG = {"stream": True, "max_tokens": 400, "ignore_eos": True}
# Longer than a step takes where processors are short.
STALL_S = 20.0


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory, demo_model: Model) -> Iterator[Stack]:
    """A deployment whose workers are killed, again and again."""
    home: Path = tmp_path_factory.mktemp("killed")
    models = [demo_model.model_dump(mode="json")]
    with running(Stack(home, models, lease_s=LEASE_S, engine_stall_s=STALL_S)) as stack:
        yield stack


def _engine(worker: Process) -> tuple[psutil.Process, list[psutil.Process]]:
    """EngineCore of a worker, and all processes that the worker started."""
    started = psutil.Process(worker.pid).children(recursive=True)
    (core,) = [process for process in started if "EngineCore" in process.cmdline()[0]]
    return core, started


def _only_worker(stack: Stack) -> Process:
    """A worker that serves, and no other."""
    if not stack.workers:
        stack.await_workers(0)  # a killed one counts as alive for the length of a lease
        stack.start_worker(MODEL)
    stack.await_workers(1)
    (worker,) = stack.workers
    return worker


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_15_the_jobs_of_a_lost_enginecore_go_on_with_the_replacement(
    own_stack: Stack, fault: Fault, how: signal.Signals
) -> None:
    stack = own_stack
    worker = _only_worker(stack)
    bodies = [chat(n, **LONG) for n in range(8)]
    core, started = _engine(worker)
    clients, expected = begin(stack, bodies, 20)
    fault.inflict(f"{how.name} EngineCore")
    lost_s = time.monotonic()
    core.send_signal(how)
    assert worker.popen.wait(120) == 1
    assert time.monotonic() - lost_s < STALL_S + slack(12)
    await_gone(started)
    stack.processes.remove(worker)
    stack.start_worker(MODEL)
    stack.await_workers(1)
    compare(fault, clients, expected, lost_s)


def test_2_14_real_streams_of_a_killed_worker_go_on_token_for_token(
    own_stack: Stack, fault: Fault
) -> None:
    stack = own_stack
    _only_worker(stack)
    bodies = [chat(n, **LONG, return_token_ids=n % 2 == 0) for n in range(16)]
    expected = ask(stack, bodies)
    stack.start_worker(MODEL)
    stack.await_workers(2)
    processes = {worker.pid: _engine(worker)[1] for worker in stack.workers}
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 20)
    victim = max(stack.workers, key=lambda worker: len(stack.jobs_of(worker)))
    started = processes[victim.pid]
    engine = [process for process in started if "VLLM" in process.cmdline()[0]]
    assert len(engine) >= 1
    # 14: no engine is left that holds the memory, though none of it can notice anything by itself.
    for process in engine:
        process.suspend()
    fault.inflict("SIGKILL vLLM worker with a hung engine")
    victim.kill()
    killed_s = time.monotonic()
    await_gone(started)
    compare(fault, clients, expected, killed_s)
    assert max(fault.recovery_s) < LEASE_S + slack(5)


def test_sigterm_ends_a_worker_and_its_engine(own_stack: Stack) -> None:
    worker = _only_worker(own_stack)
    _, started = _engine(worker)
    worker.signal(signal.SIGTERM)
    assert worker.popen.wait(120) == 0
    await_gone(started)
    await_that(lambda: not own_stack.redis.keys(keys.worker("*")))
