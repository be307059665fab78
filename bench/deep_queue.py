"""Whether a step of the queue costs more where a million jobs wait than where a thousand do.

Two models share a Redis server. Each step is taken on both in turn, so that both meet the same
noise.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from redis import Redis

from bench.figures import Report
from bench.measurement import percentile_ms
from bench.stack import Stack, await_that
from bench.stacks import StackError
from tasks.contract import keys
from tasks.contract.job import Job, Lane, State, new_id
from tasks.queue.backlog import Backlog
from tasks.queue.depth import places

SHALLOW_JOBS = 1000
# In front of the deep queue, of a worker that runs one already: claims pass them.
SUSPECTS = 4000
TENANT = "one"
ROUNDS = 9
CYCLES_PER_ROUND = 300
FILLED_AT_ONCE = 10_000
ENDPOINT = "/v1/chat/completions"
BODY = b'{"messages":[{"role":"user","content":"Hello!"}]}'

# Copies a queued job KEYS[1] so often, one ms apart and before it, as if each had been submitted.
FILL = """
local last = redis.call('ZSCORE', KEYS[2], ARGV[1])
for i = ARGV[3], ARGV[4] do
    local id = string.format('job_%d%031d', ARGV[5], i)
    redis.call('COPY', KEYS[1], ARGV[2] .. id)
    redis.call('ZADD', KEYS[2], string.format('%d', last - i), id)
    redis.call('ZADD', KEYS[3], string.format('%d', last - i), id)
end"""


def measure(report: Report, stack: Stack, backlog: Backlog, deep_jobs: int) -> None:
    """Times the steps of both queues, and compares their p99 round by round."""
    queues = (
        Queue(stack.redis, backlog, "shallow", SHALLOW_JOBS),
        Queue(stack.redis, backlog, "deep", deep_jobs),
    )
    for number, queue in enumerate(queues):
        queue.fill(number)
    queues[1].fill_suspects()
    # The log that Redis keeps is written anew while it grows; that is another matter.
    await_that(lambda: not stack.redis.info("persistence")["aof_rewrite_in_progress"], 300)
    used_mb = stack.redis.info("memory")["used_memory"] / 1e6
    report.console.print(f"deep queue: {deep_jobs} and {SHALLOW_JOBS} jobs, {used_mb:.0f} MB")
    report.notes.append("The steps of the deep queue are timed in their client, one at a time.")
    p99s_ms: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(ROUNDS):
        for step, p99_ms in _measure_round(*queues).items():
            p99s_ms[step].append(p99_ms)
    for step, pairs in p99s_ms.items():
        report.add(f"{step} p99 at {SHALLOW_JOBS:,}", "ms", [shallow for shallow, _ in pairs])
        report.add(f"{step} p99 at {deep_jobs:,}", "ms", [deep for _, deep in pairs])
        ratios = [deep / shallow for shallow, deep in pairs]
        report.add(f"{step} p99, ratio", "x", ratios, at_most=2)


def _measure_round(shallow: "Queue", deep: "Queue") -> dict[str, tuple[float, float]]:
    """The p99 of each step in both queues, ms."""
    cycles = [(shallow.cycle(), deep.cycle()) for _ in range(CYCLES_PER_ROUND)]
    return {
        step: (
            percentile_ms([one[step] for one, _ in cycles], 99),
            percentile_ms([one[step] for _, one in cycles], 99),
        )
        for step in cycles[0][0]
    }


class Queue:
    """A model's backlog that stays as deep as it was filled."""

    def __init__(self, redis: Redis, backlog: Backlog, model: str, jobs: int) -> None:
        self._redis = redis
        self._backlog = backlog
        self._model = model
        self._lane = keys.backlog(model, Lane.BATCH)
        self._queue = keys.queue(model, Lane.BATCH, TENANT)
        self._jobs = jobs
        self._suspects = 0

    def fill(self, number: int) -> None:
        """Submits one job, and copies it inside Redis: small, but with all fields of a job."""
        job = self._submit()
        copy = self._redis.register_script(FILL)
        for first in range(1, self._jobs, FILLED_AT_ONCE):
            last = min(first + FILLED_AT_ONCE, self._jobs) - 1
            filled = [keys.job(job.id), self._lane, self._queue]
            copy(filled, [job.id, keys.JOB_PREFIX, first, last, number])

    def fill_suspects(self) -> None:
        """Jobs that have lost two workers, before all others; one of them runs on the claimer."""
        place = keys.suspects(self._model, Lane.BATCH)
        for _ in range(SUSPECTS):
            job = self._submit()
            self._redis.zrem(self._lane, job.id)
            self._redis.zrem(self._queue, job.id)
            self._redis.hset(keys.job(job.id), mapping={"place": place, "failures": 2})
            self._redis.zadd(place, {job.id: 0})
        claim = self._backlog.claim(self._model, "bench")
        if not claim or not claim.is_suspect:
            raise StackError(f"the queue of {self._model} gives no suspect: {claim}")
        self._suspects = SUSPECTS - 1

    def cycle(self) -> dict[str, float]:
        """Seconds of each step: claim, finish, submit another one, find the middle one's place."""
        middle: Any = self._redis.zrange(self._lane, self._jobs // 2, self._jobs // 2)
        queued = [each.job for each in self._backlog.snapshots([middle[0].decode()]) if each]
        claim_s, claim = _timed(lambda: self._backlog.claim(self._model, "bench"))
        finish_s, has_finished = _timed(lambda: self._backlog.finish(claim, State.COMPLETED))
        submit_s, _ = _timed(self._submit)
        position_s, (place,) = _timed(lambda: places(self._redis, queued))
        # One job fewer is ahead of it than before, and positions count from 1.
        ahead = self._jobs // 2 + self._suspects
        if not has_finished or place is None or place.position != ahead:
            raise StackError(f"the queue of {self._model} is wrong: {claim} {place}")
        return {"claim": claim_s, "finish": finish_s, "submit": submit_s, "position": position_s}

    def _submit(self) -> Job:
        job = Job(new_id(), self._model, ENDPOINT, BODY, Lane.BATCH, TENANT)
        self._backlog.submit(job)
        return job


def _timed(step: Callable[[], Any]) -> tuple[float, Any]:
    start_s = time.perf_counter()
    result = step()
    return time.perf_counter() - start_s, result
