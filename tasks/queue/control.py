"""An operator's commands to the workers: draining, and pausing models."""

from enum import StrEnum
from typing import Any, NamedTuple

from redis import Redis

from tasks.contract import keys
from tasks.contract.errors import NotKnownError

# Field of a worker's hash, and message on its control channel.
DRAIN = "drain"
# Field of the same hash, as lua/lapse.lua has it: how many heartbeats the worker has sent.
BEATS = "beats"
# Between two heartbeats.
BEAT_S = 1.0


class WorkerState(StrEnum):
    SERVING = "serving"
    DRAINING = "draining"


class WorkerView(NamedTuple):
    """A worker as its last heartbeat showed it."""

    id: str
    model: str
    slots: int
    frontends: int
    """Of its engine, all of which are listed."""
    state: WorkerState
    running: int
    waiting: int
    """Inside the engine."""
    kv_cache_usage: float
    """0 to 1."""
    ttft_p50_ms: float | None
    """Of its latest streams."""
    ttft_p95_ms: float | None
    metrics_address: str
    """HOST:PORT of its /metrics."""
    max_model_len: int | None
    """Most tokens of a request and its answer together."""

    @classmethod
    def decode(cls, worker_id: str, fields: dict[bytes, bytes]) -> "WorkerView":
        """Reads the hash that gpu_worker/heartbeat.py writes; older workers write less."""
        text = {name.decode(): value.decode() for name, value in fields.items()}
        p50_ms, p95_ms = text.get("ttft_p50_ms"), text.get("ttft_p95_ms")
        most_tokens = text.get("max_model_len")
        return cls(
            id=worker_id,
            model=text["model"],
            slots=int(text["slots"]),
            frontends=int(text.get("frontends", 1)),
            state=WorkerState(text.get("state", WorkerState.SERVING)),
            running=int(text.get("running", 0)),
            waiting=int(text.get("waiting", 0)),
            kv_cache_usage=float(text.get("kv_cache_usage", 0)),
            ttft_p50_ms=float(p50_ms) if p50_ms else None,
            ttft_p95_ms=float(p95_ms) if p95_ms else None,
            metrics_address=text.get("metrics_address", ""),
            max_model_len=int(most_tokens) if most_tokens else None,
        )


def workers(redis: Redis) -> list[WorkerView]:
    """The live workers; removes dead ones from the list."""
    names: Any = redis.smembers(keys.WORKERS)
    ids = sorted(name.decode() for name in names)
    pipeline = redis.pipeline(transaction=False)
    for worker_id in ids:
        pipeline.hgetall(keys.worker(worker_id))
    found = dict(zip(ids, pipeline.execute(), strict=True))
    alive = {worker_id: fields for worker_id, fields in found.items() if b"model" in fields}
    if dead := found.keys() - alive.keys():
        redis.srem(keys.WORKERS, *dead)
    return [WorkerView.decode(*worker) for worker in alive.items()]


def drain(redis: Redis, bus: Redis, worker_id: str) -> None:
    """Makes a worker take no more jobs, finish what it can, hand on the rest, and exit.

    Raises:
        NotKnownError: no such worker lives.
    """
    alive = [worker.id for worker in workers(redis)]
    if worker_id not in alive:
        raise NotKnownError(
            f"no worker {worker_id!r} lives; there are: {', '.join(alive) or 'none'}"
        )
    redis.hset(keys.worker(worker_id), DRAIN, 1)
    redis.expire(keys.worker(worker_id), 60, nx=True)  # if it expired in between
    bus.publish(keys.control(worker_id), DRAIN)
