"""What a worker does beside generating: sends heartbeats, renews leases, receives commands."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from redis import Redis
from redis.exceptions import RedisError

from gpu_worker.engines.engine import Engine
from gpu_worker.metrics import recent_ttft
from tasks.contract import keys
from tasks.contract.connections import connect_listener
from tasks.contract.errors import DecodeError
from tasks.contract.events import Attempt
from tasks.contract.settings import get_settings
from tasks.queue.control import BEAT_S, BEATS, DRAIN

if TYPE_CHECKING:
    from gpu_worker.worker import Worker

log = logging.getLogger(__name__)

RECONNECT_S = 0.5


def run(worker: "Worker", engine: Engine, closing: threading.Event) -> None:
    """Until `closing`: sends heartbeats, and three times a lease renews all leases in one command.

    Jobs that are found to be no longer held are stopped.
    """
    renewal_s = time.monotonic()
    while True:
        try:
            if send_heartbeat(worker.backlog.redis, worker, engine):
                worker.drain()
            if time.monotonic() >= renewal_s:
                for lost in worker.backlog.renew(worker.claims.held()):
                    worker.stop_job(Attempt.of(lost))
                renewal_s = time.monotonic() + get_settings().lease_s / 3
        except RedisError as failure:
            log.warning("no heartbeat, or leases not renewed; trying again: %s", failure)
            closing.wait(RECONNECT_S)
            continue
        if closing.wait(min(BEAT_S, max(renewal_s - time.monotonic(), 0))):
            return


def send_heartbeat(redis: Redis, worker: "Worker", engine: Engine) -> bool:
    """Writes the worker's heartbeat, which lasts as long as a lease; whether it is to drain."""
    key = keys.worker(worker.id)
    values = engine.load()._asdict() | recent_ttft()._asdict()
    fields = {
        "model": worker.model.name,
        "slots": worker.model.slots,
        "frontends": worker.model.frontends,
        "state": worker.state,
        "metrics_address": worker.metrics_address,
        **{name: "" if value is None else value for name, value in values.items()},
    }
    pipeline = redis.pipeline(transaction=False)
    pipeline.hset(key, mapping=fields)  # type: ignore[arg-type]
    pipeline.hincrby(key, BEATS, 1)
    pipeline.expire(key, int(get_settings().lease_s) + 1)
    pipeline.sadd(keys.WORKERS, worker.id)
    pipeline.hget(key, DRAIN)
    return pipeline.execute()[-1] is not None


def deregister(redis: Redis, worker_id: str) -> None:
    """Takes the worker off the list; without Redis its heartbeat expires by itself."""
    try:
        redis.delete(keys.worker(worker_id))
        redis.srem(keys.WORKERS, worker_id)
    except RedisError as failure:
        log.warning("the worker is still listed for the length of a lease: %s", failure)


def listen_for_commands(
    worker_id: str, stop_job: Callable[[Attempt], None], drain: Callable[[], None]
) -> None:
    """For ever: stops the attempts that the control channel names, and drains on command.

    The next heartbeat and renewal of the leases make up for messages lost with a connection.
    """
    bus = connect_listener(get_settings().bus_url)
    while True:
        try:
            pubsub = bus.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
            with pubsub as subscription:
                subscription.subscribe(keys.control(worker_id))
                for message in subscription.listen():
                    command = message["data"]
                    if command == DRAIN.encode():
                        drain()
                    else:
                        _stop_attempt(command, stop_job)
        except RedisError as failure:
            log.warning("the control channel is disconnected, subscribing again: %s", failure)
            time.sleep(RECONNECT_S)


def _stop_attempt(command: bytes, stop_job: Callable[[Attempt], None]) -> None:
    try:
        stop_job(Attempt.parse(command))
    except DecodeError as unknown:
        log.warning("unknown command on the control channel: %s", unknown)
