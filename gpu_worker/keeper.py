"""What a worker does beside generating: renews leases, shows that it lives, hears cancellations."""

import logging
import threading
from collections.abc import Callable

from redis import Redis
from redis.exceptions import RedisError

from gpu_worker.engine import Engine
from gpu_worker.runner import Runner
from tasks import keys
from tasks.backlog import Backlog
from tasks.connections import connect_listener
from tasks.models import Model
from tasks.settings import get_settings

log = logging.getLogger(__name__)

RECONNECT_S = 0.5
Stop = Callable[[str], None]


def keep(
    worker_id: str,
    model: Model,
    backlog: Backlog,
    runner: Runner,
    engine: Engine,
    stop: Stop,
    closing: threading.Event,
) -> None:
    """Until `closing`: renews all leases in one command, three times a lease, and beats.

    Jobs that turn out to be no longer held are stopped.
    """
    interval_s = get_settings().lease_s / 3
    while True:
        try:
            beat(backlog.redis, worker_id, model, engine)
            for job_id in backlog.renew([job.claim for job in list(runner.running.values())]):
                stop(job_id)
        except RedisError as failure:
            log.warning("leases not renewed, trying again: %s", failure)
            closing.wait(RECONNECT_S)
            continue
        if closing.wait(interval_s):
            return


def beat(redis: Redis, worker_id: str, model: Model, engine: Engine) -> None:
    """Writes the worker's heartbeat; it lasts as long as a lease."""
    load = engine.load()
    key = keys.worker(worker_id)
    fields: dict[str, str | int] = {"model": model.name, "slots": model.slots}
    fields |= load._asdict()
    pipeline = redis.pipeline(transaction=False)
    pipeline.hset(key, mapping=fields)  # type: ignore[arg-type]
    pipeline.expire(key, int(get_settings().lease_s) + 1)
    pipeline.sadd(keys.WORKERS, worker_id)
    pipeline.execute()


def leave(redis: Redis, worker_id: str) -> None:
    """Takes the worker off the list; without Redis its heartbeat runs out by itself."""
    try:
        redis.delete(keys.worker(worker_id))
        redis.srem(keys.WORKERS, worker_id)
    except RedisError as failure:
        log.warning("the worker is still listed for the length of a lease: %s", failure)


def hear_cancellations(worker_id: str, stop: Stop) -> None:
    """For ever: stops the jobs whose ids arrive on the control channel.

    What a broken connection loses, the next renewal of the leases finds.
    """
    bus = connect_listener(get_settings().bus_url)
    closing = threading.Event()
    while True:
        try:
            pubsub = bus.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
            with pubsub as subscription:
                subscription.subscribe(keys.control(worker_id))
                for message in subscription.listen():
                    stop(message["data"].decode())
        except RedisError as failure:
            log.warning("cancellations not heard, subscribing again: %s", failure)
            closing.wait(RECONNECT_S)
