"""Celery and kombu: the app, tickets, periodic tasks. Who consumes tickets is in celery_worker.py.

A Celery message of a model's queue is a ticket: it means "there is work for this model"; the work
itself is in the backlog. A lost ticket is issued again by the reaper, a doubled one finds
nothing to do; so none of Celery's redelivery is needed, and the settings below switch it off.

The API and the command line import this module; that loads nothing of Celery's worker.

Private interfaces in use: kombu's `Channel._get` (what Celery has published into memory) and
`channel.Message` (no acknowledgements).
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from celery import Celery, signals
from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport.virtual import Message
from kombu.utils.json import dumps
from redis import Redis
from redis.exceptions import RedisError

from tasks.contract import keys
from tasks.contract.connections import COMMAND_TIMEOUT_S, CONNECT_TIMEOUT_S
from tasks.contract.settings import get_settings

log = logging.getLogger(__name__)

# Name and arguments never change: an old worker drops tickets that it does not know.
TICKET = "sluice.ticket"
MAINTENANCE_QUEUE = "maintenance"
_ID = b"@ticket-id@"
# Between two looks at what is due; after an error, until the next try.
SHORTEST_LOOK_S = 0.02
LONGEST_LOOK_S = 1.0
# Workers are listed in Redis, not by Celery.
ALONE = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}


class _Ticket(Message):
    """A message without acknowledgement.

    Kombu accesses Redis for every acknowledgement, `no_ack` or not, and when Redis went away
    between delivery and acknowledgement, the error ended the worker.
    """

    def ack(self, multiple: bool = False) -> None:
        """Does nothing."""

    def reject(self, requeue: bool = False) -> None:
        """Does nothing: the reaper issues another ticket."""


class TicketAMQP(AMQP):  # type: ignore[misc]
    """Celery's messaging without acknowledgements: a lost ticket is issued again anyway.

    Saves two round trips per ticket, a quarter of the worker's own work for a request; and nothing
    is ever delivered twice after a timeout or a broken connection.
    """

    def TaskConsumer(self, channel: Any, **options: Any) -> Any:  # noqa: N802 (Celery's name)
        consumer = super().TaskConsumer(channel, **options, no_ack=True)
        consumer.channel.Message = _Ticket
        return consumer


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _leave_logging(**_options: Any) -> None:
    """Keeps Celery from setting up loggers of its own: logs.py configures them."""


@functools.cache
def get_celery() -> Celery:
    """The process's Celery app, on the queue's Redis."""
    settings = get_settings()
    app = Celery("sluice", broker=settings.redis_url, amqp=TicketAMQP)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        result_backend=None,
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0.05},
        task_default_queue=MAINTENANCE_QUEUE,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_transport_options={
            "global_keyprefix": keys.CELERY_PREFIX,
            "socket_timeout": COMMAND_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )
    return app


def make_ticket(model: str, ticket_id: str) -> bytes:
    """A message that notifies the model's workers of work, as Redis queues it.

    Queued by lua/submit.lua together with the job: publishing it through Celery cost a third of the
    API's time for a submission, and a round trip.
    """
    return _ticket_template(model).replace(_ID, ticket_id.encode())


@functools.cache
def _ticket_template(model: str) -> bytes:
    """What Celery publishes, captured with its in-memory transport."""
    queue = keys.ticket_queue(model)
    with Connection("memory://") as memory:  # type: ignore[no-untyped-call]
        app = get_celery()
        app.send_task(TICKET, (model,), queue=queue, connection=memory, task_id=_ID.decode())
        message = memory.default_channel._get(queue)  # noqa: SLF001
        return str(dumps(message)).encode()  # type: ignore[no-untyped-call]


class Schedule:
    """Sends each task whenever its interval has passed; one per process.

    Celery's beat goes by the host's clock: set back by an hour, it sends nothing for an hour. The
    time at which a message expires would be the host's too; instead, a task is not sent while it
    still waits in the queue, whoever has sent it. So no more than one round is ever caught up with.
    """

    def __init__(self, celery: Celery, redis: Redis, intervals_s: Mapping[str, float]) -> None:
        self._celery = celery
        self._redis = redis
        self._intervals_s = intervals_s
        # After a restart all is due.
        self._due_s = dict.fromkeys(intervals_s, time.monotonic())
        self._is_away = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="schedule", daemon=True)

    def start(self) -> None:
        """Begins to send."""
        self._thread.start()

    def stop(self) -> None:
        """Sends no more."""
        self._is_stopping = True
        if self._thread.is_alive():
            self._thread.join(2 * LONGEST_LOOK_S)

    def _run(self) -> None:
        while not self._is_stopping:
            wait_s = LONGEST_LOOK_S
            try:
                self._send_due()
                wait_s = min(self._due_s.values()) - time.monotonic()
            except (RedisError, OperationalError, OSError) as away:
                if not self._is_away:
                    log.warning("maintenance: Redis is away, no tasks are sent: %s", away)
                self._is_away = True
            except Exception:
                # Without this thread no job of a dead worker is handed on.
                log.exception("maintenance: tasks were not sent")
            time.sleep(min(max(wait_s, SHORTEST_LOOK_S), LONGEST_LOOK_S))

    def _send_due(self) -> None:
        due = [name for name, due_s in self._due_s.items() if due_s <= time.monotonic()]
        if not due:
            return
        waiting = self._waiting()
        for name in due:
            if name not in waiting:
                self._celery.send_task(name, queue=MAINTENANCE_QUEUE)
            self._due_s[name] = time.monotonic() + self._intervals_s[name]
        if self._is_away:
            log.info("maintenance: Redis is back")
        self._is_away = False

    def _waiting(self) -> set[str]:
        """The tasks in the queue that no worker has taken yet."""
        messages: Any = self._redis.lrange(keys.CELERY_PREFIX + MAINTENANCE_QUEUE, 0, -1)
        return {orjson.loads(message)["headers"]["task"] for message in messages}


class Periodic(NamedTuple):
    """A task, and about how often it runs."""

    name: str
    """In its messages. Never changes: another version drops tasks that it does not know."""
    run: Callable[[], None]
    interval_s: float


def run_periodically(tasks: Sequence[Periodic], threads: int, redis: Redis) -> int:
    """Runs each task at its interval until a signal; returns the exit code.

    Several processes may do so: they share one queue of tasks, on the Redis of the jobs.
    """
    celery = get_celery()
    for task in tasks:
        celery.task(task.run, name=task.name, shared=False)
    celery.conf.update(worker_redirect_stdouts=False)
    # In this process, with which it ends.
    schedule = Schedule(celery, redis, {task.name: task.interval_s for task in tasks})
    worker = celery.Worker(
        # Not before: both would import Celery's modules, and Python ends such a deadlock with an
        # error, of which this process died.
        ready_callback=lambda _consumer: schedule.start(),
        queues=[MAINTENANCE_QUEUE],
        pool_cls="threads",
        concurrency=threads,
        hostname="maintenance@%h",
        loglevel="WARNING",
        quiet=True,
        **ALONE,
    )
    worker.start()
    schedule.stop()
    return int(worker.exitcode or 0)
