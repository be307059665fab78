"""How long a scrape takes: of an API of 8 processes that have counted, with 50 models at work."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests

from bench.figures import Report
from bench.stack import Stack, await_that
from tasks.contract import keys
from tasks.contract.job import Job, Lane
from tasks.contract.settings import Settings
from tasks.queue.backlog import Backlog

MODELS = 50
PROCESSES = 8
SCRAPES = 50
RESTARTS = 100


def measure(report: Report) -> None:
    """Scrapes, replaces each worker often by another that dies, and scrapes again."""
    models = [{"name": f"model-{number}", "engine": "sim"} for number in range(MODELS)]
    with TemporaryDirectory(prefix="sluice-bench-scrape-") as home:
        stack = Stack(Path(home), models, api_processes=PROCESSES)
        try:
            _prepare(stack)
            times_ms, before_bytes = _scrape(stack)
            for number in range(RESTARTS):
                stack.redis.sadd(keys.WORKERS, f"gone-{number}")
            _, after_bytes = _scrape(stack)
        finally:
            stack.stop()
            stack.redis.close()
    report.add("a scrape, 8 API processes, 50 models", "ms", times_ms, at_most=100)
    grown = after_bytes / before_bytes
    report.add("its size after 100 restarts of workers", "x", [grown], at_most=1.01)


def _prepare(stack: Stack) -> None:
    """All series exist: each model has had jobs, and each process has answered most endpoints."""
    stack.start_redis()
    stack.start_api()
    backlog = Backlog(stack.redis, Settings())
    for model in stack.models:
        for lane in Lane:
            job = Job.create(model=model, endpoint="/v1/completions", body=b"{}")
            backlog.submit(Job(job.id, model, job.endpoint, job.body, lane))
        beat: dict[Any, Any] = {"model": model, "slots": 64, "running": 1, "waiting": 0}
        stack.redis.hset(keys.worker(f"worker-{model}"), mapping=beat)
        stack.redis.sadd(keys.WORKERS, f"worker-{model}")
    for _ in range(20 * PROCESSES):
        for path in ("models", "models/model-1", "jobs", "jobs/none", "nothing"):
            requests.get(f"{stack.url}/v1/{path}", timeout=10)
    directory = next((stack.home / "metrics").iterdir())
    await_that(lambda: len(list(directory.glob("counter_*.db"))) == PROCESSES)


def _scrape(stack: Stack) -> tuple[list[float], int]:
    """The ms of each scrape, and the bytes of the last one."""
    times_ms = []
    for _ in range(SCRAPES):
        start_s = time.perf_counter()
        answer = requests.get(stack.url + "/metrics", timeout=10)
        times_ms.append((time.perf_counter() - start_s) * 1000)
        answer.raise_for_status()
    return times_ms, len(answer.content)
