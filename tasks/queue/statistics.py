"""The state of the whole queue at one moment: for metrics, problems.py and `sluice status`."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from redis import Redis

from tasks.contract import keys
from tasks.contract.job import LOWEST_PRIORITY, ONE_PRIORITY, Lane, State
from tasks.queue import counts
from tasks.queue.backlog import Backlog, load_script
from tasks.queue.control import WorkerState, WorkerView, workers
from tasks.queue.counts import Counted, Happening


@dataclass(frozen=True)
class Depth:
    """How much work waits."""

    jobs: int
    oldest_age_s: float

    @classmethod
    def total(cls, lanes: Collection["Depth"]) -> Self:
        """Of these lanes together."""
        return cls(sum(lane.jobs for lane in lanes), max(lane.oldest_age_s for lane in lanes))


Depths = dict[Lane, Depth]
"""Of each lane of a model."""


@dataclass(frozen=True)
class ModelStats:
    """One model: what waits for it, and its workers together."""

    name: str
    is_paused: bool
    depth: Depths
    serving: int
    engines: float
    """Of those: several front ends share one, and a part of them may be on its way."""
    draining: int
    slots: int
    """Of the serving workers, as the next ones."""
    slots_used: int
    """Requests inside the engines of all workers, running or waiting there."""
    engine_waiting: int
    kv_cache_usage: float
    """0 to 1, of the fullest worker; the next ones of the slowest."""
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    max_model_len: int | None
    """Tokens of a request and its answer that each worker takes; None: that is not known."""

    @classmethod
    def of(cls, name: str, depth: Depths, alive: list[WorkerView], paused: set[str]) -> Self:
        """Of the model of that name, from all workers and all paused models."""
        own = [worker for worker in alive if worker.model == name]
        serving = [worker for worker in own if worker.state is WorkerState.SERVING]
        return cls(
            name=name,
            is_paused=name in paused,
            depth=depth,
            serving=len(serving),
            engines=sum(1 / worker.frontends for worker in serving),
            draining=len(own) - len(serving),
            slots=sum(worker.slots for worker in serving),
            slots_used=sum(worker.running + worker.waiting for worker in own),
            engine_waiting=sum(worker.waiting for worker in own),
            kv_cache_usage=max((worker.kv_cache_usage for worker in own), default=0.0),
            ttft_p50_ms=_slowest(worker.ttft_p50_ms for worker in own),
            ttft_p95_ms=_slowest(worker.ttft_p95_ms for worker in own),
            max_model_len=min((w.max_model_len for w in own if w.max_model_len), default=None),
        )

    @property
    def waiting(self) -> Depth:
        """What waits in all lanes."""
        return Depth.total(self.depth.values())

    @property
    def demand(self) -> int:
        """Jobs that need workers: those that run, and, unless the model is paused, that wait."""
        return self.slots_used + (0 if self.is_paused else self.waiting.jobs)

    @property
    def has_workers(self) -> bool:
        return self.serving + self.draining > 0


def _slowest(times_ms: Iterable[float | None]) -> float | None:
    return max((time_ms for time_ms in times_ms if time_ms is not None), default=None)


class RedisMemory(NamedTuple):
    """What a Redis has in use of its memory."""

    used_bytes: int
    max_bytes: int
    """Its maxmemory; 0: none is set."""
    machine_bytes: int
    """What its machine has; 0: not known."""

    @classmethod
    def decode(cls, info: dict[str, Any]) -> "RedisMemory":
        """From the answer to INFO."""
        return cls(info["used_memory"], info["maxmemory"], info.get("total_system_memory", 0))

    @property
    def limit_bytes(self) -> int:
        return self.max_bytes or self.machine_bytes

    def __str__(self) -> str:
        used = f"{self.used_bytes / 2**20:.0f}"
        if not self.max_bytes:
            return f"{used} MiB in use, no maxmemory is set"
        return f"{used} of {self.max_bytes / 2**20:.0f} MiB in use"


@dataclass(frozen=True)
class QueueStats:
    """What waits, what runs, who works, and what has happened."""

    listed: Sequence[str]
    """The models that models.yaml names."""
    models: list[ModelStats]
    """These, then all others that have had a job, have a worker or are paused."""
    leases: int
    delayed: int
    counts: Counter[Happening]
    """At the moment of depth, leases and delayed: accepted = these + ended."""
    body_bytes: dict[str, int]
    """Of the requests of each model's open jobs."""
    workers: list[WorkerView]
    maintenance: str | None
    """The process that reaped last; None: none has for a while."""
    ledger_records: int
    memory: RedisMemory

    def total(self, what: Counted) -> int:
        """How often this has happened since Redis began, to whatever job."""
        return sum(times for happening, times in self.counts.items() if happening.what is what)

    def total_jobs(self, model: str, state: State) -> int:
        """How often jobs of the model have come into the state."""
        return sum(self.counts[Happening(Counted.JOBS, state, model, lane)] for lane in Lane)


def read_stats(backlog: Backlog, models: Sequence[str] = ()) -> QueueStats:
    """The statistics; the models are those that models.yaml names.

    Raises:
        RedisError: Redis does not answer.
    """
    redis, paused = backlog.redis, backlog.paused()
    alive = workers(redis)
    others = sorted({*backlog.models(), *paused, *(worker.model for worker in alive)})
    names = list(dict.fromkeys([*models, *others]))
    moment = redis.pipeline(transaction=True)
    ask_depths(moment, names)
    moment.zcard(keys.LEASES)
    moment.zcard(keys.DELAYED)
    moment.hgetall(keys.COUNTS)
    moment.xlen(keys.LEDGER)
    moment.hgetall(keys.BODY_BYTES)
    moment.get(keys.MAINTENANCE)
    waiting, leases, delayed, counted, records, body_bytes, process = moment.execute()
    memory: Any = redis.info("memory")
    found = _read_depths(names, waiting)
    return QueueStats(
        listed=models,
        models=[ModelStats.of(name, depth, alive, paused) for name, depth in found.items()],
        leases=leases,
        delayed=delayed,
        counts=counts.read(counted),
        body_bytes={model.decode(): int(size) for model, size in body_bytes.items()},
        workers=alive,
        maintenance=process.decode() if process else None,
        ledger_records=records,
        memory=RedisMemory.decode(memory),
    )


def read_depths(redis: Redis, models: Iterable[str]) -> dict[str, Depths]:
    """What waits in each lane of the models, all at one moment."""
    names = list(models)
    return _read_depths(names, ask_depths(redis, names))


def ask_depths(redis: Any, models: Sequence[str]) -> Any:
    """The reply of lua/depths.lua; through a pipeline too."""
    lanes = [f"{model}:{lane}" for model in models for lane in Lane]
    script = load_script(redis, "depths")
    return script(args=[LOWEST_PRIORITY, int(ONE_PRIORITY), *lanes])


def _read_depths(models: Sequence[str], reply: Sequence[int]) -> dict[str, Depths]:
    answers = zip(reply[::2], reply[1::2], strict=True)
    found = (Depth(jobs, max(age_ms, 0) / 1000) for jobs, age_ms in answers)
    return {model: {lane: next(found) for lane in Lane} for model in models}
