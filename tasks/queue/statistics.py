"""The state of the whole queue at one moment: for metrics, alerts and `sluice status`."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.contract import keys
from tasks.contract.job import Lane
from tasks.queue import counts
from tasks.queue.backlog import Backlog
from tasks.queue.control import WorkerView, maintenance, workers
from tasks.queue.counts import Happening
from tasks.queue.depth import Depth, ask_depths, read_depths


@dataclass(frozen=True)
class Vitals:
    """What waits, what runs, who works, and what has happened."""

    depths: dict[tuple[str, Lane], Depth]
    leases: int
    delayed: int
    counts: Counter[Happening]
    """At the same moment as the three above: accepted = depth + leases + delayed + ended."""
    body_bytes: dict[str, int]
    """Of the requests of each model's open jobs."""
    paused: set[str]
    workers: list[WorkerView]
    maintenance: str | None
    """The process that reaped last; None: none has for a while."""
    ledger_records: int
    memory_bytes: int
    memory_limit_bytes: int
    """Redis's maxmemory, or what its machine has; 0: not known."""

    @property
    def models(self) -> list[str]:
        """All models, each once."""
        return list(dict.fromkeys(model for model, _ in self.depths))


def look(backlog: Backlog, models: Iterable[str]) -> Vitals:
    """The vitals, with these models and all that have had a job.

    Raises:
        RedisError: Redis does not answer.
    """
    redis = backlog.redis
    names = sorted({*models, *backlog.models()})
    moment = redis.pipeline(transaction=True)
    ask_depths(moment, names)
    moment.zcard(keys.LEASES)
    moment.zcard(keys.DELAYED)
    moment.hgetall(keys.COUNTS)
    moment.xlen(keys.LEDGER)
    moment.hgetall(keys.BODY_BYTES)
    depths, leases, delayed, counted, records, body_bytes = moment.execute()
    memory: Any = redis.info("memory")
    return Vitals(
        depths=read_depths(names, depths),
        leases=leases,
        delayed=delayed,
        counts=counts.read(counted),
        body_bytes={model.decode(): int(size) for model, size in body_bytes.items()},
        paused=backlog.paused(),
        workers=workers(redis),
        maintenance=maintenance(redis),
        ledger_records=records,
        memory_bytes=memory["used_memory"],
        memory_limit_bytes=memory["maxmemory"] or memory.get("total_system_memory", 0),
    )
