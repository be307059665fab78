"""The jobs API against its aims: submitting, resuming, idle watchers, and a deep queue.

Each part starts what it needs on loopback and ends it; its docstring describes what runs.
`submitter.py` is the client that submits, `deep_queue.py` and `fair_queue.py` the last parts.
"""

import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import requests
from redis.exceptions import RedisError
from rich.console import Console

from bench import deep_queue, fair_queue, scrape
from bench.figures import Report
from bench.processes import cpu_between_s, largest_rss_mb, snapshot
from bench.stack import Process, Stack, await_that
from bench.stacks import StackError
from bench.submitter import Accepted, Order, job_request
from tasks.contract import keys
from tasks.contract.job import Lane
from tasks.contract.settings import Settings
from tasks.queue.backlog import Backlog

SIM = {"name": "sim", "engine": "sim", "args": {"tokens-per-s": 0, "first-token-s": 0}}
NO_LIMIT = 100_000_000
# A part that does not start or answer, and what its absence leads to.
FAILURES = (AssertionError, OSError, RedisError, StackError, subprocess.SubprocessError)
# Accepted per CPU second of the API.
LEAST_PER_CORE = {"SQLite": 400, "PostgreSQL": 600}
ROUNDS = 3
WARM_UP_JOBS = 300
JOBS_PER_ROUND = 3000
LOG_TOKENS = 10_000
RESUMES = 20
WATCHED_JOBS = 200
WATCHERS = 2000
IDLE_S = 20.0  # each gets two keep-alives meanwhile
DEEP_JOBS = 1_000_000
FAIR_JOBS = 100_000


def run(console: Console, scale: float, document: dict[str, Any]) -> list[str]:
    """Runs and prints all parts, or those before one that fails; returns what went wrong."""
    allow_many_files()
    report = Report(console)
    try:
        with TemporaryDirectory(prefix="sluice-bench-jobs-") as home:
            _measure_all(report, Path(home), scale)
    except FAILURES as failure:
        report.errors.append(f"{type(failure).__name__}: {failure}")
    report.show()
    document["jobs"] = [one.as_json() for one in report.figures]
    return report.errors


def _measure_all(report: Report, home: Path, scale: float) -> None:
    report.notes += [
        "Per core, CPU and memory are of the one API process; resume is until the first event.",
        "SQLite runs with fsync, PostgreSQL without.",
    ]
    from bench.postgres import running_postgres  # whose driver is an extra

    with running_postgres() as postgres:
        urls = {"SQLite": "", "PostgreSQL": postgres.create_database()}
        for database, url in urls.items():
            _measure_submission(report, home, database, url, scale)
    _measure_resume(report, home)
    _measure_watchers(report, home, max(round(WATCHERS * scale), 1))
    with _stack(home, "deep-queue") as stack:
        # Nothing but Redis runs: the steps are taken here, as an API and a worker take them.
        backlog = Backlog(stack.redis, Settings(max_backlog=NO_LIMIT))
        jobs = max(round(DEEP_JOBS * scale), deep_queue.SHALLOW_JOBS)
        deep_queue.measure(report, stack, backlog, jobs)
    with _stack(home, "fair-queue") as stack:
        backlog = Backlog(stack.redis, Settings(max_backlog=NO_LIMIT))
        jobs = max(round(FAIR_JOBS * scale), fair_queue.TENANTS)
        fair_queue.measure(report, stack, backlog, jobs)
    scrape.measure(report)


