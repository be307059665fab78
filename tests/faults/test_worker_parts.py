"""A part of a worker that fails ends the worker, and its jobs go on elsewhere."""

import functools
import socket
import socketserver
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench.stack import Process, Stack, await_that, running, serving
from tasks.contract import keys
from tests.faults.clients import Client, ask, await_tokens, chat, compare
from tests.faults.conftest import LEASE_S, SLOW_SIM, Fault
from tests.test_jobs import call, get, submit
from tests.test_metrics import Metrics

pytestmark = pytest.mark.timeout(600)

LIE = b"*2\r\n:99\r\n$5\r\nstale\r\n"


class BadRedis(socketserver.ThreadingTCPServer):
    """Redis behind a proxy that fails on request.

    It answers one script with nonsense; or closes the connection instead of bringing a reply that
    names a job.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, redis_port: int) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.redis_port = redis_port
        self.lies = threading.Event()
        self.to_lose = 0


class Relay(socketserver.BaseRequestHandler):
    server: BadRedis

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.redis_port)) as redis:
            back = threading.Thread(target=self._copy, args=(redis, self.request), daemon=True)
            back.start()
            with suppress(OSError):
                while data := self.request.recv(1 << 20):
                    if b"EVALSHA" in data and self.server.lies.is_set():
                        self.server.lies.clear()
                        self.request.sendall(LIE)
                    else:
                        redis.sendall(data)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                if self.server.to_lose and source is not self.request and b"\r\njob_" in data:
                    self.server.to_lose -= 1
                    target.shutdown(socket.SHUT_RDWR)
                    break
                target.sendall(data)


def _is_completed(stack: Stack, job_id: str) -> bool:
    return bool(get(stack, job_id)["status"] == "completed")


def _start_broken_worker(stack: Stack) -> Process:
    command = [sys.executable, "-m", "tests.faults.broken_worker"]
    worker = Process(command, stack.env, stack.home / "worker-broken.log")
    stack.processes.append(worker)
    stack.await_workers(1)
    return worker


def _ends_and_loses_nothing(stack: Stack, fault: Fault, worker: Process, part: str) -> None:
    """Starts streams, has the part fail, and sees them go on elsewhere."""
    bodies = [chat(n, stream=True, max_tokens=200) for n in range(4)]
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 10)
    fault.inflict(f"an error in {part}")
    broken_s = time.monotonic()
    if part == "the publisher":
        stack.bad_redis.lies.set()  # type: ignore[attr-defined]
    else:
        (
            stack.home / {"the heartbeat": "load", "the watch of the engine": "progress"}[part]
        ).touch()
    assert worker.popen.wait(120) == 1
    assert f"{part} failed" in worker.log.read_text()
    stack.processes.remove(worker)
    counted = Metrics(f"{stack.url}/metrics")
    # One of them may be the reason: it becomes a dead letter before it has ended all workers.
    assert counted.total("sluice_requeues_total", cause="worker_failed") == len(clients)
    stack.start_worker("sim")
    compare(fault, clients, ask(stack, bodies), broken_s)


@pytest.mark.parametrize("part", ["the heartbeat", "the watch of the engine", "the publisher"])
def test_an_error_in_a_part_of_a_worker_ends_it_and_loses_nothing(
    home: Any, fault: Fault, part: str
) -> None:
    stack = Stack(home, [SLOW_SIM], lease_s=LEASE_S, keep_alive_s=1)
    with serving(BadRedis(stack.redis_port)) as bus:
        stack.env["SLUICE_BUS_URL"] = f"redis://127.0.0.1:{bus.server_address[1]}/0"
        stack.bad_redis = bus  # type: ignore[attr-defined]
        with running(stack, workers=0):
            _ends_and_loses_nothing(stack, fault, _start_broken_worker(stack), part)


def test_a_worker_that_is_stopped_while_redis_is_away_ends(home: Any, fault: Fault) -> None:
    with running(Stack(home, [SLOW_SIM], lease_s=LEASE_S, keep_alive_s=1, drain_s=1)) as stack:
        bodies = [chat(n, stream=True, max_tokens=200) for n in range(4)]
        clients = [Client(stack, body) for body in bodies]
        await_tokens(clients, 10)
        (worker,) = stack.workers
        fault.inflict("SIGKILL Redis, SIGTERM worker")
        broken_s = time.monotonic()
        stack.part("redis").kill()
        worker.ask_to_stop()
        assert worker.popen.wait(120) == 1
        stack.processes.remove(worker)
        stack.start_redis()
        stack.start_worker("sim")
        compare(fault, clients, ask(stack, bodies), broken_s)


def test_a_worker_whose_engine_does_not_close_ends(home: Any, fault: Fault) -> None:
    with running(Stack(home, [SLOW_SIM], lease_s=LEASE_S), workers=0) as stack:
        worker = _start_broken_worker(stack)
        fault.inflict("an engine that does not close")
        (stack.home / "close").touch()
        worker.ask_to_stop()
        assert worker.popen.wait(120) == 1
        assert "does not end by itself" in worker.log.read_text()
        stack.processes.remove(worker)


def test_a_claim_whose_reply_is_lost_again_and_again_is_of_one_job(home: Any, fault: Fault) -> None:
    # A lease is not renewed before the reply to its claim has come.
    stack = Stack(home, [SLOW_SIM], lease_s=30, keep_alive_s=1)
    with running(stack, workers=0), serving(BadRedis(stack.redis_port)) as queue:
        own = stack.env | {"SLUICE_REDIS_URL": f"redis://127.0.0.1:{queue.server_address[1]}/0"}
        command = [sys.executable, "-m", "gpu_worker.worker", "sim"]
        stack.processes.append(Process(command, own, stack.home / "worker-cut-off.log"))
        stack.await_workers(1)
        fault.inflict("three lost replies to claims")
        queue.to_lose = 3
        job_ids = [submit(stack, chat(stream=True, max_tokens=20))["id"] for _ in range(4)]
        for job_id in job_ids:
            await_that(functools.partial(_is_completed, stack, job_id))
            assert get(stack, job_id)["attempts"] == 1
        assert queue.to_lose == 0


def test_a_control_message_that_nobody_understands_is_passed_over(home: Path, fault: Fault) -> None:
    # The next renewal of its lease would stop the job too, after a third of this.
    with running(Stack(home, [SLOW_SIM], lease_s=600)) as stack:
        fault.inflict("nonsense on a control channel")
        (worker,) = stack.redis.smembers(keys.WORKERS)  # type: ignore[misc]
        job_id = submit(stack, chat(stream=True, max_tokens=20_000))["id"]
        await_that(lambda: get(stack, job_id)["status"] == "in_progress")
        channel = keys.control(worker.decode())
        await_that(lambda: stack.redis.pubsub_numsub(channel) == [(channel.encode(), 1)])
        for nonsense in (b"\xff\xfe", b"", b"job_1", b"job_1 x", b"job_1 1 2", b"job_unknown 1"):
            assert stack.redis.publish(channel, nonsense) == 1
        (process,) = stack.workers
        call(stack, "POST", f"/v1/jobs/{job_id}/cancel")
        await_that(lambda: ": stopped" in process.log.read_text())
