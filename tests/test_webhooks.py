"""Webhooks, against real receivers on loopback, SQLite and PostgreSQL."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from standardwebhooks import Webhook

from bench.stack import Stack, await_that, running, serving
from deploy.redis_server import free_port
from tasks.contract.errors import ConfigurationError, InvalidRequestError
from tasks.contract.settings import Settings, get_settings
from tasks.maintenance.webhooks import (
    RETRY_AFTER_S,
    Outcome,
    Sender,
    check_webhook,
    decide,
    make_event,
)
from tests.conftest import SIM

OLD, NEW, OTHER = (f"whsec_{letter * 32}" for letter in "ABC")
# Receivers of tests listen on any free port.
SETTINGS = Settings(
    webhook_secrets=f"{OLD}, {NEW}", webhook_allow_private=True, webhook_ports="1-65535"
)
STACK_SETTINGS: dict[str, Any] = {
    "webhook_secrets": OLD,
    "webhook_allow_private": True,
    "webhook_ports": "1024-65535",
}
SENDER = Sender(SETTINGS)
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
        """Logs nothing."""


def receiving(*statuses: int) -> AbstractContextManager[Receiver]:
    return serving(Receiver(*statuses or (204,)))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def send(url: str, sender: Sender = SENDER) -> Outcome:
    return asyncio.run(sender.send("evt_1", url, b"{}", datetime.now(UTC)))


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
        outcome = send(receiver.url, Sender(SETTINGS, timeout_s=0.3))
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
    sender = Sender(SETTINGS)
    assert send(url, sender).status_code == 204
    assert receiver.requests[0][1]["host"] == f"localhost:{receiver.server_port}"
    assert "mismatch" in str(send(url.replace("localhost", "127.0.0.1"), sender).error)


def test_a_proxy_of_the_environment_is_not_asked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    assert send(receiver.url).is_delivered


def name_server(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[object]:
    """Has every name have these addresses; the names that were asked for."""
    asked: list[object] = []

    def getaddrinfo(host: object, *_: object, **__: object) -> list[object]:
        asked.append(host)
        kind = socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
        return [(*kind, (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_what_is_called_is_the_address_that_was_checked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = name_server(monkeypatch, "127.0.0.1")
    assert send(f"http://moves.test:{receiver.server_port}/hook").is_delivered
    # A second answer might be another.
    assert asked == [b"moves.test"]
    assert receiver.requests[0][1]["host"] == f"moves.test:{receiver.server_port}"


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["127.0.0.1", "8.8.8.8"]])
def test_a_name_with_a_private_address_is_not_called(
    receiver: Receiver, addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name_server(monkeypatch, *addresses)
    sender = Sender(SETTINGS.model_copy(update={"webhook_allow_private": False}))
    outcome = send(f"http://moves.test:{receiver.server_port}/hook", sender)
    assert "not public" in str(outcome.error)
    assert receiver.requests == []


def test_nothing_is_sent_unsigned(receiver: Receiver) -> None:
    settings = SETTINGS.model_copy(update={"webhook_secrets": ""})
    with pytest.raises(InvalidRequestError, match="SLUICE_WEBHOOK_SECRETS"):
        check_webhook(receiver.url, settings)
    assert "SLUICE_WEBHOOK_SECRETS" in str(send(receiver.url, Sender(settings)).error)
    assert receiver.requests == []


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
        "SLUICE_WEBHOOK_PORTS": "1-65535",
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
    with running(Stack(home, [SIM], **STACK_SETTINGS)) as stack:
        chat = {"messages": [{"role": "user", "content": "Hello"}]} | body
        job = {"endpoint": "/v1/chat/completions", "body": chat, "webhook": receiver.url}
        jobs = f"{stack.url}/v1/jobs"
        refused = requests.post(jobs, json=job | {"webhook": "http://127.0.0.1:22"}, timeout=10)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "webhook")
        assert "1024-65535" in refused.text
        assert "SLUICE_WEBHOOK_PORTS" in refused.text
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
