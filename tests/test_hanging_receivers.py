"""Receivers and name servers that hang do not delay calls of others."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import requests

from bench.stack import Stack, await_that, running, slack
from db import migrate
from db.webhooks import Due, attempts_of, due
from tasks.maintenance import deliveries
from tasks.maintenance.deliveries import AT_ONE_RECEIVER
from tasks.maintenance.webhooks import TIMEOUT_S, Sender
from tests.conftest import SIM
from tests.test_deliveries import add, await_tries, counted, delivering, states
from tests.test_webhooks import STACK_SETTINGS, Handler, Receiver, receiving


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def database(database_url: str) -> str:
    migrate(database_url)
    return database_url


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call that hangs ends before the test does: who waited for one would wait for ever."""
    monkeypatch.setattr(deliveries, "Sender", partial(Sender, timeout_s=3600))


@contextmanager
def hanging() -> Iterator[int]:
    """The port of a receiver at every address of loopback; it takes calls and never answers."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        # The kernel takes the connections.
        listener.listen(4096)
        yield listener.getsockname()[1]


def many(kind: str, port: int) -> dict[str, str]:
    """1,000 calls of receivers that hang."""
    hosts = {"one": 1, "some": 254, "many": 1000}[kind]
    places = [f"127.0.{n % hosts // 250}.{n % hosts % 250 + 1}" for n in range(1000)]
    return {f"job_hangs_{n}": f"http://{place}:{port}/" for n, place in enumerate(places)}


@pytest.mark.parametrize("kind", ["one", "some", "many"])
def test_a_thousand_calls_that_hang_do_not_delay_others(
    database: str,
    bus: redis.Redis,
    receiver: Receiver,
    kind: str,
    patient: None,
    report: Callable[[str], None],
) -> None:
    with hanging() as port, delivering(database, bus):
        add(database, many(kind, port))
        delays_s = []
        for number in range(5):
            add(database, {f"job_{number}": receiver.url})
            began_s = time.monotonic()
            # The first while a thousand others begin, which takes a processor more than a second.
            await_that(lambda known=number: len(receiver.requests) > known, slack(60))
            delays_s.append(time.monotonic() - began_s)
        await_that(lambda: counted(bus).get("delivered") == 5)
        assert max(delays_s[1:]) < slack(TIMEOUT_S)
    report(f"{kind} hanging, others called after {', '.join(f'{d:.2f}' for d in delays_s)} s")


def test_a_receiver_is_called_by_few_at_once(
    database: str, bus: redis.Redis, receiver: Receiver, patient: None
) -> None:
    most, now, lock = [0], [0], threading.Lock()
    # Eight are let go when eight are there.
    eight = threading.Barrier(AT_ONE_RECEIVER, timeout=120)

    def respond(handler: Handler) -> None:
        with lock:
            now[0] += 1
            most.append(now[0])
        eight.wait()
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        handler.respond()

    receiver.respond = respond
    add(database, {f"job_{number}": receiver.url for number in range(64)})
    with delivering(database, bus):
        await_that(lambda: counted(bus) == {"delivered": 64})
    assert max(most) == AT_ONE_RECEIVER


@pytest.mark.parametrize("names", [20, 400])
def test_names_that_nobody_answers_for_do_not_delay_others(
    database: str,
    bus: redis.Redis,
    receiver: Receiver,
    names: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_over, ask = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        if b"silent" in (host if isinstance(host, bytes) else str(host).encode()):
            is_over.wait(240)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return ask(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    hang = {f"job_silent_{n}": f"http://silent-{n % names}.test:8000/" for n in range(names * 2)}
    try:
        with delivering(database, bus):
            add(database, hang)
            await_tries(database, "job_silent_0", 1)
            add(database, {"job_1": receiver.url})
            began_s = time.monotonic()
            allowed_s = slack(15)
            await_that(lambda: receiver.requests)
            # Then, or now: a load comes and goes.
            assert time.monotonic() - began_s < max(allowed_s, slack(15))
        _, (attempt,) = attempts_of(database, "job_silent_0")
        assert "no address of the host within 5 s" in str(attempt.error)
    finally:
        is_over.set()


def test_who_stops_gives_its_calls_back(database: str, bus: redis.Redis, patient: None) -> None:
    with hanging() as port:
        add(database, {"job_1": f"http://127.0.0.1:{port}/"})
        with delivering(database, bus):
            await_that(lambda: due(database, "", 5) == [])
        given_back = [Due(f"127.0.0.1:{port}", "job_1")]
        # Before the claim is over by itself.
        await_that(lambda: due(database, "", 5) == given_back, deliveries.HOLD_S / 2)
        assert states(database, "job_1") == ("pending", True, [])


def submit(stack: Stack, webhook: str) -> str:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    job = {"endpoint": "/v1/chat/completions", "body": chat, "webhook": webhook}
    return str(requests.post(f"{stack.url}/v1/jobs", json=job, timeout=60).json()["id"])


def test_receivers_that_hang_do_not_delay_a_good_one(
    home: Path, report: Callable[[str], None]
) -> None:
    with ExitStack() as opened, receiving() as good:
        urls = [f"http://127.0.0.1:{opened.enter_context(hanging())}/" for _ in range(60)]
        stack = opened.enter_context(running(Stack(home, [SIM], **STACK_SETTINGS)))
        for url in urls:
            submit(stack, url)
        delays_s = []
        for number in range(3):
            job = f"{stack.url}/v1/jobs/{submit(stack, good.url)}"
            requests.get(job, headers={"Prefer": "wait=60"}, timeout=120)
            ended_s = time.monotonic()
            await_that(lambda known=number: len(good.requests) > known, 100)
            delays_s.append(time.monotonic() - ended_s)
        report(f"60 hang, a good one is called after {max(delays_s):.2f} s at most")
        # It has waited for none of those that hang.
        assert max(delays_s) < slack(TIMEOUT_S)
