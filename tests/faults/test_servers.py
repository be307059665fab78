"""Redis, SQL and API processes that are killed, stopped, full, read-only or reloaded."""

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from sqlalchemy import select

from bench.postgres import Postgres
from bench.stack import Stack, await_that, running, send, slack
from db import get_engine, reading
from db.models import LedgerEntry
from tasks.contract import keys
from tests.faults.clients import (
    ENDPOINT,
    LONGEST_S,
    Client,
    ask,
    await_tokens,
    chat,
    compare,
    paused,
)
from tests.faults.conftest import LEASE_S, SLOW_SIM, Fault
from tests.test_jobs import call, events, get, ids, submit, wait

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def outage_s(request: pytest.FixtureRequest) -> float:
    """How long a server stays away: shorter in `make test` than in `make faults`."""
    return float(request.config.getoption("--outage-s"))


def _await_status(stack: Stack, job_ids: list[str], status: str, timeout_s: float = 120) -> None:
    def states() -> list[str]:
        return [get(stack, job_id)["status"] for job_id in job_ids]

    await_that(lambda: set(states()) == {status}, timeout_s, states)


@contextmanager
def _meanwhile(ask_once: Callable[[], requests.Response]) -> Iterator[list[requests.Response]]:
    """Asks again and again while the block runs."""
    answers: list[requests.Response] = []
    done = threading.Event()

    def go_on() -> None:
        while not done.is_set():
            answers.append(ask_once())
            done.wait(0.5)

    asking = threading.Thread(target=go_on)
    asking.start()
    try:
        yield answers
    finally:
        done.set()
        asking.join()


@pytest.mark.parametrize("fault_kind", ["read-only", "full"])
def test_5_a_redis_that_takes_no_writes_for_a_while(
    stack: Stack, fault: Fault, fault_kind: str
) -> None:
    bodies = [chat(n, stream=True) for n in range(8)]
    expected = ask(stack, bodies)
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 10)
    fault.inflict(f"Redis {fault_kind} for 4 s")
    pause = threading.Event()
    if fault_kind == "read-only":
        stack.redis.replicaof("127.0.0.1", 1)
        pause.wait(4)
        ended_s = time.monotonic()
        stack.redis.replicaof("NO", "ONE")
    else:
        stack.redis.config_set("maxmemory", 1)
        refused = call(stack, "POST", ENDPOINT, json=chat(9))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        pause.wait(4)
        ended_s = time.monotonic()
        stack.redis.config_set("maxmemory", 0)
    compare(fault, clients, expected, ended_s)
    assert ask(stack, [chat(1)])[0]["usage"]["completion_tokens"] == 100
    assert len(stack.workers) == 1


