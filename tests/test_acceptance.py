"""What was accepted is never forgotten: between the queue's refusals, SQL and equal keys."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import delete, select, update

from api.acceptance import Acceptance
from bench.stack import Stack
from db import jobs as records
from db import migrate, reading, writing
from db.dead import replace
from db.models import JobEvent, JobRecord, JobResult, LedgerEntry
from db.webhooks import attempts_of
from tasks.contract import keys
from tasks.contract.connections import connect
from tasks.contract.events import End, Entry, Kind, Position, Start
from tasks.contract.job import EnqueueOptions, Job, State, new_id
from tasks.contract.settings import Settings
from tasks.maintenance.accepted import enqueue, to_record
from tasks.maintenance.ledger import LONGEST_END_S, Recorder
from tasks.maintenance.reconciler import Reconciler
from tasks.queue import counts
from tasks.queue.backlog import Backlog
from tasks.queue.counts import Counted
from tasks.queue.jobs import Jobs
from tasks.queue.token_log import Addressed, append_arguments
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT

SETTINGS: dict[str, Any] = {"lease_s": 3, "max_attempts": 3}


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    """Redis alone; a test that wants an API starts it."""
    stack = Stack(home, [SIM], max_backlog=3)
    try:
        stack.start_redis()
        yield stack
    finally:
        stack.stop()
        stack.redis.close()


@pytest.fixture
def queue(stack: Stack) -> Iterator[Jobs]:
    client = connect(stack.env["SLUICE_REDIS_URL"])
    yield Jobs(client, client, Settings(**SETTINGS))
    client.close()


@pytest.fixture
def url(home: Path) -> str:
    url = f"sqlite:///{home / 'sluice.db'}"
    migrate(url)
    return url


def job(number: int = 0, **options: Any) -> JobRecord:
    """A job that was created `number` ms after the first."""
    created = 1_700_000_000_000 + number
    return JobRecord(
        **{
            "id": f"job_{created:012x}{new_id()[-20:]}",
            "tenant": "default",
            "model": "sim",
            "endpoint": ENDPOINT,
            "lane": "batch",
            "created_at": datetime.now(UTC),
            "request": b"{}",
        }
        | options
    )


def test_every_202_is_of_a_job_that_is_known_also_when_the_lane_fills(stack: Stack) -> None:
    stack.start_api()

    def post(number: int) -> requests.Response:
        return requests.post(
            f"{stack.url}/v1/jobs",
            json={"endpoint": ENDPOINT, "body": CHAT, "metadata": {"n": str(number % 10)}},
            headers={"Idempotency-Key": f"key {number % 10}"},
            timeout=30,
        )

    with ThreadPoolExecutor(40) as clients:
        answers = list(clients.map(post, range(200)))
    ids = {answer.json()["id"] for answer in answers if answer.status_code in (200, 202)}
    assert {answer.status_code for answer in answers} <= {200, 202, 503}
    assert ids
    for job_id in ids:
        assert requests.get(f"{stack.url}/v1/jobs/{job_id}", timeout=30).json()["id"] == job_id


def test_an_accepted_job_goes_on_above_the_attempts_that_its_log_knows(
    queue: Jobs, url: str
) -> None:
    """The logs' Redis had them yet; the queue's had lost all."""
    record = job(attempts=3_600_000)
    records.accept(url, [record])
    assert Reconciler(queue, url).reconcile() == 1
    claim = queue.backlog.claim("sim", "w")
    assert claim
    assert claim.attempt > 3_600_000


def test_one_jobs_trouble_does_not_stop_the_reconciler(queue: Jobs, url: str) -> None:
    """A key that a chat took meanwhile, and a lane that is full, held up all later jobs."""
    troubled = job(1, idempotency_key="k", fingerprint="f")
    others = [job(n, model=f"model {n % 2}") for n in range(2, 10)]
    records.accept(url, [troubled, *others])
    queue.backlog.redis.set(keys.idempotency("default", "k"), f"another {new_id()}")
    assert Reconciler(queue, url).reconcile() == 9
    assert None not in queue.backlog.snapshots([troubled.id, *(other.id for other in others)])


def test_what_two_reconcilers_have_missed_is_queued_again_by_one(queue: Jobs, url: str) -> None:
    """Both saw a job missing, and the second one counted a dispatch that was none."""
    accepted = [job(n) for n in range(3)]
    records.accept(url, accepted)
    one, other = Reconciler(queue, url), Reconciler(queue, url)
    lost, _ = one.find_lost("")
    lost_as_well, _ = other.find_lost("")
    assert one.queue_again(lost) == 3
    assert other.queue_again(lost_as_well) == 0
    stored = [records.load(url, record.id) for record in accepted]
    assert [record.dispatches for record in stored if record] == [2, 2, 2]


def test_the_reconciler_goes_round_in_slices_and_at_once_when_redis_has_lost_all(
    queue: Jobs, url: str, stack: Stack
) -> None:
    number, at_once = 60, 50
    records.accept(url, [job(n) for n in range(number)])
    reconciler = Reconciler(queue, url, at_once)
    assert reconciler.reconcile() == number
    queue.backlog.redis.flushall()
    assert reconciler.reconcile() == at_once
    assert reconciler.reconcile() == number - at_once
    assert reconciler.reconcile() == 0
    stack.wipe_redis()
    assert reconciler.reconcile() == number


def complete(queue: Jobs, record: JobRecord, *, with_answer: bool = True) -> None:
    enqueue(queue.backlog, record)
    claim = queue.backlog.claim(record.model, "w")
    assert claim
    if with_answer:
        start = Start(200, [("content-type", "application/json")], 0, claim.attempt)
        end = End(State.COMPLETED)
        pieces = [
            (Kind.START, start.encode()),
            (Kind.BODY, b'{"answer": 1}'),
            (Kind.END, end.encode()),
        ]
        entries = [
            Addressed(Entry(record.id, Position(claim.attempt, seq), kind, data), "")
            for seq, (kind, data) in enumerate(pieces)
        ]
        assert queue.log._append(**append_arguments(entries, Settings(**SETTINGS))) == []
    assert queue.backlog.finish(claim, State.COMPLETED)


def test_what_sql_does_not_have_yet_does_not_expire(queue: Jobs, url: str) -> None:
    """With the database away for longer than the retention, answers were gone."""
    record = job()
    records.accept(url, [record])
    complete(queue, record)
    redis = queue.backlog.redis
    places = [keys.job(record.id), keys.log(record.id)]
    assert [redis.ttl(key) for key in places] == [-1, -1]
    assert Recorder(queue, url).record() == 1
    assert all(0 < redis.ttl(key) <= Settings().log_retention_s for key in places)
    found = records.get(url, "default", record.id)
    assert found
    assert found[1]
    assert found[1].body == b'{"answer": 1}'


def _repairs(queue: Jobs) -> int:
    found: Any = queue.backlog.redis.hgetall(keys.COUNTS)
    return sum(n for what, n in counts.read(found).items() if what.what is Counted.REPAIRS)


def test_a_job_that_is_recorded_while_the_reconciler_looks_is_not_recorded_again(
    queue: Jobs, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = job()
    records.accept(url, [record])
    complete(queue, record)
    look = records.still_open

    def look_and_record(url: str, after: str, limit: int) -> dict[str, int]:
        found = look(url, after, limit)
        assert Recorder(queue, url).record() == 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(records, "still_open", look_and_record)
        assert Reconciler(queue, url).reconcile() == 0
    assert _repairs(queue) == 0
    assert queue.backlog.redis.xlen(keys.LEDGER) == 0
    with reading(url) as session:
        states = list(session.scalars(select(JobEvent.state).order_by(JobEvent.at)))
    assert states == ["in_progress", "completed"]


def test_an_end_that_sql_has_lost_is_recorded_again(queue: Jobs, url: str) -> None:
    """A database that was restored from a backup of before it."""
    record = job()
    records.accept(url, [record])
    complete(queue, record)
    recorder = Recorder(queue, url)
    assert recorder.record() == 1
    with writing(url) as session:
        session.execute(delete(LedgerEntry))
        session.execute(delete(JobResult))
        session.execute(update(JobRecord).values(completed_at=None, status="queued"))
    assert Reconciler(queue, url).reconcile() == 0
    assert _repairs(queue) == 1
    assert recorder.record() == 1
    assert records.still_open(url, "", 9) == {}


def _age_records(queue: Jobs) -> None:
    """Makes all records older than the end of a log may be late."""
    for record_id, fields in queue.backlog.redis.xrange(keys.LEDGER):
        at_us = int(fields[b"at_us"]) - (LONGEST_END_S + 1) * 1_000_000
        queue.backlog.redis.xdel(keys.LEDGER, record_id)
        queue.backlog.redis.xadd(keys.LEDGER, fields | {b"at_us": at_us})


def test_a_job_whose_answer_is_lost_is_not_called_completed_but_runs_again(
    queue: Jobs, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    accepted, chat = job(1), job(2)
    records.accept(url, [accepted])
    complete(queue, accepted, with_answer=False)
    complete(queue, chat, with_answer=False)
    _age_records(queue)
    Recorder(queue, url).record()
    found = records.get(url, "default", chat.id)
    assert found
    assert found[0].status == "failed"
    assert Reconciler(queue, url).reconcile() == 1
    claim = queue.backlog.claim("sim", "w")
    assert claim
    assert claim.job.id == accepted.id
    assert claim.attempt > 100


def test_a_job_that_ends_lost_calls_its_webhook_and_is_in_the_ledger(url: str) -> None:
    record = job(webhook="https://example.org/hook")
    records.accept(url, [record])
    assert records.end_lost(url, record.id, "cancelled", {"message": "cancelled"})
    assert not records.end_lost(url, record.id, "cancelled", {"message": "cancelled"})
    delivery, _ = attempts_of(url, record.id)
    assert delivery
    assert delivery.type == "job.cancelled"
    found = records.get(url, "default", record.id)
    assert found
    assert found[1]
    assert found[1].error == {"message": "cancelled"}


def test_a_dead_letter_is_tried_again_once_by_whoever_is_first(url: str) -> None:
    old = job(died_at=datetime.now(UTC))
    records.accept(url, [old])
    again = [job(n) for n in range(1, 9)]
    barrier = threading.Barrier(len(again))

    def retry(record: JobRecord) -> bool:
        barrier.wait()
        return replace(url, old.id, record)

    with ThreadPoolExecutor(len(again)) as operators:
        done = list(operators.map(retry, again))
    stored = [records.load(url, record.id) for record in again]
    assert [record is not None for record in stored] == done
    assert sum(done) == 1


def test_a_started_job_that_redis_has_lost_does_not_expire(queue: Jobs, url: str) -> None:
    late = job(1, deadline_s=0.0, started_at=datetime.now(UTC))
    never = job(2, deadline_s=0.0)
    records.accept(url, [late, never])
    Reconciler(queue, url).reconcile()
    assert [reaped.job_id for reaped in queue.backlog.reap()] == [never.id]
    claim = queue.backlog.claim("sim", "w")
    assert claim
    assert claim.job.id == late.id


def test_what_sql_has_ended_does_not_run_after_redis_lost_its_last_second(
    queue: Jobs, url: str, stack: Stack
) -> None:
    """One that was cancelled ran, and GET told of a completed one that it was queued."""
    done, waiting = [job(n) for n in range(5)], job(5)
    records.accept(url, [*done, waiting])
    for record in [*done, waiting]:
        enqueue(queue.backlog, record)
    claim = queue.backlog.claim("sim", "w")
    assert claim
    for record in done:
        assert records.end_lost(url, record.id, "completed", {"message": "none"})
    reconciler = Reconciler(queue, url)
    assert reconciler.reconcile() == 0
    states = [found and found.state for found in queue.backlog.snapshots([r.id for r in done])]
    assert states == [State.CANCELLED] * len(done)
    assert queue.backlog.renew([claim]) == [claim]
    (still,) = queue.backlog.snapshots([waiting.id])
    assert still
    assert still.state is State.QUEUED
    stack.start_api()
    shown = requests.get(f"{stack.url}/v1/jobs/{done[1].id}", timeout=30).json()
    assert shown["status"] == "completed"


def test_a_job_that_is_cancelled_while_it_is_queued_again_does_not_run(
    queue: Jobs, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.accept(url, [record := job()])
    insert = Backlog.queue

    def cancel_first(self: Backlog, *args: Any) -> None:
        """What another process does just before."""
        assert records.end_lost(url, record.id, "cancelled", {"message": "cancelled"})
        insert(self, *args)

    monkeypatch.setattr(Backlog, "queue", cancel_first)
    assert Reconciler(queue, url).reconcile() == 1
    (found,) = queue.backlog.snapshots([record.id])
    assert found
    assert found.state is State.CANCELLED


def test_a_key_whose_job_is_being_accepted_is_that_jobs(
    queue: Jobs, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first request was still under way, and the second one was told that it is a chat's."""
    options = EnqueueOptions(idempotency_key="k", fingerprint="f")
    jobs = [Job(new_id(), "sim", ENDPOINT, b"{}", options=options) for _ in range(2)]
    first, second = map(to_record, jobs)
    queue.backlog.reserve(jobs[0])
    load = records.load

    def load_just_before(url: str, job_id: str) -> JobRecord | None:
        found = load(url, job_id)
        if records.accept(url, [first]):
            enqueue(queue.backlog, first)
        return found

    monkeypatch.setattr(records, "load", load_just_before)
    acceptance = Acceptance(queue, url)
    acceptance.start()
    assert acceptance.accept(second) == first.id
