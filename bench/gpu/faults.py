"""kill -9 of a worker under streams on a GPU, whose memory has to come back; clients that vanish.

Answers are compared byte for byte with undisturbed ones. On a GPU they are the same from run to run
only with vLLM's batch-invariant kernels, so the engine runs with these.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import requests
import uvloop

from bench.client import Connection
from bench.figures import Report
from bench.gpu.servers import PROMPT_WORDS
from bench.measurement import Load, percentile_ms
from bench.reply import Reply
from bench.stack import Process, Stack, await_that, running
from tasks.contract import keys
from tasks.contract.models import Model
from tasks.queue import control

STREAMS, TOKENS = 256, 512
VANISHING_TOKENS = 2000
BATCH_INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}
# The kill comes when every stream has so much of its answer.
BEGUN = 1 / 8
PAUSE_S = 1.0
HANG_S = 300.0
LOOK_S = 0.05
IN_ENGINE = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
# Of a worker's part of the GPU's memory, so much counts as all.
FREED = 0.9


class WholeReply(Reply):
    """A streamed reply that also keeps what was said."""

    def __init__(self, asked_at_s: float) -> None:
        super().__init__(asked_at_s)
        self._said = bytearray()

    def _dechunk(self, data: bytes) -> bytes:
        piece = super()._dechunk(data)
        self._said += piece
        return piece

    @property
    def answer(self) -> str:
        """The text of all events."""
        events = bytes(self._said).split(b"\n\n")
        chunks = [json.loads(event[6:]) for event in events if event.startswith(b"data: {")]
        choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
        return "".join(choice["delta"].get("content") or "" for choice in choices)

    @property
    def is_whole(self) -> bool:
        return self.is_complete and self.has_done and not self.has_error

    @property
    def longest_gap_s(self) -> float:
        return max((later - at for at, later in pairwise(self.text_at_s)), default=0.0)


class Outcome(NamedTuple):
    """How the streams of a run went."""

    replies: list[WholeReply]
    freed_s: float | None
    """From the kill until the worker's memory of the GPU was free; None without a GPU."""


def measure(
    report: Report, home: Path, model: Model, streams: int = STREAMS, tokens: int = TOKENS
) -> None:
    """Two workers of the model: undisturbed, killed, left by all clients."""
    # Set even when empty: nothing of the user's deployment may be used.
    urls = {"bus_url": "", "database_url": "", "model": ""}
    idle_mb = gpu_used_mb()
    report.console.print("starting two workers")
    # With one front end each, a worker is one process, and one kill takes its half of the streams.
    one_each = model.model_copy(update={"frontends": 1})
    stack = Stack(home, [one_each.model_dump(mode="json")], **urls)
    with running(stack, workers=2):
        load = Load(stack.url, model.name, streams, streams, tokens, prompt_words=PROMPT_WORDS)
        uvloop.run(_ask_all(replace(load, max_tokens=8, seed=2), []))  # a warm-up
        report.console.print("undisturbed, twice")
        before, again = (uvloop.run(_undisturbed(load)) for _ in range(2))
        report.console.print("kill -9 of a worker")
        after = uvloop.run(_killed(stack, load, idle_mb))
        _compare(report, streams, before, again, after)
        report.console.print("all clients vanish")
        vanishing = replace(load, max_tokens=VANISHING_TOKENS, seed=3)
        report.add("clients vanish: until the engine is idle", "s", [_vanish(stack, vanishing)])
    stack.redis.close()


async def _undisturbed(load: Load) -> Outcome:
    return Outcome(await _ask_all(load, []), None)


async def _killed(stack: Stack, load: Load, idle_mb: float | None) -> Outcome:
    """Kills the worker with more of the streams, when each has a part of its answer."""
    begun: list[Connection] = []
    streaming = asyncio.create_task(_ask_all(load, begun))
    enough = max(round(load.max_tokens * BEGUN), 1)
    for _ in range(round(HANG_S / LOOK_S)):
        if streaming.done() or _have_begun(begun, load.streams, enough):
            break
        await asyncio.sleep(LOOK_S)
    freed_s = await asyncio.to_thread(_kill, stack, idle_mb)
    return Outcome(await streaming, freed_s)


def _have_begun(connections: list[Connection], streams: int, events: int) -> bool:
    begun = [one for one in connections if len(one.reply.text_at_s) >= events]
    return len(begun) == streams


