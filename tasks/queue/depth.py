"""What waits for a model, the position of a job, and when it may start.

A job's score in the backlog: priority x 1e13 + the ms at which it was queued. It is the order of
service of each tenant's jobs; tenants take turns (turns.py).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis import Redis

from tasks.contract import keys
from tasks.contract.job import Job, Lane
from tasks.queue.control import workers
from tasks.queue.statistics import Depth, ModelStats, ask_depths, read_depths
from tasks.queue.turns import read_ranks


class QueuePosition(NamedTuple):
    """A queued job's place, in the fields that clients see."""

    position: int
    """1 is next; as it would be served if nothing else arrived."""
    eta_s: float | None
    """Until it starts, as the model was served lately; None: not known, or nobody will start it."""
    is_paused: bool
    """Whether the operator has paused the model."""
    workers: int
    """That serve the model."""


class Waiting(NamedTuple):
    """How many jobs wait in a lane, and the id of the oldest of the highest priority."""

    number: int
    first: str


def read_waiting(redis: Redis, model: str, lane: Lane) -> Waiting:
    """Which jobs of the lane may run and do not, those left out that may kill their worker."""
    place = keys.backlog(model, lane)
    pipeline = redis.pipeline(transaction=False)
    pipeline.sismember(keys.PAUSED, model)
    pipeline.zcard(place)
    pipeline.zrange(place, 0, 0)
    is_paused, number, first = pipeline.execute()
    return Waiting(0, "") if is_paused or not first else Waiting(number, first[0].decode())


def depth(redis: Redis, model: str) -> Depth:
    """Jobs that wait for the model, and the age of the oldest one.

    Below 0, which `read_depths` does not show: Redis's clock was set back since all were queued.
    """
    reply = ask_depths(redis, [model])
    ages_ms = [age_ms for jobs, age_ms in zip(reply[::2], reply[1::2], strict=True) if jobs]
    return Depth(sum(reply[::2]), max(ages_ms, default=0) / 1000)


def places(redis: Redis, queued: Sequence[Job]) -> list[QueuePosition | None]:
    """The places of these jobs; None for one that no longer waits."""
    if not queued:
        return []
    ranks = read_ranks(redis, queued)
    paused: Any = redis.smembers(keys.PAUSED)
    alive, names = workers(redis), {name.decode() for name in paused}
    waiting = read_depths(redis, {job.model for job in queued})
    models = {name: ModelStats.of(name, lanes, alive, names) for name, lanes in waiting.items()}
    each_s = {name: _start_interval_s(redis, model) for name, model in models.items()}

    def place(job: Job, rank: int | None) -> QueuePosition | None:
        if rank is None:
            return None
        model, interval_s = models[job.model], each_s[job.model]
        interactive = model.depth[Lane.INTERACTIVE].jobs
        position = rank + 1 + (interactive if job.lane is Lane.BATCH else 0)
        eta_s = None if interval_s is None else math.ceil(position * interval_s * 10) / 10
        return QueuePosition(position, eta_s, model.is_paused, model.serving)

    return [place(*found) for found in zip(queued, ranks, strict=True)]


def _start_interval_s(redis: Redis, model: ModelStats) -> float | None:
    """Between two starts, while all slots are in use: the mean time on the engine over the slots.

    Little's law; the mean is lua/finish.lua's.
    """
    mean_us: Any = redis.get(keys.service(model.name))
    is_served = mean_us and model.slots and not model.is_paused
    return float(mean_us) / 1e6 / model.slots if is_served else None
