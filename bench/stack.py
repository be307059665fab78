"""A whole Sluice in processes of its own, on loopback: real Redis, gunicorn and Celery."""

import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import orjson
import psutil
import redis
import requests
import yaml

from db import writing
from db.models import Base
from deploy import redis_server
from tasks.contract import keys

STOP_S = 60.0
SAMPLE_S = 0.1
MOST_SLACK = 10.0
KEPT_TABLES = {"api_keys", "tenants"}


class Process:
    """A part that runs, with its log."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        self._is_asked = False
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def kill_all(self) -> None:
        """SIGKILL to the process and all that it has started."""
        self._kill_group()
        self.popen.wait()

    def ask_to_stop(self) -> None:
        """SIGTERM, once: a second one makes Celery drop its tasks."""
        if self.popen.poll() is None and not self._is_asked:
            self._is_asked = True
            self.popen.terminate()

    def stop(self) -> int:
        """SIGTERM, and the exit code; the group is killed when it takes too long."""
        self.ask_to_stop()
        try:
            return self.popen.wait(STOP_S)
        finally:
            self._kill_group()

    def _kill_group(self) -> None:
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class Stack:
    """The parts of one deployment; a test starts, kills and restarts them as it needs."""

    def __init__(self, home: Path, models: list[dict[str, Any]], **settings: object) -> None:
        self.home = home
        self.models = [model["name"] for model in models]
        catalog = home / "models.yaml"
        catalog.write_text(yaml.safe_dump({"models": models}))
        self.redis_port = redis_server.free_port()
        self.api_ports: list[int] = []
        self.api_processes: list[Process] = []
        self.processes: list[Process] = []
        self.env = os.environ | {
            "SLUICE_HOME": str(home),
            "SLUICE_MODELS": str(catalog),
            "SLUICE_REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "SLUICE_DRAIN_S": "5",
            # On any machine: what is measured, or killed, is the one that there is.
            "SLUICE_API_PROCESSES": "1",
            "PYTHONUNBUFFERED": "1",
            **{f"SLUICE_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.redis = redis.Redis(port=self.redis_port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api_ports[0]}"

    def start(self, workers: int = 1) -> None:
        """Redis, one API process, maintenance, and that many workers of each model."""
        self.start_redis()
        api = self._spawn_api(redis_server.free_port())
        self.start_maintenance()
        for model in self.models * workers:
            self.start_worker(model)
        self._await_api(api)
        self.await_workers(len(self.models) * workers)

    def start_redis(self) -> Process:
        command = redis_server.server_command(
            redis_server.find_server(), self.home, self.redis_port
        )
        server = self._spawn("redis", command)
        await_that(lambda: redis_server.answers(f"redis://127.0.0.1:{self.redis_port}/0"))
        return server

    def start_api(self, port: int | None = None) -> Process:
        port = port or redis_server.free_port()
        return self._await_api(self._spawn_api(port))

    def _spawn_api(self, port: int) -> Process:
        process = self._spawn("api", _sluice("api", "--bind", f"127.0.0.1:{port}"))
        self.api_ports.append(port)
        self.api_processes.append(process)
        return process

    def _await_api(self, process: Process) -> Process:
        port = self.api_ports[-1]
        await_that(lambda: _is_up(f"http://127.0.0.1:{port}/health/live"))
        return process

    def start_maintenance(self) -> Process:
        return self._spawn("maintenance", _sluice("maintenance"))

    def start_worker(self, model: str) -> Process:
        return self._spawn("worker", _sluice("worker", "--model", model))

    @property
    def workers(self) -> list[Process]:
        """The workers that were started and have not ended."""
        started = (p for p in self.processes if p.log.name.startswith("worker"))
        return [process for process in started if process.popen.poll() is None]

    def part(self, name: str) -> Process:
        """The latest process of that part."""
        return next(p for p in reversed(self.processes) if p.log.name.startswith(name))

    def jobs_of(self, worker: Process | psutil.Process) -> list[str]:
        """The running jobs that the worker, or one of its front ends, has claimed."""
        leases: Any = self.redis.zrange(keys.LEASES, 0, -1)
        leased = [job.decode() for job in leases]
        suffix = f"-{worker.pid}".encode()
        return [job for job in leased if self._claimer(job).endswith(suffix)]

    def _claimer(self, job_id: str) -> bytes:
        return self.redis.hget(keys.job(job_id), "worker") or b""  # type: ignore[return-value]

    def clear(self) -> None:
        """Removes all jobs, for the next test; the parts run on."""
        for job in self.redis.scan_iter(f"{keys.JOB_PREFIX}*"):
            job_id = job.decode().removeprefix(keys.JOB_PREFIX)
            requests.post(f"{self.url}/v1/jobs/{job_id}/cancel", timeout=10)
        await_that(lambda: not (self.redis.zcard(keys.LEASES) or self.redis.xlen(keys.LEDGER)))
        self.forget()

    def forget(self) -> None:
        """Deletes all records of jobs, none of which may be open; keys and tenants stay."""
        with writing(self.database_url) as session:
            for table in reversed(Base.metadata.sorted_tables):
                if table.name not in KEPT_TABLES:
                    session.execute(table.delete())
        for prefix in (keys.JOB_PREFIX, keys.log("")):
            if found := list(self.redis.scan_iter(f"{prefix}*")):
                self.redis.delete(*found)

    @property
    def database_url(self) -> str:
        return self.env.get("SLUICE_DATABASE_URL", f"sqlite:///{self.home / 'sluice.db'}")

    def wipe_redis(self) -> None:
        """Kills Redis and starts it again without its data."""
        self.part("redis").kill()
        for directory in ("redis", "valkey"):
            shutil.rmtree(self.home / directory, ignore_errors=True)
        self.start_redis()

    def await_workers(self, number: int, timeout_s: float = 400) -> None:
        def count() -> bool:
            self.check_alive()
            return len(self.redis.keys(keys.worker("*"))) == number

        await_that(count, timeout_s)

    def check_alive(self) -> None:
        """Fails, with its log, when a part has exited that no test killed."""
        for process in self.processes:
            code = process.popen.poll()
            if code is not None and code != -signal.SIGKILL:
                raise AssertionError(f"exit code {code}:\n{process.log.read_text()[-4000:]}")

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{p.log.name}:\n{p.log.read_text()[-3000:]}" for p in self.processes)

    def stop(self) -> None:
        """Ends all parts at once, and Redis after them."""
        parts = [process for process in self.processes if not process.log.name.startswith("redis")]
        for process in parts:
            process.ask_to_stop()
        for process in [*parts, *self.processes]:
            process.stop()

    def _spawn(self, name: str, command: list[str]) -> Process:
        log = self.home / f"{name}-{len(self.processes)}.log"
        process = Process(command, self.env, log)
        self.processes.append(process)
        return process


def _sluice(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deploy.cli", *arguments]


def _is_up(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def slack(seconds: float) -> float:
    """What may take so many seconds on an idle machine may take so many on this one, just now."""
    begun_s, used_s = time.monotonic(), time.thread_time()
    while time.thread_time() - used_s < SAMPLE_S:
        pass
    # Processes that wait for each other wait more than once for a processor.
    slowdown = (time.monotonic() - begun_s) / SAMPLE_S
    return seconds * min(max(2 * slowdown - 1, 1), MOST_SLACK)


def await_that(
    condition: Callable[[], object],
    timeout_s: float = 120,
    explain: Callable[[], object] = lambda: "",
) -> None:
    """Waits until the condition holds; `explain` describes the actual state.

    Raises:
        AssertionError: it did not in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"still not so after {timeout_s} s {explain()}")
        time.sleep(0.02)


AnyServer = TypeVar("AnyServer", bound=socketserver.BaseServer)


@contextmanager
def serving(server: AnyServer) -> Iterator[AnyServer]:
    """A server of a test's own, which answers while the block runs."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def send(
    stack: Stack, body: dict[str, Any], endpoint: str = "/v1/chat/completions"
) -> socket.socket:
    """Sends a request and returns the connection, nothing read from it."""
    client = socket.create_connection(("127.0.0.1", stack.api_ports[0]), timeout=10)
    data = orjson.dumps(body)
    head = f"POST {endpoint} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return client


@contextmanager
def running(stack: Stack, workers: int = 1) -> Iterator[Stack]:
    """The stack, started; stopped afterwards, and none of its processes may be left."""
    try:
        stack.start(workers)
        yield stack
    finally:
        stack.stop()
        groups = {process.pid for process in stack.processes}
        # Even after SIGKILL the kernel takes its time with a process of some gigabytes.
        await_that(lambda: not _alive(groups), 20, lambda: f"left behind: {_alive(groups)}")


def _alive(groups: set[int]) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if _group(p.pid) in groups and is_alive(p)]


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
