"""Webhooks, against real receivers on loopback, SQLite and PostgreSQL."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import update
from standardwebhooks import Webhook, WebhookVerificationError

from db import migrate, writing
from db.models import JobRecord, WebhookAttempt, WebhookDelivery
from db.webhooks import attempts_of, claim_due, note_attempt
from deploy.redis_server import free_port
from tasks.errors import ConfigurationError, InvalidRequestError
from tasks.settings import Settings, get_settings
from tasks.webhooks import (
    RETRY_AFTER_S,
    Deliverer,
    Outcome,
    Sender,
    check_webhook,
    decide,
    make_event,
)
from tests.conftest import SIM
from tests.postgres import Postgres
from tests.stack import Stack, await_that, running, serving

OLD, NEW, OTHER = (f"whsec_{letter * 32}" for letter in "ABC")
SETTINGS = Settings(webhook_secrets=f"{OLD}, {NEW}", webhook_allow_private=True)
SENDER = Sender((OLD, NEW), allow_private=True)
LONG_AGO = datetime(2026, 11, 1, tzinfo=UTC)


class Receiver(ThreadingHTTPServer):
    """Answers with the statuses one after another, the last for ever; keeps what it got."""

    def __init__(self, *statuses: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses = list(statuses)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.respond: Callable[[Handler], None] = Handler.respond

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    def ids(self) -> Counter[str]:
        return Counter(headers["webhook-id"] for _, headers, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        self.server.respond(self)

    def respond(self) -> None:
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.send_header("location", self.server.url + "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def receiving(*statuses: int) -> AbstractContextManager[Receiver]:
    return serving(Receiver(*statuses or (204,)))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def database(database_url: str) -> str:
    migrate(database_url)
    return database_url


def add(database: str, url: str, *job_ids: str) -> None:
    """Jobs that have ended and whose users wait for a call."""
    job = {"tenant": "t", "model": "sim", "endpoint": "/v1/completions", "lane": "batch"}
    call = {"url": url, "type": "job.completed", "next_at": LONG_AGO}
    with writing(database) as session:
        session.add_all(JobRecord(id=i, created_at=LONG_AGO, **job) for i in job_ids)
        session.flush()
        session.add_all(WebhookDelivery(job_id=i, created_at=LONG_AGO, **call) for i in job_ids)


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


def send(url: str, sender: Sender = SENDER) -> Outcome:
    return sender.send("evt_1", url, b"{}", datetime.now(UTC))


def test_each_of_two_secrets_verifies_a_call(database: str, receiver: Receiver) -> None:
    add(database, receiver.url + "?a=b", "job_1")
    assert Deliverer(database, SETTINGS).deliver() == {"delivered": 1}
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


def test_a_call_that_fails_is_made_again_under_the_same_id(database: str) -> None:
    deliverer = Deliverer(database, SETTINGS)
    with receiving(500, 302, 200) as receiver:
        add(database, receiver.url, "job_1")
        assert [deliverer.deliver(), deliverer.deliver()] == [{"pending": 1}, {}]
        assert states(database, "job_1") == ("pending", True, [(1, 500)])
        make_due(database)
        assert deliverer.deliver() == {"pending": 1}
        make_due(database)
        assert [deliverer.deliver(), deliverer.deliver()] == [{"delivered": 1}, {}]
        assert receiver.ids() == {"evt_1": 3}
    assert states(database, "job_1") == ("delivered", False, [(1, 500), (2, 302), (3, 200)])


def test_a_receiver_that_is_gone_is_not_called_again(database: str) -> None:
    with receiving(410) as receiver:
        add(database, receiver.url, "job_1")
        assert Deliverer(database, SETTINGS).deliver() == {"disabled": 1}
    assert states(database, "job_1") == ("disabled", False, [(1, 410)])


def test_a_port_where_nobody_listens_is_tried_again(database: str) -> None:
    add(database, f"http://127.0.0.1:{free_port()}/", "job_1")
    before = datetime.now(UTC)
    assert Deliverer(database, SETTINGS).deliver() == {"pending": 1}
    delivery, (attempt,) = attempts_of(database, "job_1")
    assert delivery
    assert delivery.next_at
    assert (delivery.state, attempt.status_code) == ("pending", None)
    assert "ConnectError" in str(attempt.error)
    assert 4 < (delivery.next_at - before).total_seconds() < 10


def test_tries_go_on_for_about_a_day() -> None:
    failed = Outcome(500, None, 1)
    waits_s = []
    for attempt in range(1, len(RETRY_AFTER_S) + 1):
        state, wait_s = decide(failed, attempt)
        assert state == "pending"
        assert wait_s
        waits_s.append(wait_s)
    assert waits_s == sorted(waits_s)
    assert 22 * 3600 < sum(waits_s) < 26 * 3600
    assert decide(failed, len(RETRY_AFTER_S) + 1) == ("failed", None)


def drip(handler: Handler, is_over: threading.Event) -> None:
    """An answer whose head never ends."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
        while not is_over.wait(0.02):
            handler.wfile.write(b"x")
    except OSError:
        return


