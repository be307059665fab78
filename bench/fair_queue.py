"""What a step of the queue costs Redis where many tenants wait, as Redis itself times it."""

from collections import defaultdict
from typing import Any

from redis import Redis

from bench.figures import Report
from bench.measurement import percentile_ms
from bench.stack import Stack
from bench.stacks import StackError
from tasks.contract import keys
from tasks.contract.job import Job, Lane, State, Usage, new_id
from tasks.queue.backlog import STATE, Backlog, read_scripts
from tasks.queue.depth import places

TENANTS = 1000
MODEL = "fair"
ROUNDS = 9
CYCLES_PER_ROUND = 300
WEIGHTS = (1.0, 3.0, 0.5)
ENDPOINT = "/v1/chat/completions"
BODY = b'{"messages":[{"role":"user","content":"Hello!"}]}'
STEPS = ("claim", "finish", "submit")
CLAIM_MS = 0.5
# What is faster is not listed: neither are the commands inside a script, which would slow it down.
LISTED_US = 20
MOST_LISTED = 100_000

# Copies a queued job KEYS[1] so often for another tenant, as if each had been submitted.
FILL = """
local job, backlog, turns, queue = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local order = redis.call('HGET', job, 'order')
local service = redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES')[2]
for i = 1, ARGV[4] do
    local id = string.format('job_%s%025d', ARGV[3], i)
    redis.call('COPY', job, ARGV[1] .. id)
    redis.call('HSET', ARGV[1] .. id, 'tenant', ARGV[2])
    redis.call('ZADD', backlog, order, id)
    redis.call('ZADD', queue, order, id)
end
redis.call('ZADD', turns, service, ARGV[2])"""


def measure(report: Report, stack: Stack, backlog: Backlog, jobs: int) -> None:
    """Times claim, finish and submit as Redis does, without network and client."""
    fill(stack.redis, backlog, jobs // TENANTS)
    names = {_sha(stack.redis, step): step for step in STEPS}
    report.notes.append("Steps of the fair queue are timed by Redis itself (SLOWLOG).")
    p99s_ms: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for step, took_s in _measure_round(stack.redis, backlog, names).items():
            p99s_ms[step].append(percentile_ms(took_s, 99))
    for step, values in p99s_ms.items():
        aim = {"at_most": CLAIM_MS} if step == "claim" else {}
        report.add(f"{step} p99, {jobs:,} jobs of {TENANTS:,} tenants", "ms", values, **aim)


def fill(redis: Redis, backlog: Backlog, jobs_each: int) -> None:
    """So many jobs of each tenant, all with the same service."""
    job = _submit(backlog, 0)
    copy = redis.register_script(FILL)
    lane = (MODEL, Lane.BATCH)
    for number in range(1, TENANTS):
        tenant = _tenant(number)
        zsets = [keys.backlog(*lane), keys.turns(*lane), keys.queue(*lane, tenant)]
        args: list[str | int] = [keys.JOB_PREFIX, tenant, f"{number:07}", jobs_each]
        copy([keys.job(job.id), *zsets], args)


def _measure_round(redis: Redis, backlog: Backlog, names: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of each script's runs."""
    redis.config_set("slowlog-max-len", MOST_LISTED)
    redis.slowlog_reset()
    redis.config_set("slowlog-log-slower-than", LISTED_US)
    for number in range(CYCLES_PER_ROUND):
        claim = backlog.claim(MODEL, "bench")
        if not claim:
            raise StackError("the fair queue gives no job")
        # Answers of all lengths, so that counters are corrected.
        backlog.finish(claim, State.COMPLETED, usage=Usage(10, number * 37 % 500))
        last = _submit(backlog, number)
    redis.config_set("slowlog-log-slower-than", -1)
    if places(redis, [last]) == [None]:
        raise StackError("the fair queue has lost a job")
    took_s: dict[str, list[float]] = defaultdict(list)
    entries: Any = redis.slowlog_get(MOST_LISTED)
    for entry in entries:
        command = entry["command"].decode(errors="replace").split(" ", 2)
        if command[0] == "EVALSHA" and command[1] in names:
            took_s[names[command[1]]].append(entry["duration"] / 1e6)
    for step in STEPS:
        took_s[step] += [LISTED_US / 1e6] * (CYCLES_PER_ROUND - len(took_s[step]))
    return took_s


def _sha(redis: Redis, step: str) -> str:
    files = (*STATE, step) if step == "finish" else (*STATE, "arrivals", step)
    return str(redis.register_script(read_scripts(files)).sha)


def _submit(backlog: Backlog, number: int) -> Job:
    tenant, weight = _tenant(number * 7919 % TENANTS), WEIGHTS[number % len(WEIGHTS)]
    job = Job(new_id(), MODEL, ENDPOINT, BODY, Lane.BATCH, tenant, weight=weight)
    backlog.submit(job)
    return job


def _tenant(number: int) -> str:
    return f"tenant-{number:04}"
