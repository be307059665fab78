"""Down every error path goes something secret, and none of it comes out in a log."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
from websockets.sync.client import connect

from bench.postgres import Postgres
from bench.stack import Stack, await_that, running
from deploy.redis_server import free_port
from tasks.contract import keys
from tasks.contract.job import new_id
from tasks.maintenance.alerts import Alert
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, call

# In no case that a program would change, and in no word that it writes by itself.
MARK = "qz7f3a"
ADMIN_KEY = f"{MARK}-admin-key"
SIGNING = base64.b64encode(f"{MARK}-signs".encode()).decode()
QUERY = f"?{MARK}-query={MARK}-value"
PROMPT: dict[str, Any] = CHAT | {"messages": [{"role": "user", "content": f"{MARK}-prompt"}]}
HEADERS = {
    name: f"{MARK}-{name}" for name in ("X-Request-Id", "X-Own", "Cookie", "User-Agent", "Referer")
} | {"Authorization": f"Bearer {ADMIN_KEY}"}
MOST_BYTES = 50_000


@pytest.fixture
def stack(home: Path, postgres: Postgres) -> Iterator[Stack]:
    """With a secret in each setting that can hold one."""
    receiver = f"http://me:{MARK}-alerts@127.0.0.1:{free_port()}/{MARK}-alerts"
    stack = Stack(
        home,
        [SIM],
        admin_key=ADMIN_KEY,
        webhook_secrets=f"whsec_{SIGNING}",
        webhook_allow_private=True,
        webhook_ports="1024-65535",
        alert_webhook=receiver,
        database_url=postgres.create_database().replace("@", f":{MARK}-database@"),
        max_attempts=1,
        max_body_bytes=MOST_BYTES,
        lease_s=3,
        keep_alive_s=1,
    )
    # A user without a password is let in with any.
    stack.env["SLUICE_REDIS_URL"] = f"redis://default:{MARK}-redis@127.0.0.1:{stack.redis_port}/0"
    with running(stack) as stack:
        yield stack


def ask(stack: Stack, method: str, path: str, **options: Any) -> int:
    """The status of an answer to a request that has secrets wherever they fit."""
    headers = HEADERS | {"Idempotency-Key": f"{MARK}-{new_id()}"} | options.pop("headers", {})
    return call(stack, method, path + QUERY, headers=headers, **options).status_code


def get(stack: Stack, job_id: str) -> Any:
    return call(stack, "GET", f"/v1/jobs/{job_id}", headers=HEADERS).json()


def submit(stack: Stack, body: dict[str, Any], **wishes: Any) -> Any:
    job = {"endpoint": ENDPOINT, "body": body} | wishes
    return call(stack, "POST", "/v1/jobs", json=job, headers=HEADERS).json()


def chat(stack: Stack, **more: Any) -> int:
    return ask(stack, "POST", ENDPOINT, json=PROMPT | more)


def written(stack: Stack) -> dict[str, str]:
    """All logs, by their names."""
    return {log.name: log.read_text() for log in stack.home.rglob("*.log")}


def is_logged(stack: Stack, part: str, text: str) -> bool:
    """Whether any log of the part has the text."""
    return any(text in log for name, log in written(stack).items() if name.startswith(part))


def await_line(stack: Stack, part: str, text: str) -> None:
    await_that(lambda: is_logged(stack, part, text), 240, stack.logs)


def test_no_secret_is_in_a_log(stack: Stack, postgres: Postgres) -> None:
    begin_an_alert(stack)
    ask_for_what_is_refused(stack)
    break_the_socket(stack)
    end_jobs_badly(stack)
    break_records(stack)
    fill_redis(stack)
    lose_the_engine(stack)
    lose_the_database(stack, postgres)
    lose_redis(stack)
    stack.stop()
    logs = written(stack)
    assert {name.partition("-")[0] for name in logs} == {"redis", "api", "maintenance", "worker"}
    leaks = [
        f"{name}: {line}"
        for name, log in logs.items()
        for line in log.splitlines()
        if MARK in line.lower() or SIGNING in line
    ]
    assert not leaks, "\n".join(leaks)


def begin_an_alert(stack: Stack) -> None:
    """One that its receiver knows, and shall hear the end of."""
    alert = Alert("SluiceQueueDeep", "sim", "warning", "Deep.", since_s=1, told_s=2)
    stack.redis.set(keys.ALERTS, orjson.dumps([alert]))


def ask_for_what_is_refused(stack: Stack) -> None:
    """By the API itself, whatever the request is."""
    assert chat(stack, n=f"{MARK}-n") == 400
    assert chat(stack, model=f"{MARK}-model") == 404
    assert chat(stack, user=f"{MARK}-large" * MOST_BYTES) == 413
    for kind in "application/json", f"{MARK}-type":
        content = {"Content-Type": kind}
        assert ask(stack, "POST", ENDPOINT, data=f'{{"{MARK}-json', headers=content) == 400
    job = {"endpoint": ENDPOINT, "body": PROMPT, "webhook": f"http://me:{MARK}-hook@localhost/"}
    assert ask(stack, "POST", "/v1/jobs", json=job) == 400
    assert ask(stack, "GET", f"/v1/{MARK}-path") == 404
    assert ask(stack, "GET", f"/v1/jobs/{MARK}-job") == 404
    assert ask(stack, "GET", f"/v1/jobs/{MARK}-job/events") == 404
    assert ask(stack, "DELETE", ENDPOINT) == 405
    for wrong in (f"{MARK}-key", f"Bearer {MARK}-key", f"Bearer sk-{MARK}"):
        shown = {"Authorization": wrong}
        assert ask(stack, "GET", "/v1/admin/dead", headers=shown) == 401
        assert ask(stack, "POST", f"/v1/admin/models/{MARK}-model/pause", headers=shown) == 401
    assert ask(stack, "GET", f"/v1/admin/dead/{MARK}-job") == 404
    assert ask(stack, "GET", "/v1/models", headers={"X-Request-Id": f"{MARK}-id\x01"}) == 400


def break_the_socket(stack: Stack) -> None:
    with connect(f"ws{stack.url[4:]}{ENDPOINT}{QUERY}", additional_headers=HEADERS) as socket:
        for frame in (f'{{"{MARK}-frame', f"{MARK}-frame".encode() + b"\xff"):
            socket.send(frame)
            assert "error" in str(socket.recv(timeout=60))
            assert socket.recv(timeout=60) == "[DONE]"


def end_jobs_badly(stack: Stack) -> None:
    """By the engine, by their client, and by the clock; of each somebody wants to be told."""
    hook = f"http://127.0.0.1:{free_port()}/{MARK}-hook?{MARK}-hook"
    wishes = {"metadata": {f"{MARK}-key": f"{MARK}-value"}, "webhook": hook}
    assert chat(stack, sim={"failure": "error"}) == 500
    failed = submit(stack, PROMPT | {"sim": {"failure": "error"}}, **wishes)["id"]
    await_that(lambda: get(stack, failed)["status"] == "failed")
    stack.redis.sadd(keys.PAUSED, "sim")
    cancelled = submit(stack, PROMPT, **wishes)["id"]
    expired = submit(stack, PROMPT, deadline_s=0.1, **wishes)["id"]
    assert ask(stack, "POST", f"/v1/jobs/{cancelled}/cancel") == 200
    await_that(lambda: get(stack, expired)["status"] == "expired")
    stack.redis.srem(keys.PAUSED, "sim")
    for job in failed, cancelled, expired:
        await_line(stack, "maintenance", f"webhook {job.replace('job', 'evt')}")
    await_line(stack, "maintenance", "alerts not delivered")


def break_records(stack: Stack) -> None:
    """As no program of ours would write them."""
    record: dict[Any, Any] = {
        "state": "queued",
        "body": f"{MARK}-body",
        "metadata": f"{MARK}-metadata",
    }
    stack.redis.hset(keys.job("job_1"), mapping=record)
    assert ask(stack, "GET", "/v1/jobs/job_1") == 500
    stack.redis.delete(keys.job("job_1"))
    stack.redis.lpush(keys.job(f"{MARK}-list"), f"{MARK}-item")
    assert ask(stack, "GET", f"/v1/jobs/{MARK}-list") == 503
    assert ask(stack, "GET", f"/v1/jobs/{MARK}-list/events") == 503


def fill_redis(stack: Stack) -> None:
    stack.redis.config_set("maxmemory", 1)
    assert chat(stack) == 503
    assert ask(stack, "POST", "/v1/jobs", json={"endpoint": ENDPOINT, "body": PROMPT}) in {202, 503}
    stack.redis.config_set("maxmemory", 0)


def lose_the_engine(stack: Stack) -> None:
    """While it answers; its worker goes with it, and another one comes."""
    worker = stack.part("worker")
    assert chat(stack, sim={"failure": "die"}) >= 500
    assert worker.popen.wait(240)
    stack.processes.remove(worker)
    stack.start_worker("sim")
    await_that(lambda: chat(stack) == 200, 240, stack.logs)


def lose_the_database(stack: Stack, postgres: Postgres) -> None:
    postgres.stop()
    try:
        assert ask(stack, "GET", f"/v1/jobs/{MARK}-job") == 503
        assert ask(stack, "GET", "/v1/jobs", headers={"Prefer": f"{MARK}-wish"}) in {400, 503}
        assert chat(stack) == 200
        await_line(stack, "api", "database: ")
        await_line(stack, "maintenance", "the database is away")
    finally:
        postgres.start()


def lose_redis(stack: Stack) -> None:
    """While a job runs and its client reads, and before others are asked for."""
    body = PROMPT | {"stream": True, "max_tokens": 2000}
    url = stack.url + ENDPOINT + QUERY
    with requests.post(url, json=body, headers=HEADERS, stream=True, timeout=30) as answer:
        assert next(answer.iter_lines())
        stack.part("redis").kill()
        assert chat(stack) == 503
        assert ask(stack, "GET", f"/v1/jobs/{MARK}-job/events") == 503
        await_line(stack, "api", "Redis: ")
        await_line(stack, "worker", "trying again")
        await_line(stack, "maintenance", "Redis is away")
    # Without it a worker would not end in time.
    stack.start_redis()
