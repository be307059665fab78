"""What is wrong with the queue, and how to fix it: for alerts, `sluice doctor`, `sluice status`.

As it is now; the rules for Prometheus (deploy/prometheus) cover a longer time.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from tasks.contract.job import Lane
from tasks.contract.settings import Settings
from tasks.contract.trouble import MORE_MEMORY
from tasks.queue.counts import Counted
from tasks.queue.statistics import ModelStats, QueueStats, RedisMemory

KV_CACHE_FULL = 0.95
MEMORY_HIGH = 0.8
MEMORY_FULL = 0.95
SEE_LOG = "if it ran before, its log shows why it ended"


class Severity(StrEnum):
    """As in docs/operations.md."""

    CRITICAL = "critical"
    WARNING = "warning"


class Problem(NamedTuple):
    """Something that holds and should not."""

    name: str
    """That of its alert, if there is one."""
    model: str
    """'' where there is none."""
    severity: Severity
    what: str
    remedy: str


def find_problems(stats: QueueStats, settings: Settings) -> list[Problem]:
    """All problems, first those of models."""
    found = [problem for model in stats.models for problem in _of_model(model, stats, settings)]
    if stats.maintenance is None:
        what = "no maintenance lives: jobs of dead workers and the ledger wait for it"
        remedy = f"start it: `sluice maintenance`; {SEE_LOG}"
        found.append(Problem("SluiceNoMaintenance", "", Severity.CRITICAL, what, remedy))
    if repairs := stats.total(Counted.REPAIRS):
        what = f"{repairs} job(s) were not where they belong since Redis began, and were put right"
        remedy = "see SluiceRepairs in docs/operations.md; maintenance's log names each job"
        found.append(Problem("SluiceRepairs", "", Severity.WARNING, what, remedy))
    memory = find_memory_problem(stats.memory)
    return [*found, memory] if memory else found


def find_memory_problem(memory: RedisMemory) -> Problem | None:
    """Whether this Redis is nearly full."""
    if memory.used_bytes <= MEMORY_HIGH * memory.limit_bytes or not memory.limit_bytes:
        return None
    what, severity, remedy = f"Redis has {memory}", Severity.WARNING, MORE_MEMORY
    if memory.used_bytes > MEMORY_FULL * memory.limit_bytes:
        what, severity = f"{what}: when it is full, requests get 503", Severity.CRITICAL
    if not memory.max_bytes:
        remedy = "set a maxmemory: its machine's memory is nearly full, and the kernel may kill it"
    return Problem("SluiceRedisMemory", "", severity, what, remedy)


def start_worker(model: str) -> str:
    """What to do where nobody serves the model."""
    return f"start one: `sluice worker --model {model}`; {SEE_LOG}"


def _of_model(model: ModelStats, stats: QueueStats, settings: Settings) -> Iterator[Problem]:
    name, jobs = model.name, model.waiting.jobs
    # Batch jobs may wait for hours.
    oldest_s = model.depth[Lane.INTERACTIVE].oldest_age_s
    if jobs and not model.serving:
        what = f"{jobs} jobs wait for {name}, and no worker serves it"
        yield Problem("SluiceNoWorker", name, Severity.CRITICAL, what, start_worker(name))
    if jobs and name not in stats.listed:
        what = f"{name}: {jobs} job(s) wait, and models.yaml does not name it"
        remedy = "name it there and start a worker, or cancel them (`sluice jobs`, `sluice cancel`)"
        yield Problem("SluiceUnlistedModel", name, Severity.CRITICAL, what, remedy)
    if oldest_s > settings.alert_oldest_s and not model.is_paused:
        limit = f"the limit is {settings.alert_oldest_s:g} s"
        what = f"An interactive job for {name} has waited for {oldest_s:.0f} s; {limit}"
        remedy = "start more workers, or `sluice drain WORKER` one that is stuck"
        yield Problem("SluiceQueueOld", name, Severity.CRITICAL, what, remedy)
    if jobs > settings.alert_depth:
        what = f"{jobs} jobs wait for {name}; the limit is {settings.alert_depth}"
        remedy = "start more workers; `sluice jobs --status queued` shows whose jobs they are"
        yield Problem("SluiceQueueDeep", name, Severity.WARNING, what, remedy)
    if model.kv_cache_usage > KV_CACHE_FULL:
        what = f"{model.kv_cache_usage:.0%} of the KV cache of a worker of {name} are in use"
        remedy = "start more workers, or give it fewer `slots` in models.yaml"
        yield Problem("SluiceKvCacheFull", name, Severity.WARNING, what, remedy)
    if model.is_paused:
        remedy = f"`sluice resume {name}` ends that"
        yield Problem("SluiceQueuePaused", name, Severity.WARNING, f"{name} is paused", remedy)
