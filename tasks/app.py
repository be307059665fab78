"""The Celery app that the API, the GPU workers and maintenance share.

A Celery message of a model's queue is a ticket: it says "there is work for this model", the work
itself stands in the backlog. A lost ticket is issued again by the reaper, a doubled one finds
nothing to do; so none of Celery's redelivery is needed, and the settings below switch it off.
"""

import functools
from typing import Any

from celery import Celery, signals
from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport.virtual import Message
from kombu.utils.json import dumps

from tasks import keys
from tasks.connections import COMMAND_TIMEOUT_S, CONNECT_TIMEOUT_S
from tasks.settings import get_settings

# Name and arguments never change: an old worker drops tickets that it does not know.
TICKET = "sluice.ticket"
MAINTENANCE_QUEUE = "maintenance"
_ID = b"@ticket-id@"


class _Ticket(Message):
    """A message that the broker has forgotten once it is taken.

    Kombu asks Redis for every acknowledgement, `no_ack` or not, and when Redis went away between
    the taking and the asking, the error ended the worker.
    """

    def ack(self, multiple: bool = False) -> None:
        """Nothing to tell."""

    def reject(self, requeue: bool = False) -> None:
        """Nothing to tell: the reaper issues another."""


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
    """Keeps Celery from setting up loggers of its own: they write where logs.py says."""


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
    """A message that tells the model's workers that there is work, as Redis queues it.

    Queued by lua/submit.lua together with the job: publishing it through Celery cost a third of the
    API's time for a submission, and a round trip.
    """
    return _ticket_template(model).replace(_ID, ticket_id.encode())


@functools.cache
def _ticket_template(model: str) -> bytes:
    """What Celery publishes, written down by its transport in memory."""
    queue = keys.ticket_queue(model)
    with Connection("memory://") as memory:  # type: ignore[no-untyped-call]
        app = get_celery()
        app.send_task(TICKET, (model,), queue=queue, connection=memory, task_id=_ID.decode())
        message = memory.default_channel._get(queue)  # noqa: SLF001
        return str(dumps(message)).encode()  # type: ignore[no-untyped-call]
