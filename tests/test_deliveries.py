"""Which webhooks are called when: calls fail, processes stop or crash, SQL or Redis is away."""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
import redis
from sqlalchemy import update
from standardwebhooks import Webhook, WebhookVerificationError

from bench.postgres import Postgres
from bench.stack import await_that, slack
from db import migrate, writing
from db.models import JobRecord, WebhookAttempt, WebhookDelivery
from db.webhooks import Due, Noted, attempts_of, claim, due, note_attempts
from deploy.redis_server import free_port
from tasks.contract import keys
from tasks.contract.connections import connect
from tasks.contract.settings import Settings
from tasks.maintenance import deliveries, webhooks
from tasks.maintenance.deliveries import AT_ONE_RECEIVER, STOP_S, Deliverer, choose
from tasks.maintenance.webhooks import Sender
from tasks.queue import counts
from tasks.queue.counts import Counted
from tests.test_webhooks import (
    LONG_AGO,
    NEW,
    OLD,
    OTHER,
    SETTINGS,
    Handler,
    Receiver,
    receiving,
)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def database(database_url: str) -> str:
    migrate(database_url)
    return database_url


@contextmanager
def delivering(
    database: str, bus: redis.Redis, settings: Settings = SETTINGS
) -> Iterator[Deliverer]:
    """What maintenance runs; it ends in time, however its receivers are."""
    deliverer = Deliverer(settings.model_copy(update={"database_url": database}), bus)
    deliverer.start()
    try:
        yield deliverer
    finally:
        began_s = time.monotonic()
        deliverer.stop()
        assert time.monotonic() - began_s < 2 * STOP_S + slack(1)


def add(database: str, urls: dict[str, str]) -> None:
    """Jobs that have ended and whose users wait for a call."""
    job = {"tenant": "t", "model": "sim", "endpoint": "/v1/completions", "lane": "batch"}
    call: dict[str, Any] = {"type": "job.completed", "created_at": LONG_AGO, "next_at": LONG_AGO}
    with writing(database) as session:
        session.add_all(JobRecord(id=i, created_at=LONG_AGO, **job) for i in urls)
        session.flush()
        session.add_all(
            WebhookDelivery(job_id=i, url=url, receiver=urlsplit(url).netloc, **call)
            for i, url in urls.items()
        )


def make_due(database: str) -> None:
    with writing(database) as session:
        is_pending = WebhookDelivery.state == "pending"
        session.execute(update(WebhookDelivery).where(is_pending).values(next_at=LONG_AGO))


def states(database: str, job_id: str) -> tuple[str, bool, list[tuple[int, int | None]]]:
    """State, whether it is tried again, and the attempts with their statuses."""
    delivery, attempts = attempts_of(database, job_id)
    assert delivery
    assert delivery.attempts == len(attempts)
    tries = [(attempt.attempt, attempt.status_code) for attempt in attempts]
    return delivery.state, delivery.next_at is not None, tries


def await_tries(database: str, job_id: str, number: int) -> None:
    await_that(lambda: len(attempts_of(database, job_id)[1]) == number)


def counted(bus: redis.Redis) -> dict[str, int]:
    """The results of calls, as the metrics count them."""
    found = counts.read(bus.hgetall(keys.COUNTS))  # type: ignore[arg-type]
    return {what.value: times for what, times in found.items() if what.what is Counted.WEBHOOKS}


def test_each_of_two_secrets_verifies_a_call(
    database: str, bus: redis.Redis, receiver: Receiver
) -> None:
    add(database, {"job_1": receiver.url + "?a=b"})
    with delivering(database, bus):
        await_tries(database, "job_1", 1)
    ((path, headers, body),) = receiver.requests
    event = {
        "id": "evt_1",
        "object": "event",
        "type": "job.completed",
        "created_at": int(LONG_AGO.timestamp()),
        "data": {"id": "job_1"},
    }
    assert Webhook(OLD).verify(body, headers) == Webhook(NEW).verify(body, headers) == event
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(NEW).verify(body.replace(b"job_1", b"job_2"), headers)
    assert path == "/hook?a=b"
    assert headers["webhook-id"] == "evt_1"
    assert headers["content-type"] == "application/json"
    assert headers["user-agent"] == "sluice"
    assert headers["host"] == f"127.0.0.1:{receiver.server_port}"
    assert states(database, "job_1") == ("delivered", False, [(1, 204)])


