"""kill -9 of a worker while another one is free: how long its streams pause.

Beside that, what must move no stream: a worker that is stopped, and one whose network stalls, each
for half a lease. The engine is simulated, all else is real.
"""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from rich.console import Console

from bench.figures import Report
from bench.measurement import percentile_ms
from bench.relay import Relay
from bench.stack import Process, Stack, await_that, running, serving
from tasks.contract import keys
from tasks.contract.settings import get_settings

MODEL: dict[str, Any] = {
    "name": "sim",
    "engine": "sim",
    "args": {"tokens-per-s": 20, "first-token-s": 0},
}
STREAMS = 8
# None comes to its end before it is left.
TOKENS = 10_000
BEGUN_TOKENS = 5
# Kills come at any moment between two heartbeats and two looks of maintenance.
MOST_DELAY_S = 1.0
MOST_GAP_S = 5.0
LONGEST_S = 120.0


class Stream(threading.Thread):
    """A client that reads its answer until it is told to leave."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.job_id = ""
        self.token_at_s: list[float] = []
        self.error = ""
        self._url = f"{url}/v1/chat/completions"
        self._leaving = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except httpx.HTTPError as broken:
            self.error = str(broken)

    def _read(self) -> None:
        message = {"role": "user", "content": "How long is a pause?"}
        body = {"messages": [message], "max_tokens": TOKENS, "stream": True}
        options: dict[str, Any] = {"timeout": LONGEST_S, "trust_env": False}
        with httpx.stream("POST", self._url, json=body, **options) as answer:
            self.job_id = answer.headers.get("x-sluice-job", "")
            for line in answer.iter_lines():
                if self._leaving.is_set():
                    return
                if line.startswith("data: {"):
                    self.token_at_s.append(time.monotonic())
                if line.startswith(('data: {"error"', "data: [DONE]")):
                    self.error = f"ended: {line}"

    def leave(self) -> None:
        """Ends it at what comes next."""
        self._leaving.set()

    def has_token_since(self, moment_s: float) -> bool:
        return bool(self.token_at_s) and self.token_at_s[-1] > moment_s

    def longest_gap_s(self, since_s: float) -> float:
        """Between two tokens, or from that moment to the first one; one may be on its way then."""
        times_s = [since_s, *(at_s for at_s in self.token_at_s if at_s > since_s)]
        return max(later_s - at_s for at_s, later_s in pairwise(times_s))


def run(console: Console, kills: int) -> list[str]:
    """Runs and prints everything; returns what went wrong."""
    report = Report(console)
    with TemporaryDirectory(prefix="sluice-bench-recovery-") as home:
        stack = Stack(Path(home), [MODEL])
        with serving(Relay(stack.redis_port)) as relay, running(stack, 2):
            _kill_workers(report, stack, kills)
            worker = stack.workers[0]
            stop, go_on = (partial(worker.signal, n) for n in (signal.SIGSTOP, signal.SIGCONT))
            _disturb(report, stack, worker, "stopped", stop, go_on)
            worker = _start_behind(stack, relay)
            _disturb(report, stack, worker, "network stalls", relay.stall, relay.resume)
    report.show()
    return report.errors


def _kill_workers(report: Report, stack: Stack, kills: int) -> None:
    gaps_s: list[float] = []
    for number in range(kills):
        victim = stack.workers[0]
        with _streaming(report, stack, victim) as streams:
            time.sleep(random.uniform(0, MOST_DELAY_S))
            killed_s = time.monotonic()
            victim.kill()
            await_that(partial(_all_in_attempt, stack, streams, 2), LONGEST_S)
            _await_tokens(streams)
            gaps_s += [stream.longest_gap_s(killed_s) for stream in streams]
        stack.start_worker(MODEL["name"])
        stack.await_workers(2)
        report.console.print(f"kill {number + 1} of {kills}: {max(gaps_s[-STREAMS:]):.1f} s")
    what = f"gap of {len(gaps_s)} streams after {kills} x kill -9"
    p50_s, p99_s = (percentile_ms(gaps_s, percent) / 1000 for percent in (50, 99))
    report.add(f"{what}: p50", "s", [p50_s])
    report.add(f"{what}: p99", "s", [p99_s], at_most=MOST_GAP_S)


def _disturb(
    report: Report,
    stack: Stack,
    worker: Process,
    how: str,
    begin: Callable[[], None],
    end: Callable[[], None],
) -> None:
    """How many streams another worker takes over from one that is disturbed for half a lease."""
    for_s = get_settings().lease_s / 2
    with _streaming(report, stack, worker) as streams:
        try:
            begin()
            time.sleep(for_s)
        finally:
            end()
        _await_tokens(streams)
        moved = sum(not _all_in_attempt(stack, [stream], 1) for stream in streams)
    report.add(f"{how} for {for_s:g} s: streams moved", f"of {STREAMS}", [moved], at_most=0)


@contextmanager
def _streaming(report: Report, stack: Stack, worker: Process) -> Iterator[list[Stream]]:
    """Streams that have begun, all on that worker."""
    others = [other for other in stack.workers if other is not worker]
    for other in others:
        other.signal(signal.SIGSTOP)
    try:
        streams = [Stream(stack.url) for _ in range(STREAMS)]
        begun = lambda: all(len(stream.token_at_s) >= BEGUN_TOKENS for stream in streams)
        await_that(begun, LONGEST_S)
    finally:
        for other in others:
            other.signal(signal.SIGCONT)
    yield streams
    report.errors += [stream.error for stream in streams if stream.error]
    for stream in streams:
        stream.leave()
    await_that(lambda: not stack.redis.zcard(keys.LEASES), LONGEST_S)


def _all_in_attempt(stack: Stack, streams: list[Stream], number: int) -> bool:
    found = {stack.redis.hget(keys.job(stream.job_id), "attempt") for stream in streams}
    return found == {b"%d" % number}


def _await_tokens(streams: list[Stream]) -> None:
    """Waits until each has another token."""
    now_s = time.monotonic()
    await_that(lambda: all(stream.has_token_since(now_s) for stream in streams), LONGEST_S)


def _start_behind(stack: Stack, relay: Relay) -> Process:
    """Another worker, which reaches Redis through the relay."""
    direct = stack.env
    stack.env = direct | {"SLUICE_REDIS_URL": f"redis://127.0.0.1:{relay.port}/0"}
    worker = stack.start_worker(MODEL["name"])
    stack.env = direct
    stack.await_workers(3)
    return worker