def allow_many_files() -> None:
    """Each connection is an open file here and one in the API, which inherits the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _stack(home: Path, name: str, database_url: str = "") -> Iterator[Stack]:
    """Redis of its own; the parts that are started on it all end with it."""
    directory = home / name
    directory.mkdir()
    # Set even when empty: nothing of the user's deployment may be used.
    urls = {"bus_url": "", "database_url": database_url, "model": ""}
    stack = Stack(directory, [SIM], max_backlog=NO_LIMIT, **urls)
    with ExitStack() as ending:
        ending.callback(lambda: _stop_all(stack.processes))
        stack.start_redis()
        yield stack


def _stop_all(processes: Sequence[Process]) -> None:
    """Stops each, the last one first, even if another could not be stopped."""
    with ExitStack() as ending:
        for process in processes:
            ending.callback(process.stop)


def _measure_submission(
    report: Report, home: Path, database: str, database_url: str, scale: float
) -> None:
    """32 clients submit to one API process; neither worker nor maintenance runs."""
    seen: list[Accepted] = []
    api_cpu_s: list[float] = []
    with _stack(home, f"submission-{database}", database_url) as stack:
        api = stack.start_api().pid
        for number in range(ROUNDS + 1):
            jobs = max(round(JOBS_PER_ROUND * scale), 100) if number else WARM_UP_JOBS
            report.console.print(f"submission, {database}: round {number} of {ROUNDS}")
            before = snapshot(api)
            accepted = _submit(Order(stack.api_ports[0], "sim", jobs))
            report.errors += [f"{database}: {n} x {what}" for what, n in accepted.errors.items()]
            if number:
                seen.append(accepted)
                api_cpu_s.append(cpu_between_s(before, snapshot(api))["api"])
        queued = stack.redis.zcard(keys.backlog("sim", Lane.BATCH))
        if queued != (expected := WARM_UP_JOBS + sum(one.jobs for one in seen)):
            report.errors.append(f"{database}: {queued} jobs are queued instead of {expected}")
    per_core = [one.jobs / cpu_s for one, cpu_s in zip(seen, api_cpu_s, strict=True)]
    client = median(one.client_cpu_s / one.wall_s for one in seen)
    name = f"submit, {database}: "
    report.add(name + "accepted", "/s", [one.jobs_per_s for one in seen])
    report.add(name + "per core", "/s", per_core, at_least=LEAST_PER_CORE[database])
    report.add(name + "CPU per job", "ms", [1000 / jobs for jobs in per_core])
    report.add(name + "p50", "ms", [one.p50_ms for one in seen])
    report.add(name + "p99", "ms", [one.p99_ms for one in seen], at_most=50)
    report.notes.append(f"submit, {database}: the client used {client:.0%} of a core")


def _submit(order: Order) -> Accepted:
    done = subprocess.run(
        [sys.executable, "-m", "bench.submitter"],
        input=json.dumps(asdict(order)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Accepted.decode(done.stdout)


def _measure_resume(report: Report, home: Path) -> None:
    """Follows a long job that has ended, by an API process that did not take it."""
    with _stack(home, "resume") as stack:
        stack.start_api()
        stack.start_api()
        stack.start_worker("sim")
        stack.await_workers(1)
        report.console.print(f"resume: a job of {LOG_TOKENS} tokens")
        request = job_request("sim", "Hello!", max_tokens=LOG_TOKENS, stream=True)
        job_id = _post_job(stack, request)
        state = f"{stack.url}/v1/jobs/{job_id}"
        await_that(lambda: requests.get(state, timeout=30).json()["status"] == "completed", 120)
        log_length = stack.redis.xlen(keys.log(job_id))
        for name, after in {"the start": 1, "the middle": log_length // 2}.items():
            port = stack.api_ports[1]
            first_ms = [_first_event_ms(port, job_id, after) for _ in range(RESUMES)]
            events, whole_ms = _replay(port, job_id, after)
            # Without those before, the one named, and the end, which is no event of a stream.
            if events != (expected := log_length - after - 2):
                report.errors.append(f"resume: {events} events instead of {expected}")
            report.add(f"resume from {name}", "ms", first_ms, at_most=100)
            report.notes.append(f"resume from {name}: all {events} events in {whole_ms:.0f} ms")


def _post_job(stack: Stack, request: dict[str, object]) -> str:
    answer = requests.post(f"{stack.url}/v1/jobs", json=request, timeout=30)
    answer.raise_for_status()
    return str(answer.json()["id"])


def _first_event_ms(port: int, job_id: str, after: int) -> float:
    """From connecting to the first event."""
    start_s = time.perf_counter()
    with _follow(port, job_id, after) as connection:
        _read_until(connection, b"\nid: ")
        return (time.perf_counter() - start_s) * 1000


def _replay(port: int, job_id: str, after: int) -> tuple[int, float]:
    """How many events come after that one, and the time until the last of them."""
    start_s = time.perf_counter()
    with _follow(port, job_id, after) as connection:
        received = _read_until(connection, b"data: [DONE]")
        return received.count(b"\nid: "), (time.perf_counter() - start_s) * 1000


def _follow(port: int, job_id: str, after: int = 0) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    resume = f"Last-Event-ID: 1-{after}\r\n" if after else ""
    request = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n{resume}\r\n"
    connection.sendall(request.encode())
    return connection


def _read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = bytearray()
    while mark not in received[-100_000:]:
        data = connection.recv(65_536)
        if not data:
            raise ConnectionError(f"closed after {bytes(received[-200:])!r}")
        received += data
    return bytes(received)


def _measure_watchers(report: Report, home: Path, watchers: int) -> None:
    """Connections that follow queued jobs, which nobody runs; all have received their place."""
    with _stack(home, "watchers") as stack, ExitStack() as open_files:
        api = stack.start_api().pid
        ids = [_post_job(stack, job_request("sim", "Hello!")) for _ in range(WATCHED_JOBS)]
        base_mb = largest_rss_mb(snapshot(api), "api")
        report.console.print(f"{watchers} watchers of {WATCHED_JOBS} jobs")
        followers = [
            open_files.enter_context(_follow(stack.api_ports[0], ids[number % WATCHED_JOBS]))
            for number in range(watchers)
        ]
        for follower in followers:
            _read_until(follower, b"event: queue")
        before, start_s = snapshot(api), time.monotonic()
        time.sleep(IDLE_S)
        after, wall_s = snapshot(api), time.monotonic() - start_s
        for follower in followers:
            _read_until(follower, b": keep-alive")
    cpu_percent = 100 * cpu_between_s(before, after)["api"] / wall_s
    more_mb = largest_rss_mb(after, "api") - base_mb
    name = f"{watchers} idle watchers: "
    report.add(name + "memory", "MB", [more_mb], at_most=100)
    report.add(name + "CPU", "% of a core", [cpu_percent])
    report.notes.append(f"{name}the API used {base_mb:.0f} MB before they came")