def _kill(stack: Stack, idle_mb: float | None) -> float | None:
    """The seconds until the GPU's memory is free again, which each worker has half of."""
    held_mb = gpu_used_mb()
    victim: Process = max(stack.workers, key=lambda worker: len(stack.jobs_of(worker)))
    killed_s = time.monotonic()
    victim.kill()
    if held_mb is None or idle_mb is None:
        return None
    goal_mb = held_mb - FREED * (held_mb - idle_mb) / 2
    await_that(lambda: (gpu_used_mb() or 0) <= goal_mb, 60, lambda: f"{gpu_used_mb()} MB are held")
    return time.monotonic() - killed_s


async def _ask_all(load: Load, begun: list[Connection]) -> list[WholeReply]:
    asking = [_ask(load, request, begun) for request in load.http_requests()]
    return await asyncio.gather(*asking)


async def _ask(load: Load, request: bytes, begun: list[Connection]) -> WholeReply:
    """The reply as far as it came; `begun` has what it comes on."""
    connect = asyncio.get_running_loop().create_connection
    _, connection = await connect(partial(Connection, WholeReply), *load.address)
    begun.append(connection)
    try:
        async with asyncio.timeout(HANG_S):
            await connection.ask(request)
    except TimeoutError:
        pass  # what is missing is seen in the reply
    finally:
        connection.close()
    assert isinstance(connection.reply, WholeReply)
    return connection.reply


def _compare(report: Report, streams: int, before: Outcome, again: Outcome, after: Outcome) -> None:
    unit = f"of {streams}"
    for name, outcome in (("undisturbed again", again), ("kill -9", after)):
        report.add(f"{name}: whole", unit, [_count(outcome, _is_whole)], at_least=streams)
        pairs = zip(before.replies, outcome.replies, strict=True)
        same = sum(one.answer == other.answer for one, other in pairs)
        report.add(f"{name}: the same bytes", unit, [same], at_least=streams)
    if len({reply.answer for reply in before.replies}) < streams:
        report.notes.append("some prompts have the same answer: equal ones prove less")
    gaps_s = [reply.longest_gap_s for reply in after.replies if reply.longest_gap_s > PAUSE_S]
    report.add(f"kill -9: paused for more than {PAUSE_S:g} s", unit, [len(gaps_s)])
    for percent in (50, 99) if gaps_s else ():
        report.add(f"kill -9: pause p{percent}", "s", [percentile_ms(gaps_s, percent) / 1000])
    if after.freed_s is not None:
        report.add("kill -9: until its GPU memory is free", "s", [after.freed_s])
    report.errors += [
        f"{name}: {streams - whole} of {streams} answers are not whole"
        for name, outcome in (("undisturbed", before), ("again", again), ("kill -9", after))
        if (whole := _count(outcome, _is_whole)) < streams
    ]


def _is_whole(reply: WholeReply) -> bool:
    return reply.status == 200 and reply.is_whole


def _count(outcome: Outcome, holds: Callable[[WholeReply], bool]) -> int:
    return sum(map(holds, outcome.replies))


def _vanish(stack: Stack, load: Load) -> float:
    """The seconds from the end of a process with all clients until no engine runs a request."""
    command = [sys.executable, "-m", "bench.client"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        client.stdin.write(load.encode().encode())
        client.stdin.close()
        try:
            await_that(lambda: stack.redis.zcard(keys.LEASES) == load.streams)
        finally:
            client.kill()
        left_s = time.monotonic()
        await_that(lambda: not (stack.redis.zcard(keys.LEASES) or _in_engines(stack)))
        return time.monotonic() - left_s


def _in_engines(stack: Stack) -> float:
    """The requests inside vLLM, as it counts them itself."""
    found = (_metrics(one.metrics_address) for one in control.workers(stack.redis))
    lines = (line for text in found for line in text.splitlines())
    return sum(float(line.split()[-1]) for line in lines if line.startswith(IN_ENGINE))


def _metrics(address: str) -> str:
    try:
        return requests.get(f"http://{address}/metrics", timeout=5).text
    except requests.RequestException:
        return ""  # of the worker that was killed


def gpu_used_mb() -> float | None:
    """Memory in use on the first GPU; None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None