@pytest.mark.parametrize("keeps_its_data", [True, False])
def test_6_redis_is_killed_and_comes_back(
    stack: Stack, fault: Fault, outage_s: float, keeps_its_data: bool
) -> None:
    bodies = [chat(n, max_tokens=200) for n in range(12)]
    streamed = [body | {"stream": True} for body in bodies]
    with paused(stack):
        accepted = [submit(stack, body)["id"] for body in streamed]
    await_that(lambda: stack.redis.zcard(keys.LEASES) == 12)
    await_that(lambda: stack.redis.xlen(keys.log(accepted[0])) > 10)
    fault.inflict(f"SIGKILL Redis, {'with' if keeps_its_data else 'without'} AOF")
    stack.part("redis").kill()
    with _meanwhile(lambda: call(stack, "POST", ENDPOINT, json=chat(1))) as answers:
        threading.Event().wait(outage_s)
    assert {answer.status_code for answer in answers} == {503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert max(answer.elapsed.total_seconds() for answer in answers) < slack(5)
    back_s = time.monotonic()
    if keeps_its_data:
        stack.start_redis()
    else:
        stack.wipe_redis()
    _await_status(stack, accepted, "completed")
    fault.recovery_s.append(time.monotonic() - back_s)
    texts = {n: wait(stack, job_id).json()["response"]["body"] for n, job_id in enumerate(accepted)}
    expected = ask(stack, bodies)
    for number, wanted in enumerate(expected):
        assert (
            texts[number]["choices"][0]["message"]["content"]
            == (wanted["choices"][0]["message"]["content"])
        )
        fault.tokens += 200


def test_7_a_post_while_redis_stalls_is_answered_and_its_key_makes_one_job(
    stack: Stack, fault: Fault
) -> None:
    redis = stack.part("redis")
    job = {"endpoint": ENDPOINT, "body": chat(1)}
    header = {"Idempotency-Key": "once"}
    fault.inflict("SIGSTOP Redis for 5 s")
    redis.signal(signal.SIGSTOP)
    begun_s = time.monotonic()
    resume = threading.Timer(5, lambda: redis.signal(signal.SIGCONT))
    resume.start()
    first = call(stack, "POST", "/v1/jobs", json=job, headers=header)
    assert time.monotonic() - begun_s < slack(8)
    assert first.status_code in (202, 503)
    resume.join()

    def accepted() -> requests.Response | None:
        again = call(stack, "POST", "/v1/jobs", json=job, headers=header)
        return again if again.status_code in (200, 202) else None

    await_that(accepted)
    again = accepted()
    assert again
    fault.recovery_s.append(time.monotonic() - begun_s - 5)
    if first.status_code == 202:
        assert first.json()["id"] == again.json()["id"]
    _await_status(stack, [again.json()["id"]], "completed")
    assert len(call(stack, "GET", "/v1/jobs").json()["data"]) == 1


@pytest.mark.parametrize("path", ["job", "chat"])
def test_10_a_stream_resumes_on_another_api_process_byte_for_byte(
    stack: Stack, fault: Fault, path: str
) -> None:
    stack.start_api()
    first, other = (f"http://127.0.0.1:{port}" for port in stack.api_ports)
    body = chat(1, stream=True)
    seen = b""
    with ExitStack() as answers:
        if path == "job":
            job_id = submit(stack, body)["id"]
        else:
            asked = requests.post(first + ENDPOINT, json=body, stream=True, timeout=30)
            job_id = answers.enter_context(asked).headers["x-sluice-job"]
        stream = requests.get(f"{first}/v1/jobs/{job_id}/events", stream=True, timeout=30)
        lines = answers.enter_context(stream).iter_lines(chunk_size=1, delimiter=b"\n\n")
        for line in lines:
            seen += line + b"\n\n" if line.startswith(b"id: ") else b""
            if seen.count(b"id: ") == 10:
                break
        fault.inflict("SIGKILL API")
        stack.api_processes[0].kill_all()
    last = ids(seen.decode())[-1]
    address = f"{other}/v1/jobs/{job_id}/events"
    killed_s = time.monotonic()
    with requests.get(address, headers={"Last-Event-ID": last}, stream=True, timeout=30) as rest:
        pieces = rest.iter_content(None)
        begin = next(pieces)
        fault.recovery_s.append(time.monotonic() - killed_s)
        rest_of_it = begin + b"".join(pieces)
    assert seen + rest_of_it.replace(b": keep-alive\n\n", b"") == _get(address).content
    stack.api_ports.pop(0)
    (expected,) = ask(stack, [chat(1)])
    answer = wait(stack, job_id).json()["response"]["body"]
    assert (
        answer["choices"][0]["message"]["content"] == (expected["choices"][0]["message"]["content"])
    )
    fault.tokens += 100


def test_12_clients_that_vanish_together_leave_nothing(home: Path, fault: Fault) -> None:
    # So slow that all of them run at once on any machine.
    model = SLOW_SIM | {"slots": 600, "args": {"tokens-per-s": 5}}
    with running(Stack(home, [model], lease_s=30, keep_alive_s=1)) as stack:
        ask(stack, [chat(1, max_tokens=2)])
        (api,) = psutil.Process(stack.api_processes[0].pid).children()
        body = chat(1, max_tokens=2000)
        with ThreadPoolExecutor(20) as pool:
            streams = [n % 2 == 0 for n in range(500)]
            clients = list(pool.map(lambda s: send(stack, body | {"stream": s}), streams))
        await_that(lambda: stack.redis.zcard(keys.LEASES) == 500)
        fault.inflict("500 clients vanish")
        gone_s = time.monotonic()
        for client in clients:
            client.close()
        await_that(lambda: stack.redis.zcard(keys.LEASES) == 0)
        fault.recovery_s.append(time.monotonic() - gone_s)
        (worker,) = stack.redis.keys(keys.worker("*"))
        await_that(lambda: stack.redis.hmget(worker, "running", "waiting") == [b"0", b"0"])
        await_that(
            lambda: requests.get(f"{stack.url}/health/live", timeout=9).json()["streams"] == 0
        )
        port = stack.api_ports[0]
        await_that(lambda: not [c for c in api.net_connections("tcp") if _is_client(c, port)])
        states = {stack.redis.hget(key, "state") for key in stack.redis.keys(keys.job("*"))}
        assert states == {b"cancelled", b"completed"}


def _is_client(connection: Any, port: int) -> bool:
    return bool(connection.laddr.port == port and connection.status != psutil.CONN_LISTEN)


def _get(url: str) -> requests.Response:
    return requests.get(url, timeout=30)


class Follower(threading.Thread):
    """Follows a job's events, over as many connections as it takes."""

    def __init__(self, stack: Stack, job_id: str) -> None:
        super().__init__(daemon=True)
        self.url = f"{stack.url}/v1/jobs/{job_id}/events"
        self.connections = 0
        self.seen: list[bytes] = []
        self.is_done = False
        self.start()

    def run(self) -> None:
        while not self.is_done:
            self.connections += 1
            try:
                self._follow()
            except requests.RequestException:
                threading.Event().wait(1)

    def _follow(self) -> None:
        last = next((e for e in reversed(self.seen) if e.startswith(b"id: ")), b"")
        headers = {"Last-Event-ID": last.split(b"\n")[0][4:].decode()} if last else {}
        with requests.get(self.url, headers=headers, stream=True, timeout=30) as stream:
            stream.raise_for_status()
            event: list[bytes] = []
            for line in stream.iter_lines():
                event = [*event, line] if line else event
                if not line and event:
                    self.is_done = event[-1] == b"data: [DONE]"
                    if event[0].startswith(b"id: "):
                        self.seen.append(b"\n".join(event))
                    event = []


def test_13_a_reload_under_200_streams_loses_no_token(home: Path, fault: Fault) -> None:
    model = SLOW_SIM | {"slots": 300, "args": {"tokens-per-s": 5, "max-num-seqs": 300}}
    with running(Stack(home, [model], lease_s=10, keep_alive_s=1)) as stack:
        tokens = 150
        bodies = [chat(n, stream=True, max_tokens=tokens) for n in range(200)]
        with paused(stack):
            jobs = [submit(stack, body)["id"] for body in bodies]
            followers = [Follower(stack, job_id) for job_id in jobs]
        await_that(lambda: all(len(f.seen) > 10 for f in followers))
        assert not any(follower.is_done for follower in followers)
        fault.inflict("SIGHUP API")
        stack.api_processes[0].signal(signal.SIGHUP)
        for follower in followers:
            follower.join(LONGEST_S)
            assert follower.is_done
        assert all(follower.connections > 1 for follower in followers)
        for job_id, follower in zip(jobs, followers, strict=True):
            known = [e for e in events(stack, job_id).split("\n\n") if e.startswith("id: ")]
            assert [event.decode() for event in follower.seen] == known
            fault.tokens += tokens


def test_16_the_database_is_away(
    home: Path, postgres: Postgres, fault: Fault, outage_s: float
) -> None:
    url = postgres.create_database()
    with running(Stack(home, [SLOW_SIM], database_url=url, lease_s=LEASE_S)) as stack:
        kept = submit(stack, chat(0, max_tokens=2))
        wait(stack, kept["id"])
        fault.inflict("PostgreSQL away")
        postgres.stop()
        try:
            job = {"endpoint": ENDPOINT, "body": chat(1, max_tokens=2)}
            with _meanwhile(lambda: call(stack, "POST", "/v1/jobs", json=job)) as answers:
                streamed = Client(stack, chat(2, stream=True))
                threading.Event().wait(outage_s)
                assert streamed.answer()["usage"]["completion_tokens"] == 100
            assert {answer.status_code for answer in answers} == {503}
            codes = {answer.json()["error"]["code"] for answer in answers}
            assert codes == {"database_unavailable"}
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
            assert "[DONE]" in events(stack, streamed.headers["x-sluice-job"])
        finally:
            postgres.start()
        back_s = time.monotonic()
        await_that(lambda: call(stack, "POST", "/v1/jobs", json=job).status_code == 202)
        fault.recovery_s.append(time.monotonic() - back_s)

        def recorded() -> set[str]:
            with reading(url) as session:
                return set(session.scalars(select(LedgerEntry.job_id)))

        await_that(lambda: streamed.headers["x-sluice-job"] in recorded())
        with postgres.paused():
            assert call(stack, "POST", "/v1/jobs", json=job).status_code == 503
            assert Client(stack, chat(2, stream=True, max_tokens=5)).answer()
    get_engine(url).dispose()


JUNK = ["", "x", "\0", "💥", "../../etc", "-1", "9" * 400, "null", "[]", "%00", "a" * 2000, "job_1"]


def _junk(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value, sometimes with the names that the API knows."""
    names = [
        "endpoint",
        "body",
        "model",
        "messages",
        "stream",
        "priority",
        "deadline_s",
        "metadata",
    ]
    names += ["webhook", "prompt", "max_tokens", "n", "stop", "message", "on_disconnect", "role"]
    match chance.randrange(7 if depth < 3 else 5):
        case 0:
            return chance.choice(JUNK)
        case 1:
            return chance.choice([0, -1, 2**70, 1e308, 0.5, True, False, None])
        case 2:
            return chance.choice([ENDPOINT, "batch", "interactive", "abort", "user", "sim"])
        case 3 | 4 | 5:
            picked = chance.sample(names, chance.randrange(5))
            return {name: _junk(chance, depth + 1) for name in picked}
        case _:
            return [_junk(chance, depth + 1) for _ in range(chance.randrange(4))]


def _malformed(stack: Stack, document: dict[str, Any], number: int) -> requests.Response:
    """A request to any operation of the OpenAPI document, with junk wherever junk fits."""
    chance = random.Random(number)
    path = chance.choice(sorted(document["paths"]))
    method = chance.choice([*document["paths"][path], "post", "get", "put", "delete"])
    for name in ("model_id", "job_id", "worker_id"):
        path = path.replace(f"{{{name}}}", requests.utils.quote(chance.choice(JUNK), safe=""))
    headers = {"Content-Type": chance.choice(["application/json"] * 5 + ["text/plain", "", "x/y"])}
    for name in ("Prefer", "Idempotency-Key", "Last-Event-ID", "x-sluice-on-disconnect"):
        if chance.random() < 0.2:
            value = chance.choice(["wait=-1", "wait=x", "1-1", "x" * 300, "0-0-0", "respond-async"])
            headers[name] = value
    query = {chance.choice(["limit", "status", "after", "x"]): chance.choice(JUNK)}
    body = chance.choice([json.dumps(_junk(chance)).encode(), b"{", b"\xff\xfe", b"[" * 5000, b""])
    return requests.request(
        *(method, stack.url + path), params=query, data=body, headers=headers, timeout=60
    )


def test_17_malformed_requests_break_nothing(home: Path, fault: Fault) -> None:
    fast = SLOW_SIM | {"args": {"tokens-per-s": 0, "first-token-s": 0, "length": 3}}
    with running(Stack(home, [fast], lease_s=LEASE_S, reap_interval_s=0.2)) as stack:
        document = requests.get(f"{stack.url}/docs/openapi.json", timeout=9).json()
        ask(stack, [chat(1)])
        (api,) = psutil.Process(stack.api_processes[0].pid).children()
        before = api.memory_info().rss
        with ThreadPoolExecutor(8) as pool:
            asked = list(pool.map(lambda n: _malformed(stack, document, n), range(1000)))
        fault.inflict("1000 malformed requests")
        refused = [answer for answer in asked if answer.status_code >= 500]
        assert not refused, [(r.request.method, r.request.url, r.text[:300]) for r in refused]
        assert sum(400 <= answer.status_code < 500 for answer in asked) > 500
        assert api.memory_info().rss - before < 30_000_000
        assert psutil.Process(stack.api_processes[0].pid).children() == [api]
        stack.check_alive()
        await_that(lambda: stack.redis.zcard(keys.LEASES) == 0)
        assert ask(stack, [chat(1)])[0]["usage"]["completion_tokens"] == 100
        for name in (keys.job("*"), keys.log("*")):
            await_that(lambda: all(stack.redis.ttl(key) > 0 for key in stack.redis.keys(name)))  # noqa: B023 (awaited at once)
