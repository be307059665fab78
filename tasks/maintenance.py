"""Maintenance: a Celery worker with a schedule; jobs of dead workers, lost tickets, the ledger.

A thread beside it calls webhooks (deliveries.py). Two may run: every task is atomic in Redis or
SQL, and doing it twice changes nothing.
"""

import functools
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from db import reach
from db.jobs import delete_old
from tasks import keys, logs
from tasks.alerts import Alerter
from tasks.app import MAINTENANCE_QUEUE, get_celery
from tasks.connections import connect
from tasks.deliveries import Deliverer
from tasks.jobs import Jobs
from tasks.ledger import Recorder
from tasks.models import get_catalog
from tasks.reconciler import Reconciler
from tasks.settings import get_settings
from tasks.sweeper import Sweeper
from tasks.trouble import database_trouble, refuse_lasting, refuse_unusable

log = logging.getLogger(__name__)

REISSUE_INTERVAL_S = 2.0
LEDGER_INTERVAL_S = 1.0
RECONCILE_INTERVAL_S = 5.0
SWEEP_INTERVAL_S = 1.0
RETENTION_INTERVAL_S = 60.0
ALERT_INTERVAL_S = 5.0

# Between two looks at what is due; after an error, until the next try.
SHORTEST_LOOK_S = 0.02
LONGEST_LOOK_S = 1.0

# How long maintenance counts as alive after a round of the reaper.
SHOWN_ROUNDS = 5
LEAST_SHOWN_S = 10

# Work that can wait a little: where processors are few, requests go first.
NICENESS = 5

# Up to three may wait, for the database and for who gets alerts; that must not stop the reaper.
THREADS = 5


@functools.cache
def _jobs() -> Jobs:
    settings = get_settings()
    return Jobs(connect(settings.redis_url), connect(settings.bus_url))


@functools.cache
def _recorder() -> Recorder:
    settings = get_settings()
    return Recorder(_jobs(), settings.database_url)


@functools.cache
def _reconciler() -> Reconciler:
    return Reconciler(_jobs(), get_settings().database_url)


@functools.cache
def _sweeper() -> Sweeper:
    return Sweeper(_jobs())


@functools.cache
def _alerter() -> Alerter:
    return Alerter(_jobs().backlog, get_catalog(), get_settings())


def reap() -> None:
    """Task: hands on jobs whose lease has expired, and shows that maintenance lives."""
    _jobs().reap()
    process = f"{socket.gethostname()}-{os.getpid()}"
    shown_s = math.ceil(SHOWN_ROUNDS * get_settings().reap_interval_s)
    _jobs().backlog.redis.set(keys.MAINTENANCE, process, ex=max(shown_s, LEAST_SHOWN_S))


def reissue_tickets() -> None:
    """Task: sends tickets for jobs that wait without one."""
    if issued := _jobs().reissue_tickets():
        log.warning("issued %d lost tickets again", issued)


def record_ledger() -> None:
    """Task: writes started and ended jobs to SQL."""
    _recorder().record()


def _with_database(task: Callable[[], None]) -> Callable[[], None]:
    """A task that may wait for the database, which is away at times: its next round has the work.

    A round that finds another one under way does nothing, so each task takes one thread at most.
    """
    busy = threading.Lock()

    @functools.wraps(task)
    def run_task() -> None:
        if not busy.acquire(blocking=False):
            return
        try:
            task()
        except SQLAlchemyError as away:
            log.warning("%s: the database is away: %s", task.__name__, away)
        finally:
            busy.release()

    return run_task


@_with_database
def reconcile_jobs() -> None:
    """Task: queues accepted jobs that Redis has lost."""
    if again := _reconciler().reconcile():
        log.warning("queued %d accepted jobs that Redis had lost", again)


def sweep_jobs() -> None:
    """Task: mends what no job should ever be."""
    _sweeper().sweep()


@_with_database
def delete_old_jobs() -> None:
    """Task: deletes jobs that ended long ago from SQL."""
    settings = get_settings()
    if deleted := delete_old(settings.database_url, settings.job_retention_s):
        log.info("deleted %d old jobs", deleted)


def look_for_alerts() -> None:
    """Task: tells the operator's webhook what is wrong, and when it is over."""
    if get_settings().alert_webhook:
        _alerter().look()


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


def run() -> int:
    """Runs maintenance until a signal; returns the exit code."""
    settings = get_settings()
    logs.configure(settings)
    refuse_unusable(settings)
    try:
        reach(settings.database_url)
    except SQLAlchemyError as failure:
        # Merely away: jobs of dead workers do not wait for it.
        refuse_lasting(database_trouble(failure, settings))
    os.nice(NICENESS)
    celery = get_celery()
    intervals_s = {}
    for task, interval_s in (
        (reap, settings.reap_interval_s),
        (reissue_tickets, REISSUE_INTERVAL_S),
        (record_ledger, LEDGER_INTERVAL_S),
        (reconcile_jobs, RECONCILE_INTERVAL_S),
        (sweep_jobs, SWEEP_INTERVAL_S),
        (delete_old_jobs, RETENTION_INTERVAL_S),
        (look_for_alerts, ALERT_INTERVAL_S),
    ):
        name = f"sluice.{task.__name__}"
        celery.task(task, name=name, shared=False)
        intervals_s[name] = interval_s
    celery.conf.update(worker_redirect_stdouts=False)
    # In this process, in which it dies too.
    schedule = Schedule(celery, _jobs().backlog.redis, intervals_s)
    schedule.start()
    worker = celery.Worker(
        queues=[MAINTENANCE_QUEUE],
        pool_cls="threads",
        concurrency=THREADS,
        hostname="maintenance@%h",
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    deliverer = Deliverer(settings, _jobs().backlog.redis)
    deliverer.start()
    worker.start()
    schedule.stop()
    deliverer.stop()
    return int(worker.exitcode or 0)
