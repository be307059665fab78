"""The queue without an API: jobs of one token that go through one worker, and its scripts alone."""

import time
from pathlib import Path

from bench.figures import Report
from bench.stack import Stack, await_that
from bench.stacks import StackError
from tasks.contract import keys
from tasks.contract.job import Job, Lane, State, new_id
from tasks.contract.settings import Settings
from tasks.queue.backlog import Backlog

MODEL = {"name": "sim", "engine": "sim", "args": {"tokens-per-s": 0, "first-token-s": 0}}
ENDPOINT = "/v1/chat/completions"
BODY = b'{"messages":[{"role":"user","content":"Hello!"}],"max_tokens":1}'
JOBS, WARM_UP_JOBS = 3000, 300
NO_LIMIT = 100_000_000


def measure(report: Report, home: Path, rounds: int, scale: float) -> None:
    """Submits jobs from here, while a worker claims and ends them; then takes all steps here."""
    stack = Stack(home, [MODEL], bus_url="", database_url="", model="", max_backlog=NO_LIMIT)
    backlog = Backlog(stack.redis, Settings(max_backlog=NO_LIMIT))
    jobs = max(round(JOBS * scale), 1)
    try:
        stack.start_redis()
        by_itself = [_by_itself(backlog, jobs) for _ in range(rounds)]
        stack.start_worker("sim")
        stack.await_workers(1)
        _through_worker(stack, backlog, WARM_UP_JOBS)
        report.console.print(f"queue alone: {jobs} jobs through a worker")
        through = [_through_worker(stack, backlog, jobs) for _ in range(rounds)]
    finally:
        stack.stop()
        stack.redis.close()
    report.add("queue alone: jobs through one worker", "/s", through, at_least=1500)
    report.add("queue alone: the three scripts, one client", "/s", by_itself)


def _through_worker(stack: Stack, backlog: Backlog, jobs: int) -> float:
    """Jobs a second from the first submission to the last end."""
    start_s = time.perf_counter()
    for _ in range(jobs):
        backlog.submit(_job())
    queued, running = keys.backlog("sim", Lane.BATCH), keys.LEASES
    await_that(lambda: not (stack.redis.zcard(queued) or stack.redis.zcard(running)), 300)
    return jobs / (time.perf_counter() - start_s)


def _by_itself(backlog: Backlog, jobs: int) -> float:
    """Submitted, claimed and finished one after the other, without a worker."""
    start_s = time.perf_counter()
    for _ in range(jobs):
        backlog.submit(_job())
        claim = backlog.claim("sim", "bench")
        if not claim or not backlog.finish(claim, State.COMPLETED):
            raise StackError(f"the queue does not give the job that it has: {claim}")
    return jobs / (time.perf_counter() - start_s)


def _job() -> Job:
    return Job(new_id(), "sim", ENDPOINT, BODY, Lane.BATCH, max_tokens=1)
