"""What waits: depth and age of each model's backlog, the position of a job, and when it may start.

A job's score in its lane is the order of service: priority x 1e13 + the ms at which it was queued.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis import Redis

from tasks import keys
from tasks.backlog import load_script
from tasks.control import WorkerState, workers
from tasks.message import LOWEST_PRIORITY, ONE_PRIORITY, Lane, Snapshot


@dataclass(frozen=True)
class Depth:
    """How much work waits."""

    jobs: int
    oldest_age_s: float


class Place(NamedTuple):
    """Where a queued job stands, in the fields that clients see."""

    position: int
    """1 is next."""
    eta_s: float | None
    """Until it starts, as the model was served lately; None: not known, or nobody will start it."""
    is_paused: bool
    """Whether the operator has paused the model."""
    workers: int
    """That serve the model."""


def depths(redis: Redis, models: Iterable[str]) -> dict[tuple[str, Lane], Depth]:
    """What waits in each lane of the models, all at one moment."""
    models = list(models)
    return read_depths(models, ask_depths(redis, models))


def ask_depths(redis: Any, models: Sequence[str]) -> Any:
    """Sends the question for `depths`, through a pipeline too; `read_depths` reads the reply."""
    lanes = [f"{model}:{lane}" for model in models for lane in Lane]
    script = load_script(redis, "depths")
    return script(args=[LOWEST_PRIORITY, int(ONE_PRIORITY), *lanes])


def read_depths(models: Sequence[str], reply: Sequence[int]) -> dict[tuple[str, Lane], Depth]:
    """What waits, of the models that were asked for."""
    places = [(model, lane) for model in models for lane in Lane]
    return {
        place: Depth(jobs, max(age_ms, 0) / 1000)
        for place, jobs, age_ms in zip(places, reply[::2], reply[1::2], strict=True)
    }


def depth(redis: Redis, model: str) -> Depth:
    """Jobs that wait for the model, and the age of the oldest one.

    Below 0, which `depths` does not show: Redis's clock was set back since all of them were queued.
    """
    reply = ask_depths(redis, [model])
    ages_ms = [age_ms for jobs, age_ms in zip(reply[::2], reply[1::2], strict=True) if jobs]
    return Depth(sum(reply[::2]), max(ages_ms, default=0) / 1000)


def places(redis: Redis, queued: Sequence[Snapshot]) -> list[Place | None]:
    """Where these jobs stand; None for one that waits no longer.

    Suspects count as the first of their lane: their score is that of their first time in it.
    """
    if not queued:
        return []
    pipeline = redis.pipeline(transaction=False)
    for job in queued:
        pipeline.zrank(keys.suspects(job.model, job.lane), job.id)
        pipeline.zrank(keys.backlog(job.model, job.lane), job.id)
        pipeline.zcard(keys.suspects(job.model, job.lane))
    pipeline.smembers(keys.PAUSED)
    *asked, paused = pipeline.execute()
    ranks = [
        rank if rank is not None else ready if ready is None else ready + suspects
        for rank, ready, suspects in zip(asked[::3], asked[1::3], asked[2::3], strict=True)
    ]
    slots = _slots(redis)
    models = {job.model for job in queued}
    waiting = depths(redis, models)
    each_s = {model: _start_interval_s(redis, model, sum(slots[model])) for model in models}

    def place(job: Snapshot, rank: int | None) -> Place | None:
        if rank is None:
            return None
        interactive = waiting[job.model, Lane.INTERACTIVE].jobs
        position = rank + 1 + (interactive if job.lane is Lane.BATCH else 0)
        is_paused = job.model.encode() in paused
        interval_s = None if is_paused else each_s[job.model]
        eta_s = None if interval_s is None else math.ceil(position * interval_s * 10) / 10
        return Place(position, eta_s, is_paused, len(slots[job.model]))

    return [place(*found) for found in zip(queued, ranks, strict=True)]


def _start_interval_s(redis: Redis, model: str, slots: int) -> float | None:
    """Between two starts, while all slots are in use: the mean time on the engine over the slots.

    Little's law; the mean is lua/finish.lua's.
    """
    mean_us: Any = redis.get(keys.service(model))
    return float(mean_us) / 1e6 / slots if mean_us and slots else None


def _slots(redis: Redis) -> defaultdict[str, list[int]]:
    """Slots of each worker that serves, per model."""
    slots = defaultdict(list)
    for worker in workers(redis):
        if worker.state is WorkerState.SERVING:
            slots[worker.model].append(worker.slots)
    return slots
