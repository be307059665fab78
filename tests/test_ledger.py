"""From the end of a job to its row in SQL: real Redis, SQLite and PostgreSQL, real maintenance."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.postgres import Postgres
from bench.stack import Stack, await_that
from db import jobs, reading
from db.jobs import Change
from db.models import JobResult
from tasks.contract import keys
from tasks.contract.connections import connect
from tasks.contract.events import End, Entry, Kind, Position, Start
from tasks.contract.job import Claim, Job, State
from tasks.contract.job_errors import JobCancelledError
from tasks.contract.settings import Settings
from tasks.maintenance import dead_letters as dead
from tasks.maintenance.ledger import RECORDS_AT_ONCE, Recorder
from tasks.queue.backlog import Backlog, load_script
from tasks.queue.jobs import Jobs
from tasks.queue.token_log import Addressed, TokenLog, append_arguments
from tests.conftest import SIM
from tests.test_db import entries

SETTINGS: dict[str, Any] = {"lease_s": 3, "max_attempts": 1}
JOB_CANCELLED = End(State.CANCELLED, JobCancelledError().body())


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    """Redis alone; a test that wants maintenance starts it."""
    stack = Stack(home, [SIM], **SETTINGS)
    try:
        stack.start_redis()
        yield stack
    finally:
        stack.stop()
        stack.redis.close()


@pytest.fixture
def backlog(stack: Stack) -> Iterator[Backlog]:
    client = connect(stack.env["SLUICE_REDIS_URL"])
    yield Backlog(client, Settings(**SETTINGS))
    client.close()


def submit(backlog: Backlog) -> Job:
    job = Job.create(model="sim", endpoint="/v1/completions", body=b"{}")
    backlog.submit(job)
    return job


def test_a_dead_letter_of_a_chat_takes_as_many_slots_when_it_is_tried_again(
    backlog: Backlog, database_url: str
) -> None:
    job = Job.create(model="sim", endpoint="/v1/completions", body=b"{}", sequences=3)
    backlog.submit(replace(job, weight=2.5, max_tokens=8))
    claim = backlog.claim("sim", "worker", free_slots=3)
    assert claim
    assert backlog.finish(claim, State.FAILED, "the engine failed on its last attempt too")
    end_log(backlog, claim.job.id, State.FAILED)
    recorder_of(backlog, database_url).record()
    queue = Jobs(backlog.redis, backlog.redis, Settings(**SETTINGS))
    again = dead.retry(queue, database_url, claim.job.id)
    found: Any = backlog.redis.hmget(keys.job(again), "sequences", "weight", "max_tokens")
    assert found == [b"3", b"2.5", b"8"]


def run(backlog: Backlog) -> Claim:
    submit(backlog)
    claim = backlog.claim("sim", "worker")
    assert claim
    return claim


def end_log(backlog: Backlog, job_id: str, state: State) -> str:
    """The end of the job's log, as who ends a job writes it."""
    TokenLog(backlog.redis, Settings(**SETTINGS)).end(job_id, 1, End(state), "")
    return job_id


def recorder_of(backlog: Backlog, url: str) -> Recorder:
    return Recorder(Jobs(backlog.redis, backlog.redis, Settings(**SETTINGS)), url)


def complete(backlog: Backlog) -> str:
    claim = run(backlog)
    assert backlog.finish(claim, State.COMPLETED)
    return end_log(backlog, claim.job.id, State.COMPLETED)


def cancel(backlog: Backlog) -> str:
    job = submit(backlog)
    assert backlog.cancel(job.id)
    return end_log(backlog, job.id, State.CANCELLED)


def abandon(backlog: Backlog) -> str:
    """A job whose worker goes away; its last attempt, so that the reaper fails it."""
    claim = run(backlog)
    backlog.redis.zadd(keys.LEASES, {claim.job.id: 1})
    return claim.job.id