def test_a_call_that_fails_is_made_again_under_the_same_id(
    database: str, bus: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None is made before the test has it due.
    monkeypatch.setattr(webhooks, "RETRY_AFTER_S", (3600, 3600))
    with receiving(500, 302, 200) as receiver, delivering(database, bus):
        add(database, {"job_1": receiver.url})
        await_tries(database, "job_1", 1)
        assert states(database, "job_1") == ("pending", True, [(1, 500)])
        make_due(database)
        await_tries(database, "job_1", 2)
        make_due(database)
        await_tries(database, "job_1", 3)
        assert receiver.ids() == {"evt_1": 3}
    assert states(database, "job_1") == ("delivered", False, [(1, 500), (2, 302), (3, 200)])
    assert counted(bus) == {"pending": 2, "delivered": 1}


def test_a_call_is_not_made_again_at_once_where_the_hosts_clock_is_behind(
    database: str, bus: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) - timedelta(hours=12)

    monkeypatch.setattr("tasks.maintenance.deliveries.datetime", Behind)
    began = datetime.now(UTC)
    with receiving(500, 500) as receiver, delivering(database, bus):
        add(database, {"job_1": receiver.url})
        await_that(lambda: attempts_of(database, "job_1")[1])
        delivery, _ = attempts_of(database, "job_1")
    assert delivery
    assert delivery.next_at
    assert 4 < (delivery.next_at - began).total_seconds() < 300


def test_a_receiver_that_is_gone_is_not_called_again(database: str, bus: redis.Redis) -> None:
    with receiving(410) as receiver, delivering(database, bus):
        add(database, {"job_1": receiver.url})
        await_tries(database, "job_1", 1)
    assert states(database, "job_1") == ("disabled", False, [(1, 410)])


def test_a_port_where_nobody_listens_is_tried_again(
    database: str, bus: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So long that what it takes to note the attempt does not count.
    monkeypatch.setattr(webhooks, "RETRY_AFTER_S", (500, 1000))
    add(database, {"job_1": f"http://127.0.0.1:{free_port()}/"})
    with delivering(database, bus):
        await_tries(database, "job_1", 1)
    delivery, (attempt,) = attempts_of(database, "job_1")
    assert delivery
    assert delivery.next_at
    assert (delivery.state, attempt.status_code) == ("pending", None)
    assert "ConnectError" in str(attempt.error)
    assert 400 < (delivery.next_at - attempt.at).total_seconds() < 1000


def test_a_stored_name_that_is_private_is_not_called(
    database: str, bus: redis.Redis, receiver: Receiver
) -> None:
    add(database, {"job_1": f"http://localhost:{receiver.server_port}/hook"})
    with delivering(database, bus, SETTINGS.model_copy(update={"webhook_allow_private": False})):
        await_tries(database, "job_1", 1)
    _, (attempt,) = attempts_of(database, "job_1")
    assert "not public" in str(attempt.error)
    assert states(database, "job_1") == ("pending", True, [(1, None)])
    assert receiver.requests == []


def test_two_processes_call_once(database: str, bus: redis.Redis, receiver: Receiver) -> None:
    job_ids = [f"job_{number}" for number in range(50)]
    add(database, dict.fromkeys(job_ids, receiver.url))
    with delivering(database, bus), delivering(database, bus):
        await_that(lambda: counted(bus) == {"delivered": 50})
    assert {states(database, i)[0] for i in job_ids} == {"delivered"}
    assert receiver.ids() == {f"evt_{number}": 1 for number in range(50)}
    assert counted(bus) == {"delivered": 50}


def test_what_is_read_at_once_is_claimed_once(database: str) -> None:
    job_ids = [f"job_{number}" for number in range(40)]
    add(database, dict.fromkeys(job_ids, "http://x/"))
    barrier = threading.Barrier(4)

    def work(_: int) -> list[str]:
        barrier.wait(120)
        return [claimed.delivery.job_id for claimed in claim(database, job_ids, 60)]

    with ThreadPoolExecutor(4) as pool:
        claims = list(pool.map(work, range(4)))
    assert Counter(i for claim in claims for i in claim) == Counter(job_ids)


def test_a_read_has_each_receivers_oldest_and_the_next_goes_on_behind(database: str) -> None:
    add(database, {f"job_{n}": f"http://r{n % 5}/" for n in range(20)})
    with writing(database) as session:
        oldest = update(WebhookDelivery).where(WebhookDelivery.job_id == "job_11")
        session.execute(oldest.values(next_at=LONG_AGO.replace(year=2025)))
        later = update(WebhookDelivery).where(WebhookDelivery.receiver == "r3")
        session.execute(later.values(next_at=LONG_AGO.replace(year=2036)))
    found = due(database, "", 2) + due(database, "r1", 2) + due(database, "r3", 2)
    assert [one.receiver for one in found] == ["r0", "r1", "r2", "r3", "r4"]
    assert [one.job_id for one in found if one.receiver in {"r1", "r3"}] == ["job_11", None]
    assert due(database, "r4", 2) == []


def test_places_are_shared_among_receivers() -> None:
    found = [Due("a", "1"), Due("b", "2"), Due("c", None), Due("d", "4")]

    def chosen(**busy: int) -> list[str]:
        return [one.receiver for one in choose(found, Counter(busy), places=40)]

    assert chosen() == ["a", "b", "d"]
    assert chosen(a=AT_ONE_RECEIVER) == ["b", "d"]
    # Half of them are for receivers that have none.
    assert chosen(a=1, x=18) == ["a", "b", "d"]
    assert chosen(a=1, x=19) == ["b", "d"]
    assert chosen(x=39) == ["a"]


def test_the_claim_of_a_dead_process_comes_back(
    database: str, bus: redis.Redis, receiver: Receiver
) -> None:
    add(database, {"job_1": receiver.url, "job_2": receiver.url})
    assert len(claim(database, ["job_1"], 3600)) == 1
    with delivering(database, bus):
        await_tries(database, "job_2", 1)
        assert receiver.ids() == {"evt_2": 1}
        make_due(database)  # as it is when its time is over
        await_tries(database, "job_1", 1)
    assert receiver.ids() == {"evt_1": 1, "evt_2": 1}


def test_an_attempt_is_noted_once_and_only_of_a_delivery_that_exists(database: str) -> None:
    add(database, dict.fromkeys(("job_1", "job_3"), "http://x/"))

    def noted(job_id: str, state: str) -> Noted:
        attempt = WebhookAttempt(
            job_id=job_id, attempt=1, at=LONG_AGO, status_code=200, error=None, duration_ms=1
        )
        return Noted(attempt, state, None)

    both = [noted("job_1", "delivered"), noted("job_2", "delivered")]
    assert note_attempts(database, both) == 1
    assert note_attempts(database, [noted("job_1", "failed"), noted("job_3", "disabled")]) == 1
    assert states(database, "job_1") == ("delivered", False, [(1, 200)])
    assert states(database, "job_3") == ("disabled", False, [(1, 200)])
    assert attempts_of(database, "job_2") == (None, [])


def test_calls_wait_while_the_database_is_away(
    postgres: Postgres,
    bus: redis.Redis,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call that was under way is neither made nor counted twice."""
    monkeypatch.setattr(deliveries, "Sender", partial(Sender, timeout_s=3600))
    caplog.set_level(logging.INFO, "tasks.maintenance.deliveries")
    is_over = threading.Event()

    def respond(handler: Handler) -> None:
        is_over.wait(240)
        handler.respond()

    receiver.respond = respond
    url = postgres.create_database()
    migrate(url)
    add(url, {"job_1": receiver.url})
    with delivering(url, bus):
        await_that(lambda: receiver.requests)
        postgres.stop()
        try:
            await_that(lambda: "calls wait" in caplog.text)
            is_over.set()
            await_that(lambda: "now delivered" in caplog.text)
        finally:
            postgres.start()
        await_that(lambda: counted(bus) == {"delivered": 1})
        add(url, {"job_2": receiver.url})
        await_that(lambda: counted(bus) == {"delivered": 2})
    assert receiver.ids() == {"evt_1": 1, "evt_2": 1}
    messages = [r.getMessage() for r in caplog.records if r.name == "tasks.maintenance.deliveries"]
    assert [re.sub(r"\d+ ms", "0 ms", message)[:48] for message in messages] == [
        "webhooks: the database is away, calls wait: (psy",
        "webhook evt_1: status 204 in attempt 1 after 0 m",
        "webhooks: the database is back",
        "webhook evt_2: status 204 in attempt 1 after 0 m",
    ]


def test_calls_go_on_while_redis_is_away(database: str, receiver: Receiver) -> None:
    away = connect(f"redis://127.0.0.1:{free_port()}")
    with delivering(database, away):
        for number in range(2):
            add(database, {f"job_{number}": receiver.url})
            await_tries(database, f"job_{number}", 1)