@pytest.mark.parametrize("is_dripping", [False, True])
def test_a_slow_receiver_is_left_in_time(receiver: Receiver, is_dripping: bool) -> None:
    is_over = threading.Event()
    slow = drip if is_dripping else lambda _, is_over: is_over.wait()
    receiver.respond = lambda handler: slow(handler, is_over) and None
    try:
        outcome = send(receiver.url, Sender((OLD,), allow_private=True, timeout_s=0.3))
    finally:
        is_over.set()
    assert outcome.error == "no answer within 0.3 s"
    assert 300 <= outcome.duration_ms < 5000


def test_an_endless_answer_is_not_read(receiver: Receiver) -> None:
    def respond(handler: Handler) -> None:
        handler.respond()
        try:
            while True:
                handler.wfile.write(bytes(1000))
        except OSError:
            return

    receiver.respond = respond
    assert send(receiver.url).status_code == 204


def test_redirects_are_not_followed() -> None:
    with receiving(307) as receiver:
        outcome = send(receiver.url)
        assert (outcome.status_code, outcome.is_delivered) == (307, False)
        assert len(receiver.requests) == 1


def test_a_broken_answer_is_an_error(receiver: Receiver) -> None:
    receiver.respond = lambda handler: handler.wfile.write(b"no HTTP\r\n\r\n") and None
    assert "RemoteProtocolError" in str(send(receiver.url).error)


