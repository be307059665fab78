"""What was accepted is done once, whichever part fails; and a stream goes on where it was."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from sqlalchemy import select

from bench.postgres import Postgres
from bench.stack import Stack, await_that, running
from db import get_engine, reading
from db.models import JobRecord, JobResult, LedgerEntry
from tasks.contract import keys
from tasks.queue import counts
from tasks.queue.counts import Counted, Happening
from tests.conftest import SIM
from tests.test_jobs import (
    CHAT,
    ENDPOINT,
    STREAM,
    call,
    events,
    ids,
    repeated,
    submit,
    wait,
)
from tests.test_metrics import open_streams

JOBS = 250


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    slow = SIM | {"args": {"tokens-per-s": 40, "first-token-s": 0.05}}
    with running(Stack(home, [slow], lease_s=3, keep_alive_s=1)) as stack:
        yield stack


class Client(threading.Thread):
    """Submits its jobs, each with a key, until each has been accepted once."""

    def __init__(self, stack: Stack, numbers: range) -> None:
        super().__init__()
        self.stack, self.numbers = stack, numbers
        self.accepted: dict[int, str] = {}
        self.start()

    def run(self) -> None:
        for number in self.numbers:
            await_that(lambda: self._submit(number), 240)  # noqa: B023 (awaited at once)

    def _submit(self, number: int) -> bool:
        job = {"endpoint": ENDPOINT, "body": CHAT, "metadata": {"number": str(number)}}
        header = {"Idempotency-Key": f"number {number}"}
        port = random.choice(self.stack.api_ports)
        try:
            answer = requests.post(
                f"http://127.0.0.1:{port}/v1/jobs", json=job, headers=header, timeout=30
            )
        except requests.RequestException:
            return False
        if answer.status_code not in (200, 202):
            assert answer.status_code == 503, answer.text
            return False
        self.accepted[number] = answer.json()["id"]
        return True


def _completed(url: str) -> list[JobRecord]:
    with reading(url) as session:
        return list(session.scalars(select(JobRecord).where(JobRecord.status == "completed")))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_every_accepted_job_completes_once_whatever_fails(
    stack: Stack, kind: str, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{stack.home / 'sluice.db'}"
    if kind == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = stack.env["SLUICE_DATABASE_URL"] = postgres.create_database()
        stack.api_processes[0].kill_all()
        stack.api_ports.clear()
        stack.start_api()
        stack.processes[2].kill()
        stack.start_maintenance()
    api = stack.api_processes[-1]
    stack.start_api()
    clients = [Client(stack, range(start, JOBS, 4)) for start in range(4)]

    def accepted() -> int:
        return sum(len(client.accepted) for client in clients)

    await_that(lambda: accepted() > JOBS * 0.2)
    api.kill_all()
    stack.start_api(port=stack.api_ports[0])
    stack.api_ports.pop()
    await_that(lambda: accepted() > JOBS * 0.4)
    stack.wipe_redis()
    maintenance = next(p for p in reversed(stack.processes) if "maintenance" in p.log.name)
    await_that(lambda: accepted() > JOBS * 0.7)
    maintenance.kill()
    stack.start_maintenance()
    for client in clients:
        client.join(240)
    assert accepted() == JOBS
    await_that(lambda: len(_completed(url)) >= JOBS, 240, stack.logs)
    _assert_each_once(url, clients)
    get_engine(url).dispose()


def _assert_each_once(url: str, clients: list[Client]) -> None:
    wanted = {job_id: n for client in clients for n, job_id in client.accepted.items()}
    assert len(wanted) == JOBS
    with reading(url) as session:
        jobs = list(session.scalars(select(JobRecord)))
        results = list(session.scalars(select(JobResult)))
        ledger = Counter(session.scalars(select(LedgerEntry.job_id)))
    assert {job.id: int(job.meta["number"]) for job in jobs} == wanted
    assert {job.status for job in jobs} == {"completed"}
    assert {result.job_id for result in results} == set(wanted)
    assert {result.status_code for result in results} == {200}
    assert ledger == Counter(wanted.keys())


def test_a_job_is_queued_again_once_by_two_maintenance_processes(stack: Stack) -> None:
    worker = next(p for p in stack.processes if p.log.name.startswith("worker"))
    worker.kill()
    stack.start_maintenance()
    jobs = [submit(stack, CHAT)["id"] for _ in range(20)]
    stack.redis.flushall()
    await_that(lambda: stack.redis.zcard(keys.backlog("sim", "batch")) == 20)
    stack.start_worker("sim")
    with ThreadPoolExecutor(5) as pool:
        done = list(pool.map(lambda job_id: wait(stack, job_id).json(), jobs))
    assert {job["status"] for job in done} == {"completed"}
    happened = counts.read(stack.redis.hgetall(keys.COUNTS))
    assert happened[Happening(Counted.JOBS, "queued", "sim", "batch")] == 20
    assert happened[Happening(Counted.JOBS, "in_progress", "sim", "batch")] == 20


def test_a_client_that_waits_gets_an_error_when_redis_has_lost_its_request(stack: Stack) -> None:
    worker = next(p for p in stack.processes if p.log.name.startswith("worker"))
    worker.kill()
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(call, stack, "POST", ENDPOINT, json=STREAM)
        waiting = pool.submit(call, stack, "POST", ENDPOINT, json=CHAT)
        await_that(lambda: stack.redis.zcard(keys.backlog("sim", "interactive")) == 2)
        stack.redis.flushall()
        assert '"code":"job_lost"' in streamed.result().text
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "job_lost"


def test_who_follows_an_accepted_job_hears_its_answer_though_redis_had_lost_it(
    stack: Stack,
) -> None:
    """They were told that it was lost, or had ended with no error, before it was queued again."""
    stack.workers[0].kill()
    job_id = submit(stack, STREAM)["id"]
    with ThreadPoolExecutor(3) as pool:
        early = pool.submit(events, stack, job_id)
        await_that(lambda: stack.redis.zcard(keys.backlog("sim", "batch")) == 1)
        await_that(lambda: open_streams(stack) == 1)
        stack.redis.flushall()
        late = pool.submit(events, stack, job_id)
        waiting = pool.submit(wait, stack, job_id)
        await_that(lambda: stack.redis.zcard(keys.backlog("sim", "batch")) == 1)
        stack.start_worker("sim")
        streams = [early.result(), late.result()]
    whole = repeated(events(stack, job_id))
    assert len(ids(whole)) >= 5
    assert [repeated(text) for text in streams] == [whole, whole]
    assert waiting.result().status_code == 200
    assert waiting.result().json()["status"] == "completed"


def test_who_follows_a_job_that_ends_while_redis_lacks_it_hears_how(stack: Stack) -> None:
    stack.workers[0].kill()
    job_id = submit(stack, STREAM)["id"]
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(events, stack, job_id)
        await_that(lambda: open_streams(stack) == 1)
        stack.redis.flushall()
        late = pool.submit(events, stack, job_id)
        await_that(lambda: open_streams(stack) == 2)
        assert call(stack, "POST", f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        for text in (early.result(), late.result()):
            assert '"code":"job_cancelled"' in text
            assert "job_lost" not in text


def test_a_position_that_redis_has_lost_is_none_of_the_accepted_job(stack: Stack) -> None:
    stack.workers[0].kill()
    job_id = submit(stack, STREAM)["id"]
    stack.redis.flushall()
    path = f"/v1/jobs/{job_id}/events?starting_after=1-3"
    assert call(stack, "GET", path).status_code == 400


def test_a_stream_of_which_redis_has_lost_what_was_sent_does_not_begin_again(stack: Stack) -> None:
    """It was called lost, though it ran anew; followed on, its first words would come twice."""
    job_id = submit(stack, STREAM | {"max_tokens": 200})["id"]
    url = f"{stack.url}/v1/jobs/{job_id}/events"
    with requests.get(url, stream=True, timeout=120) as followed:
        lines = followed.iter_lines(decode_unicode=True)
        first = next(line for line in lines if '"role":"assistant"' in line)
        stack.workers[0].kill()
        stack.redis.flushall()
        stack.start_worker("sim")
        text = "\n".join([first, *lines])
    assert text.count('"role":"assistant"') == 1
    assert '"code":"stream_broken"' in text
    assert wait(stack, job_id).json()["status"] == "completed"
