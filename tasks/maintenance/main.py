"""Maintenance: a Celery worker with a schedule; jobs of dead workers, lost tickets, the ledger.

Threads beside it call webhooks (deliveries.py) and look for killed workers (gone_workers.py). Two
may run: every task is atomic in Redis or
SQL, and doing it twice changes nothing.
"""

import functools
import logging
import math
import os
import socket
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from db import reach
from db.jobs import delete_old
from tasks.contract import keys, logs, tracing
from tasks.contract.connections import connect
from tasks.contract.models import get_catalog
from tasks.contract.settings import Settings, get_settings
from tasks.contract.trouble import database_trouble, refuse_lasting, refuse_unusable
from tasks.maintenance.alerts import Alerter
from tasks.maintenance.deliveries import Deliverer
from tasks.maintenance.gone_workers import GoneWorkers
from tasks.maintenance.ledger import Recorder
from tasks.maintenance.reconciler import Reconciler
from tasks.maintenance.sweeper import Sweeper
from tasks.queue.celery_app import Periodic, run_periodically
from tasks.queue.jobs import TRACED_AS, Jobs

log = logging.getLogger(__name__)

REISSUE_INTERVAL_S = 2.0
LEDGER_INTERVAL_S = 1.0
RECONCILE_INTERVAL_S = 5.0
SWEEP_INTERVAL_S = 1.0
RETENTION_INTERVAL_S = 60.0
ALERT_INTERVAL_S = 5.0

# How long maintenance counts as alive after a round of the reaper.
SHOWN_ROUNDS = 5
LEAST_SHOWN_S = 10

# Work that can wait a little: where processors are few, requests go first.
NICENESS = 5

# Up to three may wait, for the database and the receiver of alerts; that must not stop the reaper.
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
    """Task: hands on jobs whose lease has expired, and records that maintenance is alive."""
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
    """Task: repairs jobs in a state that should never occur."""
    _sweeper().sweep()


@_with_database
def delete_old_jobs() -> None:
    """Task: deletes jobs that ended long ago from SQL."""
    settings = get_settings()
    if deleted := delete_old(settings.database_url, settings.job_retention_s):
        log.info("deleted %d old jobs", deleted)


def check_alerts() -> None:
    """Task: notifies the operator's webhook of problems, and of their end."""
    if get_settings().alert_webhook:
        _alerter().check()


def periodic_tasks(settings: Settings) -> list[Periodic]:
    """All that maintenance does again and again."""
    return [
        Periodic("sluice.reap", reap, settings.reap_interval_s),
        Periodic("sluice.reissue_tickets", reissue_tickets, REISSUE_INTERVAL_S),
        Periodic("sluice.record_ledger", record_ledger, LEDGER_INTERVAL_S),
        Periodic("sluice.reconcile_jobs", reconcile_jobs, RECONCILE_INTERVAL_S),
        Periodic("sluice.sweep_jobs", sweep_jobs, SWEEP_INTERVAL_S),
        Periodic("sluice.delete_old_jobs", delete_old_jobs, RETENTION_INTERVAL_S),
        Periodic("sluice.look_for_alerts", check_alerts, ALERT_INTERVAL_S),
    ]


def run() -> int:
    """Runs maintenance until a signal; returns the exit code."""
    settings = get_settings()
    logs.configure(settings)
    refuse_unusable(settings)
    tracing.get_tracer(TRACED_AS)
    try:
        reach(settings.database_url)
    except SQLAlchemyError as failure:
        # Only away: jobs of dead workers do not wait for it.
        refuse_lasting(database_trouble(failure, settings))
    os.nice(NICENESS)
    deliverer = Deliverer(settings, _jobs().backlog.redis)
    gone_workers = GoneWorkers(_jobs())
    deliverer.start()
    gone_workers.start()
    try:
        return run_periodically(periodic_tasks(settings), THREADS, _jobs().backlog.redis)
    finally:
        gone_workers.stop()
        deliverer.stop()