def test_tls_is_verified_for_the_name(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssl

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -nodes -newkey rsa:2048 -keyout {key} -out {certificate}"
    extra = "-days 2 -subj /CN=x -addext subjectAltName=DNS:localhost"
    subprocess.run(f"{command} {extra}".split(), check=True, capture_output=True, timeout=30)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    receiver.socket = tls.wrap_socket(
        receiver.socket, server_side=True, do_handshake_on_connect=False
    )
    url = f"https://localhost:{receiver.server_port}/hook"
    assert "CERTIFICATE_VERIFY_FAILED" in str(send(url).error)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    sender = Sender((OLD,), allow_private=True)
    assert send(url, sender).status_code == 204
    assert receiver.requests[0][1]["host"] == f"localhost:{receiver.server_port}"
    assert "mismatch" in str(send(url.replace("localhost", "127.0.0.1"), sender).error)


def test_a_stored_name_that_is_private_is_not_called(database: str, receiver: Receiver) -> None:
    add(database, f"http://localhost:{receiver.server_port}/hook", "job_1")
    assert Deliverer(database, Settings(webhook_secrets=OLD)).deliver() == {"pending": 1}
    _, (attempt,) = attempts_of(database, "job_1")
    assert "not public" in str(attempt.error)
    assert states(database, "job_1") == ("pending", True, [(1, None)])
    assert receiver.requests == []


def test_a_proxy_of_the_environment_is_not_asked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    assert send(receiver.url).is_delivered


def test_nothing_is_sent_unsigned(database: str, receiver: Receiver) -> None:
    settings = Settings(webhook_allow_private=True)
    with pytest.raises(InvalidRequestError, match="SLUICE_WEBHOOK_SECRETS"):
        check_webhook(receiver.url, settings)
    add(database, receiver.url, "job_1")
    assert Deliverer(database, settings).deliver() == {"pending": 1}
    assert states(database, "job_1") == ("pending", True, [(1, None)])
    assert receiver.requests == []


def test_two_deliverers_at_once_call_once(database: str, receiver: Receiver) -> None:
    job_ids = [f"job_{number}" for number in range(50)]
    add(database, receiver.url, *job_ids)
    deliverers = [Deliverer(database, SETTINGS) for _ in range(2)]

    def work(deliverer: Deliverer) -> int:
        total = 0
        while states := deliverer.deliver():
            total += states.total()
        return total

    with ThreadPoolExecutor() as pool:
        assert sum(pool.map(work, deliverers)) >= 20

    def is_done() -> bool:
        # A round that finds the database busy for seconds leaves its work to the next.
        for deliverer in deliverers:
            deliverer.deliver()
        return {states(database, job_id)[0] for job_id in job_ids} == {"delivered"}

    await_that(is_done)
    assert receiver.ids() == {f"evt_{number}": 1 for number in range(50)}


def test_what_is_read_at_once_is_claimed_once(database: str) -> None:
    job_ids = [f"job_{number}" for number in range(40)]
    add(database, "http://x/", *job_ids)
    barrier = threading.Barrier(4)

    def claim(_: int) -> list[str]:
        barrier.wait(10)
        return [delivery.job_id for delivery in claim_due(database, 40, 60)]

    with ThreadPoolExecutor(4) as pool:
        claims = list(pool.map(claim, range(4)))
    assert Counter(i for claim in claims for i in claim) == Counter(job_ids)


def test_the_claim_of_a_dead_process_comes_back(database: str, receiver: Receiver) -> None:
    deliverer = Deliverer(database, SETTINGS)
    assert deliverer.deliver() == {}
    add(database, receiver.url, "job_1")
    assert len(claim_due(database, 5, 1.0)) == 1
    assert deliverer.deliver() == {}
    await_that(deliverer.deliver, 10)
    assert receiver.ids() == {"evt_1": 1}


def test_an_attempt_is_noted_once_and_only_of_a_delivery_that_exists(database: str) -> None:
    add(database, "http://x/", "job_1")

    def note(job_id: str, state: str) -> bool:
        attempt = WebhookAttempt(
            job_id=job_id, attempt=1, at=LONG_AGO, status_code=200, error=None, duration_ms=1
        )
        return note_attempt(database, attempt, state, None)

    assert note("job_1", "delivered")
    assert not note("job_1", "failed")
    assert not note("job_2", "delivered")
    assert states(database, "job_1") == ("delivered", False, [(1, 200)])
    assert attempts_of(database, "job_2") == (None, [])


def test_a_round_under_way_keeps_others_out(database: str, receiver: Receiver) -> None:
    is_over = threading.Event()

    def respond(handler: Handler) -> None:
        is_over.wait(10)
        handler.respond()

    receiver.respond = respond
    add(database, receiver.url, "job_1")
    deliverer = Deliverer(database, SETTINGS)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(deliverer.deliver)
        await_that(lambda: receiver.requests)
        make_due(database)
        assert deliverer.deliver() == {}
        is_over.set()
        assert first.result(10) == {"delivered": 1}


def test_calls_wait_while_the_database_is_away(
    postgres: Postgres, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tasks.webhooks")
    url = postgres.create_database()
    deliverer = Deliverer(url, SETTINGS)
    assert deliverer.deliver() == {}
    add(url, receiver.url, "job_1")
    postgres.stop()
    try:
        assert [deliverer.deliver() for _ in range(3)] == [{}, {}, {}]
    finally:
        postgres.start()
    assert deliverer.deliver() == {"delivered": 1}
    messages = [r.getMessage() for r in caplog.records if r.name == "tasks.webhooks"]
    assert [re.sub(r"\d+ ms", "0 ms", message)[:64] for message in messages] == [
        "webhooks: the database is away, calls wait: (psycopg.Operational",
        "webhooks: the database is back",
        "webhook evt_1: status 204 in attempt 1 after 0 ms, now delivered",
    ]


def test_the_event_of_a_job_has_a_fixed_id() -> None:
    later = LONG_AGO + timedelta(seconds=0.7)
    event_id, body = make_event("job_0af", "job.failed", later)
    assert (event_id, json.loads(body)["id"]) == ("evt_0af", "evt_0af")
    assert json.loads(body)["created_at"] == LONG_AGO.timestamp()


@pytest.mark.parametrize(
    "bad", ["hunter2", "whsec_", "whsec_hunter2*", "whsec_hunter2", f"{OLD},hunter2", "wh_QUJD"]
)
def test_a_bad_secret_stops_the_program_and_is_not_shown(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_WEBHOOK_SECRETS", bad)
    monkeypatch.setenv("SLUICE_PORT", "0")
    with pytest.raises(ConfigurationError, match=r"SLUICE_WEBHOOK_SECRETS=….*openssl") as refused:
        get_settings.__wrapped__()
    assert "SLUICE_PORT='0'" in str(refused.value)
    assert not re.search("hunter2|QUJD|AAAA", str(refused.value))


def test_secrets_are_not_in_the_settings_repr() -> None:
    assert SETTINGS.signing_secrets == (OLD, NEW)
    assert "whsec_" not in repr(SETTINGS)


@pytest.mark.parametrize(
    ("status", "is_private_allowed", "code", "words"),
    [
        (204, True, 0, "status 204 after "),
        (500, True, 1, "status 500 after "),
        (204, False, 2, "sluice: `webhook`: the URL's host is not public"),
    ],
)
def test_the_command_sends_a_test_event(
    status: int, is_private_allowed: bool, code: int, words: str
) -> None:
    env: dict[str, Any] = os.environ | {
        "SLUICE_WEBHOOK_SECRETS": OLD,
        "SLUICE_WEBHOOK_ALLOW_PRIVATE": str(is_private_allowed),
    }
    with receiving(status) as receiver:
        command = [sys.executable, "-m", "deploy.cli", "webhooks", "test", receiver.url]
        run = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert (run.returncode, words in run.stdout + run.stderr) == (code, True)
        for _, headers, body in receiver.requests:
            assert Webhook(OLD).verify(body, headers)["type"] == "webhook.test"
        assert len(receiver.requests) == is_private_allowed


@pytest.mark.parametrize(
    ("body", "wanted"),
    [({"max_tokens": 3}, "job.completed"), ({"max_tokens": -1}, "job.failed")],
)
def test_the_user_of_a_job_is_called_when_it_has_ended(
    home: Path, receiver: Receiver, body: dict[str, Any], wanted: str
) -> None:
    secrets = {"webhook_secrets": OLD, "webhook_allow_private": True}
    with running(Stack(home, [SIM], **secrets)) as stack:
        chat = {"messages": [{"role": "user", "content": "Hello"}]} | body
        job = {"endpoint": "/v1/chat/completions", "body": chat, "webhook": receiver.url}
        jobs = f"{stack.url}/v1/jobs"
        job_id = requests.post(jobs, json=job, timeout=10).json()["id"]
        log = f"{jobs}/{job_id}/webhook"
        await_that(lambda: requests.get(log, timeout=5).json().get("state") == "delivered")
        (attempt,) = requests.get(log, timeout=5).json()["attempts"]
        assert (attempt["status_code"], attempt["error"]) == (204, None)
        ((_, headers, sent),) = receiver.requests
        event = Webhook(OLD).verify(sent, headers)
        assert (event["type"], event["data"]) == (wanted, {"id": job_id})
        assert requests.get(f"{jobs}/job_x/webhook", timeout=5).status_code == 404
        # It may hold a secret.
        assert "/hook" not in stack.logs()
