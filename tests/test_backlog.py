"""The scripts in tasks/lua against a real Redis: every step of a job's life, and every fence."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from kombu import Queue
from kombu.message import Message

from tasks import keys
from tasks.app import TICKET, TicketAMQP
from tasks.backlog import Backlog
from tasks.depth import depth, places
from tasks.errors import IdempotencyError, OverloadedError
from tasks.events import End, Entry, Kind, Position, Start, decode_frame
from tasks.message import Cause, Job, Lane, State, Terms
from tasks.settings import Settings
from tasks.token_log import Addressed, TokenLog, append_arguments
from tests.stack import Stack, await_that

SETTINGS = Settings(lease_s=3, max_backlog=5, max_attempts=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("redis"), [{"name": "m", "engine": "sim"}])
    stack.start_redis()
    yield stack
    stack.stop()


@pytest.fixture
def backlog(server: Stack) -> Backlog:
    server.redis.flushall()
    return Backlog(server.redis, SETTINGS)


def _job(lane: Lane = Lane.INTERACTIVE) -> Job:
    job = Job.create(model="m", endpoint="/v1/completions", body=b"{}", listener="api-1")
    return Job(job.id, job.model, job.endpoint, b'{"a": "\xc3\xa4"}', lane, "acme", "api-1")


def _expire_leases(backlog: Backlog) -> None:
    for member in backlog.redis.zrange(keys.LEASES, 0, -1):
        backlog.redis.zadd(keys.LEASES, {member: 1})


def test_jobs_are_claimed_whole_in_order_and_interactive_ones_first(backlog: Backlog) -> None:
    jobs = [_job(Lane.BATCH), _job(), _job(Lane.BATCH), _job()]
    for job in jobs:
        backlog.submit(job)
    assert depth(backlog.redis, "m").jobs == 4
    claims = [backlog.claim("m", "w") for _ in jobs]
    assert [claim.job for claim in claims if claim] == [jobs[1], jobs[3], jobs[0], jobs[2]]
    assert backlog.claim("m", "w") is None
    assert depth(backlog.redis, "m").jobs == 0


def test_the_oldest_age_grows(backlog: Backlog) -> None:
    assert depth(backlog.redis, "m").oldest_age_s == 0
    backlog.submit(_job())
    await_that(lambda: depth(backlog.redis, "m").oldest_age_s > 0.1, timeout_s=2)


def test_a_full_lane_refuses_and_the_other_does_not(backlog: Backlog) -> None:
    for _ in range(5):
        backlog.submit(_job())
    with pytest.raises(OverloadedError):
        backlog.submit(_job())
    backlog.submit(_job(Lane.BATCH))


def test_a_submission_sent_twice_is_one_job(backlog: Backlog) -> None:
    job = _job()
    backlog.submit(job)
    assert backlog.claim("m", "w")
    backlog.submit(job)
    assert backlog.claim("m", "w") is None


def test_priorities_order_a_lane_and_the_oldest_age_counts_all(backlog: Backlog) -> None:
    late, soon, last = _job(Lane.BATCH), _job(Lane.BATCH), _job(Lane.BATCH)
    backlog.submit(last, Terms(priority=100))
    await_that(lambda: depth(backlog.redis, "m").oldest_age_s > 0.1, timeout_s=2)
    backlog.submit(late)
    backlog.submit(soon, Terms(priority=-100))
    assert depth(backlog.redis, "m").oldest_age_s > 0.1
    found = [job for job in backlog.look([last.id, soon.id, late.id]) if job]
    assert [place and place.position for place in places(backlog.redis, found)] == [3, 1, 2]
    claims = [backlog.claim("m", "w") for _ in range(3)]
    assert [claim.job.id for claim in claims if claim] == [soon.id, late.id, last.id]


def test_an_interactive_job_stands_before_the_batch_lane(backlog: Backlog) -> None:
    batch, chat = _job(Lane.BATCH), _job()
    backlog.submit(batch)
    backlog.submit(chat)
    found = [job for job in backlog.look([batch.id, chat.id]) if job]
    assert [place and place.position for place in places(backlog.redis, found)] == [2, 1]


def test_the_wait_is_told_from_the_mean_service_time(backlog: Backlog) -> None:
    jobs = [_job() for _ in range(3)]
    backlog.submit(jobs[0])
    claim = backlog.claim("m", "w")
    assert claim
    await_that(lambda: backlog.redis.time() and depth(backlog.redis, "m").jobs == 0)
    backlog.finish(claim, State.COMPLETED)
    backlog.redis.set(keys.service("m"), 4_000_000)
    backlog.submit(jobs[1])
    backlog.submit(jobs[2])
    found = [job for job in backlog.look([job.id for job in jobs[1:]]) if job]
    assert [place and place.eta_s for place in places(backlog.redis, found)] == [None, None]
    backlog.redis.sadd(keys.WORKERS, "w")
    backlog.redis.hset(keys.worker("w"), mapping={"model": "m", "slots": 2, "running": 0})
    assert [place and place.eta_s for place in places(backlog.redis, found)] == [2.0, 4.0]


def test_a_job_past_its_deadline_is_not_claimed_and_expires(backlog: Backlog) -> None:
    late, other = _job(), _job()
    backlog.submit(late, Terms(deadline_s=0.001))
    backlog.submit(other, Terms(deadline_s=100))
    await_that(lambda: backlog.redis.zrangebyscore(keys.DEADLINES, 0, _now_us(backlog)))
    claim = backlog.claim("m", "w")
    assert claim
    assert claim.job.id == other.id
    assert [(job.job_id, job.state) for job in backlog.reap()] == [(late.id, State.EXPIRED)]
    assert backlog.redis.zcard(keys.DEADLINES) == 0
    assert backlog.claim("m", "w") is None


def _now_us(backlog: Backlog) -> int:
    seconds, micros = backlog.redis.time()
    return int(seconds * 1_000_000 + micros)


def test_a_key_makes_one_job_of_equal_requests(backlog: Backlog) -> None:
    first, second = _job(), _job()
    terms = Terms(idempotency_key="k", fingerprint="f")
    assert backlog.submit(first, terms) == first.id
    assert backlog.submit(second, terms) == first.id
    assert depth(backlog.redis, "m").jobs == 1
    with pytest.raises(IdempotencyError):
        backlog.submit(_job(), Terms(idempotency_key="k", fingerprint="other"))
    assert depth(backlog.redis, "m").jobs == 1


def test_a_job_queued_again_continues_its_attempts(backlog: Backlog) -> None:
    backlog.submit(_job(), Terms(first_attempt=4))
    claim = backlog.claim("m", "w")
    assert claim
    assert claim.attempt == 5
    _expire_leases(backlog)
    assert [job.state for job in backlog.reap()] == [State.QUEUED]


def test_only_the_holder_finishes_a_job(backlog: Backlog) -> None:
    backlog.submit(_job())
    first = backlog.claim("m", "w1")
    assert first
    _expire_leases(backlog)
    assert [job.state for job in backlog.reap()] == [State.QUEUED]
    second = backlog.claim("m", "w2")
    assert second
    assert second.attempt == 2
    assert backlog.renew([first]) == [first.job.id]
    assert not backlog.finish(first, State.COMPLETED)
    assert backlog.renew([second]) == []
    assert backlog.finish(second, State.COMPLETED)
    assert not backlog.finish(second, State.FAILED)
    assert backlog.redis.zcard(keys.LEASES) == 0
    assert 0 < backlog.redis.ttl(keys.job(second.job.id)) <= SETTINGS.log_retention_s
    assert backlog.redis.hget(keys.job(second.job.id), "body") is None


def test_a_reaped_job_goes_back_to_its_place(backlog: Backlog) -> None:
    jobs = [_job(), _job()]
    for job in jobs:
        backlog.submit(job)
    assert backlog.claim("m", "w")
    _expire_leases(backlog)
    backlog.reap()
    claim = backlog.claim("m", "w")
    assert claim
    assert claim.job == jobs[0]


def test_a_job_fails_after_its_last_attempt(backlog: Backlog) -> None:
    backlog.submit(_job())
    states = []
    for _ in range(2):
        assert backlog.claim("m", "w")
        _expire_leases(backlog)
        states += [job.state for job in backlog.reap()]
    assert states == [State.QUEUED, State.FAILED]
    assert backlog.claim("m", "w") is None


def test_a_job_handed_back_waits_again_at_its_place_and_has_not_failed(backlog: Backlog) -> None:
    jobs = [_job(), _job()]
    for job in jobs:
        backlog.submit(job)
    for _ in range(5):
        claim = backlog.claim("m", "w")
        assert claim
        assert (claim.job, claim.failures) == (jobs[0], 0)
        assert backlog.requeue(claim, Cause.HANDED_BACK, "stopped") is State.QUEUED
        assert backlog.requeue(claim, Cause.HANDED_BACK, "stopped") is None
    assert backlog.redis.llen(keys.tickets("m")) == 7
    assert backlog.redis.zcard(keys.LEASES) == 0


def test_a_job_that_fails_waits_its_delay_and_ends_as_a_dead_letter(backlog: Backlog) -> None:
    backlog.submit(_job())
    claim = backlog.claim("m", "w")
    assert claim
    assert backlog.requeue(claim, Cause.ENGINE_ERROR, "503", delay_s=0.2) is State.QUEUED
    assert backlog.claim("m", "w") is None
    await_that(lambda: [job.state for job in backlog.reap()] == [State.QUEUED], timeout_s=2)
    again = backlog.claim("m", "w")
    assert again
    assert (again.attempt, again.failures, again.is_last) == (2, 1, True)
    assert backlog.requeue(again, Cause.ENGINE_ERROR, "503") is State.FAILED
    assert backlog.claim("m", "w") is None


def test_a_delayed_job_can_be_cancelled(backlog: Backlog) -> None:
    backlog.submit(_job())
    claim = backlog.claim("m", "w")
    assert claim
    backlog.requeue(claim, Cause.ENGINE_ERROR, "503", delay_s=0.05)
    assert backlog.cancel(claim.job.id, "m")
    assert backlog.redis.zcard(keys.DELAYED) == 0


def test_a_worker_runs_one_suspect_at_a_time_and_other_jobs_beside_it(backlog: Backlog) -> None:
    suspects = [_job(), _job()]
    for job in suspects:
        backlog.submit(job)
    for _ in suspects:
        assert backlog.claim("m", "w")
    _expire_leases(backlog)
    assert len(backlog.reap()) == 2
    other = _job()
    backlog.submit(other)
    first, second = backlog.claim("m", "w"), backlog.claim("m", "w")
    assert first
    assert second
    assert (first.job, first.is_last) == (suspects[0], True)
    assert (second.job, second.is_last) == (other, False)
    assert backlog.claim("m", "w") is None
    elsewhere = backlog.claim("m", "another worker")
    assert elsewhere
    assert elsewhere.job == suspects[1]
    backlog.requeue(elsewhere, Cause.HANDED_BACK, "stopped")
    backlog.finish(first, State.COMPLETED)
    last = backlog.claim("m", "w")
    assert last
    assert last.job == suspects[1]


def test_a_paused_model_is_left_alone(backlog: Backlog) -> None:
    backlog.submit(_job())
    backlog.pause("m")
    assert backlog.paused() == {"m"}
    assert backlog.claim("m", "w") is None
    assert depth(backlog.redis, "m").jobs == 1
    backlog.resume("m")
    assert backlog.claim("m", "w")


def test_cancelling_ends_a_job_wherever_it_is(backlog: Backlog) -> None:
    queued, running = _job(), _job()
    backlog.submit(running)
    claim = backlog.claim("m", "w")
    backlog.submit(queued)
    assert claim
    cancelled = backlog.cancel(queued.id, "m")
    assert cancelled
    assert cancelled.worker == ""
    assert depth(backlog.redis, "m").jobs == 0
    stopped = backlog.cancel(running.id, "m")
    assert stopped
    assert stopped.worker == "w"
    assert backlog.renew([claim]) == [running.id]
    assert not backlog.finish(claim, State.COMPLETED)
    assert backlog.cancel(running.id, "m") is None
    assert backlog.cancel("job_unknown", "m") is None


def _entry(attempt: int, seq: int, kind: Kind = Kind.BODY, data: bytes = b"x") -> Addressed:
    return Addressed(Entry("job_1", Position(attempt, seq), kind, data), "")


def test_a_zombies_late_entries_are_refused(backlog: Backlog) -> None:
    redis = backlog.redis
    log, append = TokenLog(redis, SETTINGS), redis.register_script(_append_script())
    head = Start(200, [("content-type", "text/plain")], 3, 1)
    batch = [_entry(1, 0, Kind.START, head.encode()), _entry(1, 1)]
    assert append(**append_arguments(batch, SETTINGS)) == []
    assert 0 < redis.ttl(keys.log("job_1")) <= SETTINGS.job_ttl_s
    log.end("job_1", 1, End(State.CANCELLED), "")
    assert append(**append_arguments([_entry(1, 2)], SETTINGS)) == [1]
    entries = log.read_after("job_1", None)
    assert [str(entry.position) for entry in entries] == ["1-0", "1-1", "2-0"]
    assert Start.decode(entries[0].data) == head
    redis.delete(keys.log("job_1"))
    assert append(**append_arguments([_entry(2, 3)], SETTINGS)) == [1]
    assert not redis.exists(keys.log("job_1"))
    append(**append_arguments([_entry(1, 0), _entry(1, 1)], SETTINGS))
    log.end("job_1", 1, End(State.CANCELLED), "")
    entries = log.read_after("job_1")
    assert End.decode(entries[-1].data).state is State.CANCELLED
    assert log.read_after("job_1", Position(1, 1)) == entries[2:]
    assert log.last("job_1") == entries[-1]
    assert 0 < redis.ttl(keys.log("job_1")) <= SETTINGS.log_retention_s


def test_what_is_refused_is_not_published(backlog: Backlog) -> None:
    redis = backlog.redis
    append = redis.register_script(_append_script())
    with redis.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(keys.relay("api"))
        await_that(lambda: redis.pubsub_numsub(keys.relay("api"))[0][1] == 1)
        fresh = Entry("job_2", Position(1, 0), Kind.BODY, b"seen")
        TokenLog(redis, SETTINGS).take_over("job_1", 2, "")
        stale = Entry("job_1", Position(1, 5), Kind.BODY, b"stale")
        batch = [Addressed(stale, "api"), Addressed(fresh, "api")]
        assert append(**append_arguments(batch, SETTINGS)) == [1]
        messages: list[dict[str, bytes]] = []
        await_that(lambda: messages.append(heard.get_message()) or messages[-1])
        assert list(decode_frame(messages[-1]["data"])) == [fresh]


def test_a_takeover_returns_what_was_written_before_and_fences_it(backlog: Backlog) -> None:
    log = TokenLog(backlog.redis, SETTINGS)
    append = backlog.redis.register_script(_append_script())
    noted = Entry("job_1", Position(1, 1), Kind.BODY, b"x", b"[1]")
    batch = [_entry(1, 0, Kind.START), Addressed(noted, "")]
    append(**append_arguments(batch, SETTINGS))
    for _ in range(2):
        assert [entry.record for entry in log.take_over("job_1", 2, "")] == [b"", b"[1]"]
    assert append(**append_arguments([_entry(1, 2)], SETTINGS)) == [1]
    assert append(**append_arguments([_entry(2, 1)], SETTINGS)) == []


def _append_script() -> str:
    return (Path(keys.__file__).parent / "lua" / "append.lua").read_text()


def test_frames_carry_any_bytes() -> None:
    entries = [
        Entry("job_1", Position(1, 0), Kind.START, b"[]"),
        Entry("job_2", Position(2**31, 7), Kind.BODY, bytes(range(256))),
        Entry("job_1", Position(1, 1), Kind.END, b""),
    ]
    frame = b"".join(entry.encode_head() + entry.encode_value() for entry in entries)
    assert list(decode_frame(frame)) == entries


def test_a_ticket_that_was_taken_outlives_its_connection(server: Stack) -> None:
    app = Celery(broker=server.env["SLUICE_REDIS_URL"], amqp=TicketAMQP)
    taken: list[Message] = []
    with app.connection_for_write() as connection:
        queue = Queue("tickets")
        with app.amqp.TaskConsumer(connection, queues=[queue], on_message=taken.append):
            app.send_task(TICKET, ("m",), queue=queue, connection=connection)
            connection.drain_events(timeout=10)
    # What Celery does with it next may come after Redis has gone; an error would end the worker.
    taken[0].ack_log_error(logging.getLogger(__name__), connection.connection_errors)
    taken[0].reject_log_error(logging.getLogger(__name__), connection.connection_errors)