def test_each_end_of_a_job_is_recorded(backlog: Backlog, database_url: str) -> None:
    ends = {
        complete(backlog): ("completed", 1, True),
        cancel(backlog): ("cancelled", 0, False),
        abandon(backlog): ("failed", 1, True),
    }
    (reaped,) = backlog.reap()
    end_log(backlog, reaped.job_id, State.FAILED)
    assert recorder_of(backlog, database_url).record() == 3
    rows = entries(database_url)
    assert {e.job_id: (e.state, e.attempts, e.started_at is not None) for e in rows} == ends
    for row in rows:
        job: Any = backlog.redis.hgetall(keys.job(row.job_id))
        for name in ("queued", "started", "ended"):
            moment = getattr(row, f"{name}_at")
            us = job.get(f"{name}_us".encode())
            assert (us and int(us)) == (moment and round(moment.timestamp() * 1e6))
        assert (row.model, row.tenant, row.lane) == ("sim", "default", "interactive")
        assert row.endpoint == "/v1/completions"
    assert backlog.redis.xlen(keys.LEDGER) == 0


def test_what_the_database_cannot_hold_does_not_hold_up_the_others(
    backlog: Backlog, database_url: str
) -> None:
    odd, sound = run(backlog), run(backlog)
    for claim in (odd, sound):
        assert backlog.finish(claim, State.COMPLETED)
        end_log(backlog, claim.job.id, State.COMPLETED)
    for record_id, fields in backlog.redis.xrange(keys.LEDGER):
        if fields[b"job_id"].decode() == odd.job.id:
            backlog.redis.xdel(keys.LEDGER, record_id)
            backlog.redis.xadd(keys.LEDGER, fields | {b"attempts": 2**63})
    recorder_of(backlog, database_url).record()
    assert sound.job.id in {entry.job_id for entry in entries(database_url)}
    assert backlog.redis.xlen(keys.LEDGER) == 0


def test_a_job_that_was_cancelled_at_its_end_is_recorded_with_the_end_that_counts(
    backlog: Backlog, database_url: str
) -> None:
    claim = run(backlog)
    end_log(backlog, claim.job.id, State.COMPLETED)  # and then its worker would finish it
    assert backlog.cancel(claim.job.id)
    assert recorder_of(backlog, database_url).record() == 0
    TokenLog(backlog.redis, Settings(**SETTINGS)).end(claim.job.id, 2, JOB_CANCELLED, "")
    assert recorder_of(backlog, database_url).record() == 1
    with reading(database_url) as session:
        result = session.get(JobResult, claim.job.id)
    assert result
    assert result.body is None
    assert result.error["code"] == "job_cancelled"


def test_a_void_end_is_not_recorded(backlog: Backlog) -> None:
    claim = run(backlog)
    backlog.redis.delete(keys.LEDGER)
    assert backlog.finish(claim, State.COMPLETED)
    assert not backlog.finish(claim, State.FAILED)
    assert backlog.cancel(claim.job.id) is None
    assert backlog.redis.xlen(keys.LEDGER) == 1


def test_a_job_that_is_handed_on_has_not_ended(backlog: Backlog) -> None:
    patient = Backlog(backlog.redis, Settings(lease_s=3, max_attempts=2))
    abandon(patient)
    backlog.redis.delete(keys.LEDGER)
    assert len(patient.reap()) == 1
    ((_, record),) = backlog.redis.xrange(keys.LEDGER)
    assert record[b"state"] == b"queued"
    assert record[b"reason"] == b"worker worker fell silent"


def test_one_round_moves_all_records(backlog: Backlog, database_url: str) -> None:
    number = 2 * RECORDS_AT_ONCE + 1
    ids = {cancel(backlog) for _ in range(number)}
    assert recorder_of(backlog, database_url).record() == number
    assert {e.job_id for e in entries(database_url)} == ids
    assert backlog.redis.xlen(keys.LEDGER) == 0


