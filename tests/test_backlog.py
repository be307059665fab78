"""The scripts in tasks/queue/lua on a real Redis: every step of a job's life, and every fence."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Queue
from kombu.message import Message

from bench.stack import Stack, await_that
from tasks.contract import keys
from tasks.contract.errors import BacklogBytesError, DecodeError, IdempotencyError, OverloadedError
from tasks.contract.job import Cause, Claim, EnqueueOptions, Job, Lane, Room, State, new_id
from tasks.contract.settings import Settings
from tasks.queue.backlog import Backlog, Finished
from tasks.queue.celery_app import TICKET, TicketAMQP
from tasks.queue.counts import Counted, Happening, read
from tasks.queue.depth import depth, places
from tasks.queue.jobs import Jobs
from tasks.queue.statistics import Depth, read_depths

SETTINGS = Settings(lease_s=3, max_backlog=5, max_attempts=2)
KEY = {"idempotency_key": "k", "fingerprint": "f"}


@pytest.fixture
def backlog(bus: redis.Redis) -> Backlog:
    return Backlog(bus, SETTINGS)


def _job(lane: Lane = Lane.INTERACTIVE, **options: Any) -> Job:
    body, queued = b'{"a": "\xc3\xa4"}', EnqueueOptions(**options)
    return Job(new_id(), "m", "/v1/completions", body, lane, "acme", "api-1", options=queued)


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


@pytest.mark.parametrize("name", ["model", "endpoint", "lane", "tenant", "listener", "metadata"])
def test_a_claimed_job_that_lacks_a_field_cannot_be_read(name: str) -> None:
    fields = [value.encode() if isinstance(value, str) else value for value in _job().encode()]
    known = dict(zip(fields[::2], fields[1::2], strict=True)) | {b"max_failures": b"2"}
    known |= {b"worker": b"w"}

    def decode() -> Claim:
        values: Any = [known.get(name.encode()) for name in Claim.FIELDS]
        return Claim.decode([b"job_1", b"1", b"0", b"0", *values])

    assert decode().job.tenant == "acme"
    del known[name.encode()]
    with pytest.raises(DecodeError):
        decode()


def test_the_oldest_age_grows(backlog: Backlog) -> None:
    assert depth(backlog.redis, "m").oldest_age_s == 0
    backlog.submit(_job())
    await_that(lambda: depth(backlog.redis, "m").oldest_age_s > 0.1)


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
    late, soon = _job(Lane.BATCH), _job(Lane.BATCH, priority=-100)
    last = _job(Lane.BATCH, priority=100)
    backlog.submit(last)
    await_that(lambda: depth(backlog.redis, "m").oldest_age_s > 0.1)
    backlog.submit(late)
    backlog.submit(soon)
    assert depth(backlog.redis, "m").oldest_age_s > 0.1
    found = [each.job for each in backlog.snapshots([last.id, soon.id, late.id]) if each]
    assert [place and place.position for place in places(backlog.redis, found)] == [3, 1, 2]
    claims = [backlog.claim("m", "w") for _ in range(3)]
    assert [claim.job.id for claim in claims if claim] == [soon.id, late.id, last.id]


def test_an_interactive_job_stands_before_the_batch_lane(backlog: Backlog) -> None:
    batch, chat = _job(Lane.BATCH), _job()
    backlog.submit(batch)
    backlog.submit(chat)
    found = [each.job for each in backlog.snapshots([batch.id, chat.id]) if each]
    assert [place and place.position for place in places(backlog.redis, found)] == [2, 1]


def test_the_eta_comes_from_the_mean_service_time(backlog: Backlog) -> None:
    jobs = [_job() for _ in range(3)]
    backlog.submit(jobs[0])
    claim = backlog.claim("m", "w")
    assert claim
    await_that(lambda: backlog.redis.time() and depth(backlog.redis, "m").jobs == 0)
    backlog.finish(claim, State.COMPLETED)
    backlog.redis.set(keys.service("m"), 4_000_000)
    backlog.submit(jobs[1])
    backlog.submit(jobs[2])
    found = [each.job for each in backlog.snapshots([job.id for job in jobs[1:]]) if each]
    assert [place and place.eta_s for place in places(backlog.redis, found)] == [None, None]
    backlog.redis.sadd(keys.WORKERS, "w")
    backlog.redis.hset(keys.worker("w"), mapping={"model": "m", "slots": 2, "running": 0})
    assert [place and place.eta_s for place in places(backlog.redis, found)] == [2.0, 4.0]


def test_a_job_past_its_deadline_is_not_claimed_and_expires(backlog: Backlog) -> None:
    late, other = _job(deadline_s=0.001), _job(deadline_s=100)
    backlog.submit(late)
    backlog.submit(other)
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
    first, second = _job(**KEY), _job(**KEY)
    assert backlog.submit(first) == first.id
    assert backlog.submit(second) == first.id
    assert depth(backlog.redis, "m").jobs == 1
    with pytest.raises(IdempotencyError):
        backlog.submit(_job(idempotency_key="k", fingerprint="other"))
    assert depth(backlog.redis, "m").jobs == 1


def test_a_job_queued_again_continues_its_attempts(backlog: Backlog) -> None:
    backlog.queue(_job(), 4)
    claim = backlog.claim("m", "w")
    assert claim
    assert claim.attempt == 5
    _expire_leases(backlog)
    assert [job.state for job in backlog.reap()] == [State.QUEUED]


def test_finishing_a_job_returns_whether_others_wait(backlog: Backlog) -> None:
    for lane in Lane:
        backlog.submit(_job(lane))
    for finished in (Finished.OTHERS_WAIT, Finished.NONE_WAITS):
        claim = backlog.claim("m", "w")
        assert claim
        assert backlog.finish(claim, State.COMPLETED) is finished


def test_only_the_holder_finishes_a_job(backlog: Backlog) -> None:
    backlog.submit(_job())
    first = backlog.claim("m", "w1")
    assert first
    _expire_leases(backlog)
    assert [job.state for job in backlog.reap()] == [State.QUEUED]
    second = backlog.claim("m", "w2")
    assert second
    assert second.attempt == 2
    assert backlog.renew([first]) == [first]
    assert not backlog.finish(first, State.COMPLETED)
    assert backlog.renew([second]) == []
    assert backlog.finish(second, State.COMPLETED)
    assert not backlog.finish(second, State.FAILED)
    assert backlog.redis.zcard(keys.LEASES) == 0
    assert backlog.redis.hget(keys.job(second.job.id), "place") is None
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
        again = backlog.requeue(claim, Cause.HANDED_BACK, "stopped")
        assert again is State.QUEUED  # its reply was lost: it gets the same
    assert backlog.redis.llen(keys.tickets("m")) == 1
    claim = backlog.claim("m", "w")
    assert claim
    backlog.cancel(claim.job.id)
    assert backlog.requeue(claim, Cause.HANDED_BACK, "stopped") is None
    assert backlog.redis.zcard(keys.LEASES) == 0


def test_each_claim_tells_how_long_the_job_has_waited_for_it(backlog: Backlog) -> None:
    hour_ms = 3_600_000
    job = _job()
    backlog.submit(job)
    backlog.redis.hincrby(keys.job(job.id), "queued_us", -hour_ms * 1000)
    first = backlog.claim("m", "w")
    assert first
    assert first.wait_ms == first.queue_ms >= hour_ms
    backlog.requeue(first, Cause.HANDED_BACK, "stopped")
    second = backlog.claim("m", "w")
    assert second
    assert second.wait_ms < hour_ms <= second.queue_ms
    _expire_leases(backlog)
    (reaped,) = backlog.reap()
    assert reaped.started_us
    assert reaped.waited_since_us
    assert reaped.started_us - reaped.waited_since_us < hour_ms * 1000
    third = backlog.claim("m", "w")
    assert third
    assert third.wait_ms < hour_ms <= third.queue_ms


def test_a_job_that_fails_waits_its_delay_and_ends_as_a_dead_letter(backlog: Backlog) -> None:
    backlog.submit(_job())
    claim = backlog.claim("m", "w")
    assert claim
    assert backlog.requeue(claim, Cause.ENGINE_ERROR, "503", delay_s=0.2) is State.QUEUED
    assert backlog.claim("m", "w") is None
    await_that(lambda: [job.state for job in backlog.reap()] == [State.QUEUED])
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
    assert backlog.cancel(claim.job.id)
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
    cancelled = backlog.cancel(queued.id)
    assert cancelled
    assert cancelled.worker == ""
    assert depth(backlog.redis, "m").jobs == 0
    stopped = backlog.cancel(running.id)
    assert stopped
    assert stopped.worker == "w"
    assert backlog.renew([claim]) == [claim]
    assert not backlog.finish(claim, State.COMPLETED)
    assert backlog.cancel(running.id) == stopped
    assert backlog.cancel("job_unknown") is None


def test_a_job_that_has_started_in_time_never_expires(backlog: Backlog) -> None:
    """Handed back after its deadline it was in no index at all, for ever."""
    job = _job(deadline_s=2)
    backlog.submit(job)
    claim = backlog.claim("m", "w")
    assert claim
    await_that(lambda: _ms_since(backlog, job) > 2050)
    backlog.requeue(claim, Cause.HANDED_BACK, "stopped")
    assert backlog.reap() == []
    again = backlog.claim("m", "w")
    assert again
    assert again.job.id == job.id
    _expire_leases(backlog)
    assert [reaped.state for reaped in backlog.reap()] == [State.QUEUED]


def _ms_since(backlog: Backlog, job: Job) -> float:
    queued_us = int(backlog.redis.hget(keys.job(job.id), "queued_us") or 0)
    return (_now_us(backlog) - queued_us) / 1000


def test_a_claim_whose_reply_was_lost_returns_the_same_job_again(backlog: Backlog) -> None:
    backlog.submit(_job())
    backlog.submit(_job())
    first = backlog.claim("m", "w", "token")
    assert backlog.claim("m", "w", "token") == first
    assert depth(backlog.redis, "m").jobs == 1
    other = backlog.claim("m", "w", "another token")
    assert other
    assert first
    assert other.job.id != first.job.id


def _take(
    backlog: Backlog, slots: int, most: int = 8, token: str = "", reserve: int = 0
) -> list[str]:
    """The jobs of one claim, by their ids."""
    room = Room(slots, slots)
    return [c.job.id for c in backlog.claim_several("m", "w", token, room, reserve, most)]


def test_several_jobs_are_claimed_in_the_order_of_as_many_claims(backlog: Backlog) -> None:
    batch, first, second = _job(Lane.BATCH), _job(), _job()
    other = replace(_job(), tenant="other")
    for job in (batch, first, second, other):
        backlog.submit(job)
    assert _take(backlog, 8) == [first.id, other.id, second.id, batch.id]
    assert _take(backlog, 8) == []


def test_several_jobs_that_are_claimed_fit_together(backlog: Backlog) -> None:
    jobs = [replace(_job(), sequences=sequences) for sequences in (1, 2, 2, 1)]
    for job in jobs:
        backlog.submit(job)
    assert _take(backlog, 4) == [jobs[0].id, jobs[1].id]  # nobody passes the third one
    assert _take(backlog, 4, most=1) == [jobs[2].id]


def test_an_idle_worker_claims_one_job_wider_than_its_slots_and_no_more(backlog: Backlog) -> None:
    wide, narrow = replace(_job(), sequences=5), _job()
    backlog.submit(wide)
    backlog.submit(narrow)
    claims = backlog.claim_several("m", "w", "", Room(4, 10**6), 0, 8)
    assert [claim.job.id for claim in claims] == [wide.id]


def test_one_of_several_workers_claims_its_share_of_what_waits(backlog: Backlog) -> None:
    jobs = [_job() for _ in range(5)]
    for job in jobs:
        backlog.submit(job)
    backlog.redis.sadd(keys.WORKERS, "w", "another")
    assert _take(backlog, 8) == [job.id for job in jobs[:3]]
    assert _take(backlog, 8) == [jobs[3].id]
    assert _take(backlog, 8) == [jobs[4].id]


def test_one_claim_takes_no_more_large_requests_than_a_reply_may_hold(backlog: Backlog) -> None:
    jobs = [replace(_job(), body=b"x" * 700_000) for _ in range(4)]
    for job in jobs:
        backlog.submit(job)
    assert _take(backlog, 8) == [jobs[0].id, jobs[1].id]


def test_several_claims_whose_reply_was_lost_are_returned_again(backlog: Backlog) -> None:
    jobs = [_job() for _ in range(4)]
    for job in jobs:
        backlog.submit(job)
    assert _take(backlog, 3, token="token") == [job.id for job in jobs[:3]]
    assert backlog.cancel(jobs[1].id)
    assert _take(backlog, 3, token="token") == [jobs[0].id, jobs[2].id]
    assert _take(backlog, 3, token="another") == [jobs[3].id]


def test_of_several_suspects_one_is_claimed(backlog: Backlog) -> None:
    queue = Backlog(backlog.redis, Settings(lease_s=3, max_attempts=2))
    jobs = [_job() for _ in range(3)]
    for job in jobs:
        queue.submit(job)
    assert len(_take(queue, 3)) == 3
    _expire_leases(queue)
    assert len(queue.reap()) == 3
    fresh = _job()
    queue.submit(fresh)
    assert _take(queue, 8) == [jobs[0].id, fresh.id]


def test_a_job_that_cannot_be_read_does_not_cost_the_others(backlog: Backlog) -> None:
    broken, whole = _job(), _job()
    backlog.submit(broken)
    backlog.submit(whole)
    backlog.redis.hdel(keys.job(broken.id), "metadata")
    assert _take(backlog, 8) == [whole.id]


def test_any_number_of_suspects_loses_none_and_holds_nobody_up(backlog: Backlog) -> None:
    """Above some 4,000 of them a claim failed half-way, and all were gone."""
    queue = Backlog(backlog.redis, Settings(lease_s=3, max_attempts=2))
    suspects = [_job() for _ in range(4500)]
    for job in suspects:
        queue.submit(job)
        assert queue.claim("m", "w")
    _expire_leases(queue)
    while queue.reap():
        pass
    queue.submit(_job())
    first = queue.claim("m", "w")
    assert first
    assert first.is_suspect
    beside = queue.claim("m", "w")
    assert beside
    assert not beside.is_suspect
    assert depth(queue.redis, "m").jobs == len(suspects) - 1
    assert queue.claim("m", "another worker")


def test_a_suspect_that_has_produced_something_makes_way_for_the_next(backlog: Backlog) -> None:
    for _ in range(2):
        backlog.submit(_job())
        assert backlog.claim("m", "w")
    _expire_leases(backlog)
    backlog.reap()
    first = backlog.claim("m", "w")
    assert first
    assert first.is_suspect
    assert backlog.claim("m", "w") is None
    backlog.clear(first)
    backlog.clear(first)
    second = backlog.claim("m", "w")
    assert second
    assert second.is_suspect
    _expire_leases(backlog)
    assert sorted(job.state for job in backlog.reap()) == [State.FAILED, State.QUEUED]
    last = backlog.claim("m", "w")
    assert last
    assert last.job == first.job
    backlog.clear(last)  # once per job
    _expire_leases(backlog)
    assert [job.state for job in backlog.reap()] == [State.FAILED]


def test_a_job_of_several_sequences_waits_for_so_many_slots(backlog: Backlog) -> None:
    wide, narrow = replace(_job(), sequences=3), _job()
    backlog.submit(wide)
    backlog.submit(narrow)
    assert backlog.claim("m", "w", free_slots=2) is None
    claim = backlog.claim("m", "w", free_slots=3)
    assert claim
    assert claim.job == wide


def test_a_model_holds_so_many_bytes_of_bodies_and_no_body_of_an_ended_job(
    backlog: Backlog,
) -> None:
    queue = Backlog(backlog.redis, Settings(max_backlog_bytes=25))
    jobs = [_job(), _job()]
    for job in jobs:
        queue.submit(job)
    with pytest.raises(BacklogBytesError):
        queue.submit(_job())
    claim = queue.claim("m", "w")
    assert claim
    assert queue.finish(claim, State.FAILED)
    assert queue.cancel(jobs[1].id)
    assert queue.redis.hgetall(keys.BODY_BYTES) == {b"m": b"0"}
    assert [queue.redis.hget(keys.job(job.id), "body") for job in jobs] == [None, None]
    queue.submit(_job())


def test_one_ticket_waits_however_many_jobs_do(backlog: Backlog) -> None:
    for _ in range(3):
        backlog.submit(_job())
    backlog.send_ticket("m")
    assert backlog.redis.llen(keys.tickets("m")) == 1


def test_a_lost_ticket_is_issued_again_after_the_clock_of_redis_was_set_back(
    backlog: Backlog,
) -> None:
    """A step back of a day: jobs of before it will be queued tomorrow, so they have no age."""
    job = _job()
    backlog.submit(job)
    backlog.redis.delete(keys.tickets("m"))
    place = keys.backlog("m", Lane.INTERACTIVE)
    backlog.redis.zincrby(place, 24 * 3600 * 1000, job.id)
    queue = Jobs(backlog.redis, backlog.redis, SETTINGS)
    assert queue.reissue_tickets() == 1
    assert queue.reissue_tickets() == 0
    assert read_depths(backlog.redis, ["m"])["m"][Lane.INTERACTIVE] == Depth(1, 0)


def test_a_claim_that_leaves_suspects_behind_wakes_another_worker(backlog: Backlog) -> None:
    for _ in range(2):
        backlog.submit(_job())
        assert backlog.claim("m", "w")
    _expire_leases(backlog)
    assert len(backlog.reap()) == 2
    backlog.redis.delete(keys.tickets("m"))
    assert _take(backlog, 8, most=8)
    assert backlog.redis.llen(keys.tickets("m")) == 1


def test_a_claim_wakes_the_next_slot_when_all_tickets_are_gone(backlog: Backlog) -> None:
    for _ in range(3):
        backlog.submit(_job())
    backlog.redis.delete(keys.tickets("m"))
    assert backlog.claim("m", "w")
    assert backlog.redis.llen(keys.tickets("m")) == 1
    backlog.redis.delete(keys.tickets("m"))
    assert backlog.claim("m", "w")
    assert backlog.claim("m", "w")
    assert backlog.redis.llen(keys.tickets("m")) == 1


def test_an_accepted_job_is_queued_into_a_full_lane_and_beside_its_taken_key(
    backlog: Backlog,
) -> None:
    chat = _job(**KEY)
    backlog.submit(chat)
    for _ in range(4):
        backlog.submit(_job())
    job = _job()
    with pytest.raises(OverloadedError):
        backlog.reserve(job)
    options = EnqueueOptions(idempotency_key="k", fingerprint="another")
    backlog.queue(replace(job, options=options))
    assert depth(backlog.redis, "m").jobs == 6
    assert backlog.submit(_job(**KEY)) == chat.id


def test_a_client_that_leaves_does_not_cancel_what_another_has_attached_to(
    backlog: Backlog,
) -> None:
    job, alone = _job(**KEY), _job()
    backlog.submit(job)
    assert backlog.submit(_job(**KEY)) == job.id
    backlog.submit(alone)
    assert backlog.cancel(job.id, unless_attached=True) is None
    assert backlog.cancel(alone.id, unless_attached=True)
    assert backlog.cancel(job.id)


def test_a_job_in_the_wrong_place_is_repaired(backlog: Backlog) -> None:
    lost, stray, due = (_job(deadline_s=60) for _ in range(3))
    for job in (lost, stray, due):
        backlog.submit(job)
    redis = backlog.redis
    redis.zrem(keys.backlog("m", Lane.INTERACTIVE), lost.id)
    redis.zadd(keys.LEASES, {stray.id: 1})
    redis.zrem(keys.DEADLINES, due.id)
    ids = [lost.id, stray.id, due.id, "job_unknown"]
    assert backlog.sweep(ids) == ["misplaced", "stray", "misplaced", "missing"]
    assert backlog.sweep(ids) == ["open", "open", "open", "missing"]
    redis.zadd(keys.LEASES, {"job_unknown": 1})
    assert backlog.sweep(["job_unknown"], place=keys.LEASES) == ["stray"]
    counted = read(redis.hgetall(keys.COUNTS))
    assert counted[Happening(Counted.REPAIRS, "misplaced")] == 2
    assert counted[Happening(Counted.REPAIRS, "stray")] == 2
    assert [bool(backlog.claim("m", "w")) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("module", ["tasks.queue.backlog", "api.app", "deploy.status"])
def test_only_workers_load_celerys_worker(module: str, tmp_path: Path) -> None:
    """It would take time at each start of the program."""
    program = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    loaded = set(output.split())
    assert module in loaded
    workers_own = {"celery.worker", "celery.concurrency.thread", "celery.app.trace"}
    assert not loaded & workers_own


FIRST_JOB = """
import sys
from redis import Redis
from tasks.contract.job import Job
from tasks.contract.settings import get_settings
from tasks.queue.backlog import Backlog
backlog = Backlog(Redis.from_url(get_settings().redis_url))
backlog.redis.ping()
before = set(sys.modules)
backlog.submit(Job("job_1", "m", "/v1/completions", b"{}"))
print(*(set(sys.modules) - before))
"""


def test_the_first_client_of_a_process_waits_for_no_imports(
    server: Stack, bus: redis.Redis
) -> None:
    """The first chat after each start of an API process took 30 ms more."""
    command = [sys.executable, "-c", FIRST_JOB]
    run = subprocess.run(command, env=server.env, capture_output=True, text=True, check=True)
    assert [line for line in run.stdout.splitlines() if "job accepted" not in line] == [""]
    assert bus.exists(keys.tickets("m"))


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
