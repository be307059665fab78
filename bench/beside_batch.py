"""Chats beside 200 long batch jobs: how long their first token takes, and what the jobs lose.

The batch runs once undisturbed, so that all of its answers can be compared, byte for byte. Then
come chats alone, and the same chats, at the same moments, beside the batch.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.table import Table

from bench.measurement import QUESTIONS, percentile_ms
from bench.stack import Stack, await_that, running
from bench.stacks import StackError
from tasks.contract import keys
from tasks.contract.job import Cause, Lane
from tasks.contract.models import Model
from tasks.queue import counts
from tasks.queue.counts import Counted, Happening

ENDPOINT = "/v1/chat/completions"
LONGEST_S = 1800.0
JOB_TOKENS, CHAT_TOKENS = 400, 24


def run(console: Console, model: Model, jobs: int, chats: int, chats_per_s: float) -> list[str]:
    """Runs and prints the comparison; returns what went wrong."""
    with TemporaryDirectory(prefix="sluice-bench-beside-") as home:
        stack = Stack(Path(home), [model.model_dump(mode="json")])
        client = httpx.Client(timeout=60, trust_env=False)
        with running(stack), client:
            client.base_url = httpx.URL(stack.url)
            return _measure(console, stack, client, (jobs, chats, chats_per_s))


def _measure(
    console: Console, stack: Stack, client: httpx.Client, extent: tuple[int, int, float]
) -> list[str]:
    jobs, chats, chats_per_s = extent
    with console.status("the batch, undisturbed"):
        undisturbed = _answers(client, _submit(client, jobs))
    with console.status("chats alone"):
        alone_s = asyncio.run(_chat(stack.url, chats, chats_per_s))
    with console.status("chats beside the batch"):
        begun_s = time.monotonic()
        submitted = _submit(client, jobs)
        await_that(lambda: _status(client, submitted[0])["status"] == "in_progress", 60)
        beside_s = asyncio.run(_chat(stack.url, chats, chats_per_s))
        waiting = sum(_status(client, job)["status"] != "completed" for job in submitted)
        answers = _answers(client, submitted)
        took_s = time.monotonic() - begun_s
    counted: Any = stack.redis.hgetall(keys.COUNTS)
    happened = Happening(Counted.REQUEUES, Cause.PREEMPTED, stack.models[0], Lane.BATCH)
    table = Table("chats", "TTFT p50", "TTFT p99", title="time to first token", box=None)
    for name, ttft_s in (("alone", alone_s), (f"beside {jobs} batch jobs", beside_s)):
        p50_ms, p99_ms = (percentile_ms(ttft_s, percent) for percent in (50, 99))
        table.add_row(name, f"{p50_ms:.0f} ms", f"{p99_ms:.0f} ms")
    console.print(table)
    equal = sum(map(_is_equal, undisturbed, answers))
    console.print(
        f"batch: {jobs} jobs of {JOB_TOKENS} tokens in {took_s:.0f} s, {waiting} of them after "
        f"the last chat; {counts.read(counted)[happened]} preempted; {equal} answers as undisturbed"
    )
    if not waiting:
        return ["the batch was over before the chats were"]
    return [] if equal == jobs else [f"{jobs - equal} answers of the batch differ"]


def _submit(client: httpx.Client, jobs: int) -> list[str]:
    """Every second one is streamed."""
    made = []
    for number in range(jobs):
        question = f"{number}: {QUESTIONS[number % len(QUESTIONS)]}"
        body = _body(question, JOB_TOKENS) | {"stream": number % 2 == 0}
        job = {"endpoint": ENDPOINT, "body": body, "priority": "batch"}
        made.append(str(client.post("/v1/jobs", json=job).raise_for_status().json()["id"]))
    return made


def _body(question: str, tokens: int) -> dict[str, Any]:
    message = {"role": "user", "content": question}
    return {"messages": [message], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def _status(client: httpx.Client, job: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/jobs/{job}").raise_for_status().json()
    return found


def _answers(client: httpx.Client, jobs: Sequence[str]) -> list[dict[str, Any]]:
    """The answers' choices, when all are there.

    Raises:
        StackError: a job has failed.
    """
    found = []
    for job in jobs:
        status = _await_end(client, job)
        if status["status"] != "completed":
            raise StackError(f"a batch job is {status['status']}: {status['error']}")
        found.append(status["response"]["body"]["choices"])
    return found


def _await_end(client: httpx.Client, job: str) -> dict[str, Any]:
    await_that(lambda: _status(client, job)["status"] not in ("queued", "in_progress"), LONGEST_S)
    return _status(client, job)


def _is_equal(one: object, other: object) -> bool:
    return orjson.dumps(one) == orjson.dumps(other)


async def _chat(url: str, chats: int, chats_per_s: float) -> list[float]:
    """Seconds until the first token of each; they come at random, the same moments each time."""
    moments = random.Random(1)
    client = httpx.AsyncClient(base_url=url, timeout=LONGEST_S, trust_env=False)
    async with client, asyncio.TaskGroup() as group:
        asked = []
        for number in range(chats):
            question = QUESTIONS[number % len(QUESTIONS)]
            asked.append(group.create_task(_ask(client, f"{question} {number}")))
            await asyncio.sleep(moments.expovariate(chats_per_s))
    return [task.result() for task in asked]


async def _ask(client: httpx.AsyncClient, question: str) -> float:
    begun_s = time.monotonic()
    body, first_s = _body(question, CHAT_TOKENS) | {"stream": True}, None
    async with client.stream("POST", ENDPOINT, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            # The first event names the role.
            if first_s is None and '"content":' in line and '"content":""' not in line:
                first_s = time.monotonic() - begun_s
    if first_s is None:
        raise StackError("a chat had no token")
    return first_s
