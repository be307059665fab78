"""Parts that die or lose each other: what the client sees, with real signals and the sim engine."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

from tasks import keys
from tasks.app import make_ticket
from tests.conftest import SIM
from tests.stack import Stack, await_that, running, send

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}
SLOW_SIM = SIM | {"args": {"tokens-per-s": 20, "first-token-s": 0.05}}


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    with running(Stack(home, [SLOW_SIM], lease_s=3, keep_alive_s=1)) as stack:
        yield stack


class Client(threading.Thread):
    """A request on its way."""

    def __init__(self, stack: Stack, **body: Any) -> None:
        super().__init__()
        self.url, self.body = f"{stack.url}/v1/chat/completions", CHAT | body
        self.response: requests.Response
        self.start()

    def run(self) -> None:
        self.response = requests.post(self.url, json=self.body, timeout=60)

    def result(self) -> requests.Response:
        self.join(60)
        return self.response


def _running(stack: Stack, number: int = 1) -> None:
    await_that(lambda: stack.redis.zcard(keys.LEASES) == number)


def _worker(stack: Stack) -> Any:
    return next(p for p in stack.processes if p.log.name.startswith("worker"))


def _text(events: str) -> str:
    chunks = [
        orjson.loads(line[6:])
        for line in events.splitlines()
        if line.startswith("data: {") and "error" not in line
    ]
    return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


def test_a_killed_workers_job_is_done_by_another(stack: Stack) -> None:
    undisturbed = Client(stack).result().json()["choices"]
    client = Client(stack)
    _running(stack)
    _worker(stack).kill()
    stack.start_worker("sim")
    answer = client.result()
    assert answer.json()["choices"] == undisturbed
    assert answer.headers["x-sluice-attempts"] == "2"


def test_a_stream_whose_worker_died_ends_with_an_error_event(stack: Stack) -> None:
    client = Client(stack, stream=True, max_tokens=200)
    _running(stack)
    (log,) = [keys.log(_only_job(stack))]
    await_that(lambda: stack.redis.xlen(log) > 5)
    _worker(stack).kill()
    stack.start_worker("sim")
    events = client.result().text
    *_, error, done = [line for line in events.splitlines() if line.startswith("data: ")]
    assert orjson.loads(error[6:])["error"]["code"] == "stream_broken"
    assert done == "data: [DONE]"
    assert stack.redis.hget(keys.job(_only_job(stack)), "state") == b"failed"


def _only_job(stack: Stack) -> str:
    (key,) = stack.redis.keys(keys.job("*"))
    return str(key.decode().removeprefix(keys.JOB_PREFIX))


def test_a_request_that_kills_its_workers_is_given_up(stack: Stack) -> None:
    client = Client(stack, sim={"failure": "crash"})
    for _ in range(2):
        await_that(lambda: stack.processes[-1].popen.poll() == -signal.SIGKILL)
        stack.start_worker("sim")
    answer = client.result()
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "job_failed"
    stack.start_worker("sim")
    assert Client(stack).result().status_code == 200


def test_a_dead_engine_ends_its_worker_and_its_jobs_run_elsewhere(stack: Stack) -> None:
    bystander = Client(stack, max_tokens=60)
    _running(stack)
    worker = _worker(stack)
    with send(stack, CHAT | {"sim": {"failure": "die"}}):
        assert worker.popen.wait(10) == 1
    stack.processes.remove(worker)
    stack.start_worker("sim")
    answer = bystander.result()
    assert answer.status_code == 200
    assert answer.headers["x-sluice-attempts"] == "2"


def test_a_stopping_worker_finishes_what_it_can_and_hands_on_the_rest(stack: Stack) -> None:
    short, long = Client(stack, max_tokens=30), Client(stack, max_tokens=190)
    _running(stack, 2)
    worker = _worker(stack)
    worker.signal(signal.SIGTERM)
    stack.start_worker("sim")
    assert worker.popen.wait(12) == 0
    assert short.result().headers["x-sluice-attempts"] == "1"
    assert long.result().headers["x-sluice-attempts"] == "2"
    assert long.result().json()["usage"]["completion_tokens"] == 190


def test_lost_tickets_are_issued_again(stack: Stack) -> None:
    worker = _worker(stack)
    worker.signal(signal.SIGSTOP)
    client = Client(stack)
    backlog = keys.backlog("sim", "interactive")
    await_that(lambda: stack.redis.zcard(backlog) == 1)
    await_that(lambda: stack.redis.delete(keys.tickets("sim")), 5)
    worker.signal(signal.SIGCONT)
    assert client.result().status_code == 200


def test_a_doubled_ticket_does_nothing(stack: Stack) -> None:
    requests.post(f"{stack.url}/v1/chat/completions", json=CHAT, timeout=20)
    queue = keys.tickets("sim")
    stack.redis.lpush(queue, *[make_ticket("sim", f"ticket {n}") for n in range(3)])
    await_that(lambda: stack.redis.llen(queue) == 0)
    assert Client(stack).result().status_code == 200
    assert len(stack.redis.keys(keys.job("*"))) == 2


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
def test_cut_connections_lose_and_double_nothing(stack: Stack, kind: str) -> None:
    undisturbed = Client(stack, stream=True, max_tokens=100).result().text
    clients = [Client(stack, stream=True, max_tokens=100) for _ in range(8)]
    _running(stack, 8)
    log = keys.log(stack.redis.zrange(keys.LEASES, 0, 0)[0].decode())
    for entries in range(10, 60, 10):
        await_that(lambda: stack.redis.xlen(log) >= entries)  # noqa: B023 (awaited at once)
        stack.redis.client_kill_filter(_type=kind, skipme=True)
    for client in clients:
        assert _text(client.result().text) == _text(undisturbed)
        assert client.result().headers["x-sluice-attempts"] == "1"


def test_without_redis_requests_get_503_quickly_and_then_work_again(stack: Stack) -> None:
    redis = stack.processes[0]
    redis.kill()
    begun = time.monotonic()
    refused = requests.post(f"{stack.url}/v1/chat/completions", json=CHAT, timeout=20)
    assert time.monotonic() - begun < 5
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1
    assert requests.get(f"{stack.url}/health/ready", timeout=10).status_code == 503
    stack.start_redis()

    def works() -> bool:
        answer = requests.post(f"{stack.url}/v1/chat/completions", json=CHAT, timeout=20)
        return answer.status_code == 200

    await_that(works, timeout_s=20)
