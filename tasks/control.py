"""What an operator tells the workers: to drain, and which models not to serve for a while."""

from enum import StrEnum
from typing import Any, NamedTuple

from redis import Redis

from tasks import keys
from tasks.errors import NotKnownError

# Field of a worker's hash, and message on its control channel.
DRAIN = "drain"


class WorkerState(StrEnum):
    SERVING = "serving"
    DRAINING = "draining"


class WorkerView(NamedTuple):
    """A worker as its last heartbeat showed it."""

    id: str
    model: str
    slots: int
    running: int
    state: WorkerState


def workers(redis: Redis) -> list[WorkerView]:
    """The workers that live."""
    names: Any = redis.smembers(keys.WORKERS)
    ids = sorted(name.decode() for name in names)
    pipeline = redis.pipeline(transaction=False)
    for worker_id in ids:
        pipeline.hmget(keys.worker(worker_id), "model", "slots", "running", "state")
    return [
        WorkerView(
            worker_id,
            *(model.decode(), int(slots), int(running)),
            WorkerState((state or b"serving").decode()),
        )
        for worker_id, (model, slots, running, state) in zip(ids, pipeline.execute(), strict=True)
        if model is not None
    ]


def drain(redis: Redis, bus: Redis, worker_id: str) -> None:
    """Has a worker take no more jobs, finish what it can, hand on the rest, and end.

    Raises:
        NotKnownError: no such worker lives.
    """
    alive = [worker.id for worker in workers(redis)]
    if worker_id not in alive:
        raise NotKnownError(
            f"no worker {worker_id!r} lives; there are: {', '.join(alive) or 'none'}"
        )
    redis.hset(keys.worker(worker_id), DRAIN, 1)
    redis.expire(keys.worker(worker_id), 60, nx=True)  # if it ran out in between
    bus.publish(keys.control(worker_id), DRAIN)