def test_large_answers_are_recorded_a_few_at_a_time(
    backlog: Backlog, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = b'{"text": "' + 1000 * b"x" + b'"}'
    append = load_script(backlog.redis, "append")
    for _ in range(20):
        claim = run(backlog)
        parts = [(Kind.START, Start(200, [], 0, 1).encode()), (Kind.BODY, answer)]
        log = [
            Addressed(Entry(claim.job.id, Position(1, seq), *part), "")
            for seq, part in enumerate(parts)
        ]
        assert not append(**append_arguments(log, Settings(**SETTINGS)))
        assert backlog.finish(claim, State.COMPLETED)
        end_log(backlog, claim.job.id, State.COMPLETED)
    written, write = [], jobs.apply

    def apply(url: str, changes: Sequence[Change]) -> int:
        written.append(sum(len(c.result.body or b"") for c in changes if c.result))
        return write(url, changes)

    monkeypatch.setattr(jobs, "apply", apply)
    queue = Jobs(backlog.redis, backlog.redis, Settings(**SETTINGS))
    recorder = Recorder(queue, database_url, bytes_at_once=3000)
    assert recorder.record() == 20
    assert sum(written) == 20 * len(answer)
    assert max(written) <= 3000 + len(answer)
    assert len(entries(database_url)) == 20
    assert backlog.redis.xlen(keys.LEDGER) == 0


def test_two_recorders_at_once_double_nothing(backlog: Backlog, database_url: str) -> None:
    ids = [cancel(backlog) for _ in range(RECORDS_AT_ONCE + 100)]
    recorders = [recorder_of(backlog, database_url) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(Recorder.record, recorders))
    assert sum(counts) == len(ids) == len(entries(database_url))


def test_records_wait_in_redis_while_the_database_is_away(
    backlog: Backlog, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tasks.maintenance.ledger")
    url = postgres.create_database()
    recorder = recorder_of(backlog, url)
    ids = {cancel(backlog)}
    assert recorder.record() == 1
    postgres.stop()
    try:
        ids |= {cancel(backlog), cancel(backlog)}
        assert [recorder.record() for _ in range(3)] == [0, 0, 0]
        assert backlog.redis.xlen(keys.LEDGER) == 2
    finally:
        postgres.start()
    assert recorder.record() == 2
    assert {e.job_id for e in entries(url)} == ids
    messages = [r.getMessage() for r in caplog.records if r.name == "tasks.maintenance.ledger"]
    assert [message[:28] for message in messages] == [
        "ledger: the database is away",
        "ledger: the database is back",
    ]


@pytest.mark.parametrize(
    "broken",
    [{"state": "completed"}, {"tenant": "a\0b"}, {"tenant": b"\xff"}, {"at_us": 10**30}],
)
def test_a_record_that_cannot_be_read_does_not_stop_the_others(
    backlog: Backlog, database_url: str, caplog: pytest.LogCaptureFixture, broken: dict[str, Any]
) -> None:
    cancel(backlog)
    records: Any = backlog.redis.xrange(keys.LEDGER)
    ((record_id, fields),) = records
    backlog.redis.xdel(keys.LEDGER, record_id)
    whole = {} if "state" in broken else {k.decode(): value for k, value in fields.items()}
    backlog.redis.xadd(keys.LEDGER, whole | broken)
    good = cancel(backlog)
    assert recorder_of(backlog, database_url).record() == 1
    assert [e.job_id for e in entries(database_url)] == [good]
    assert backlog.redis.xlen(keys.LEDGER) == 0
    assert "dropped" in caplog.text


@pytest.mark.timeout(240)
def test_kills_of_maintenance_lose_and_double_nothing(
    stack: Stack, backlog: Backlog, database_url: str
) -> None:
    stack.env["SLUICE_DATABASE_URL"] = database_url
    wanted: Counter[str] = Counter()
    for kills_left in (2, 1, 0):
        maintenance = stack.start_maintenance()
        for _ in range(300):
            complete(backlog)
            cancel(backlog)
        abandon(backlog)
        wanted += Counter(completed=300, cancelled=300, failed=1)
        # In the middle of a round, or shortly after one.
        await_that(lambda: stack.redis.xlen(keys.LEDGER) < RECORDS_AT_ONCE)
        if kills_left:
            maintenance.kill()
    await_that(lambda: len(entries(database_url)) == wanted.total(), 60)
    await_that(lambda: stack.redis.xlen(keys.LEDGER) == 0)
    assert Counter(e.state for e in entries(database_url)) == wanted
    assert maintenance.stop() == 0


def test_the_reaper_works_while_the_database_hangs(
    stack: Stack, backlog: Backlog, postgres: Postgres
) -> None:
    stack.env["SLUICE_DATABASE_URL"] = postgres.create_database()
    stack.start_maintenance()
    complete(backlog)
    await_that(lambda: stack.redis.xlen(keys.LEDGER) == 0)
    with postgres.paused():
        # Its connections are open: nothing bounds how long an answer takes.
        for _ in range(4):
            abandon(backlog)
            await_that(lambda: stack.redis.zcard(keys.LEASES) == 0)
        # A start and an end each.
        assert stack.redis.xlen(keys.LEDGER) == 8
    await_that(lambda: stack.redis.xlen(keys.LEDGER) == 0)
