"""When maintenance sends its tasks: whatever the host's clock says, and while Redis is away."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import orjson
import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError

from bench.stack import Process, Stack, await_that
from tasks.contract import keys
from tasks.contract.settings import Settings
from tasks.maintenance.main import periodic_tasks
from tasks.queue import celery_app
from tasks.queue.celery_app import MAINTENANCE_QUEUE, Schedule

QUEUE = keys.CELERY_PREFIX + MAINTENANCE_QUEUE


@pytest.fixture
def celery(server: Stack, bus: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Celery:
    """An app of the test's own Redis."""
    settings = Settings(redis_url=server.env["SLUICE_REDIS_URL"])
    monkeypatch.setattr(celery_app, "get_settings", lambda: settings)
    return celery_app.get_celery.__wrapped__()


@contextmanager
def scheduling(celery: Any, bus: redis.Redis, **intervals_s: float) -> Iterator[None]:
    schedule = Schedule(celery, bus, intervals_s)
    schedule.start()
    try:
        yield
    finally:
        schedule.stop()


def take(bus: redis.Redis) -> str | None:
    """The task that a worker would run next."""
    message: Any = bus.rpop(QUEUE)
    return message and str(orjson.loads(message)["headers"]["task"])


def test_tasks_keep_their_names() -> None:
    """During an update, maintenance of two versions takes tasks from one queue."""
    assert {task.name: task.run.__name__ for task in periodic_tasks(Settings())} == {
        "sluice.reap": "reap",
        "sluice.reissue_tickets": "reissue_tickets",
        "sluice.record_ledger": "record_ledger",
        "sluice.reconcile_jobs": "reconcile_jobs",
        "sluice.sweep_jobs": "sweep_jobs",
        "sluice.delete_old_jobs": "delete_old_jobs",
        "sluice.look_for_alerts": "check_alerts",
    }


def test_tasks_are_sent_in_time_after_the_hosts_clock_was_set_back(
    celery: Celery, bus: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind_s, real_s = 0.0, time.time

    class Now(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) - timedelta(seconds=behind_s)

    monkeypatch.setattr(time, "time", lambda: real_s() - behind_s)
    monkeypatch.setattr("celery.app.base.datetime", Now)
    with scheduling(celery, bus, reap=0.5):
        for _ in range(2):
            await_that(lambda: take(bus) == "reap")
        behind_s = 3600.0
        for _ in range(3):
            # Not an hour later.
            await_that(lambda: take(bus) == "reap", 60)


def test_a_task_is_not_sent_again_while_it_waits(celery: Celery, bus: redis.Redis) -> None:
    with scheduling(celery, bus, reap=0.1, record=0.2):
        await_that(lambda: bus.llen(QUEUE) == 2)
        time.sleep(1)
        assert bus.llen(QUEUE) == 2
        assert {take(bus), take(bus)} == {"reap", "record"}
        await_that(lambda: bus.llen(QUEUE) == 2)


def test_an_outage_is_told_once_and_caught_up_with_once(
    bus: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    class Broker:
        def __init__(self) -> None:
            self.is_away, self.tries = True, 0
            self.sent: Counter[str] = Counter()

        def send_task(self, name: str, **_options: Any) -> None:
            self.tries += 1
            if self.is_away:
                raise OperationalError("away")
            self.sent[name] += 1

    broker = Broker()
    caplog.set_level(logging.INFO, "tasks.queue.celery_app")
    with scheduling(broker, bus, often=0.05, rarely=60):
        await_that(lambda: broker.tries > 1)
        broker.is_away = False
        await_that(lambda: broker.sent["often"] > 1)
    assert broker.sent["rarely"] == 1
    messages = [r.getMessage() for r in caplog.records if r.name == "tasks.queue.celery_app"]
    assert messages == [
        "maintenance: Redis is away, no tasks are sent: away",
        "maintenance: Redis is back",
    ]


# Slow where the main thread builds its consumer; exits when another one imports what that imports.
IMPORTING = """
import os, sys, threading, time
from pathlib import Path

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "celery.worker.consumer":
            time.sleep(1)
        elif name.startswith("celery.events"):
            if threading.current_thread() is not threading.main_thread():
                os._exit(3)

sys.meta_path.insert(0, Watch())
from tasks.contract.connections import connect
from tasks.queue.celery_app import Periodic, run_periodically
task = Periodic("touch", Path(sys.argv[1]).touch, 0.1)
sys.exit(run_periodically([task], 1, connect(os.environ["SLUICE_REDIS_URL"])))
"""


def test_no_task_is_sent_while_celery_is_being_imported(server: Stack, tmp_path: Path) -> None:
    """Python ends a deadlock of two threads' imports with an error: maintenance died of it."""
    ran = tmp_path / "ran"
    command = [sys.executable, "-c", IMPORTING, str(ran)]
    process = Process(command, server.env, tmp_path / "maintenance.log")
    try:
        await_that(lambda: ran.exists() or process.popen.poll() is not None)
    finally:
        assert process.stop() == 0, process.log.read_text()
    assert ran.exists()
