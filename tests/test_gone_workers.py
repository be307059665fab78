"""Whom maintenance takes for gone: no connection and no heartbeat, look after look."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

from bench.stack import await_that
from tasks.contract import keys
from tasks.contract.job import Job, new_id
from tasks.contract.settings import Settings
from tasks.maintenance.gone_workers import LOOKS, GoneWorkers
from tasks.queue.control import BEATS
from tasks.queue.jobs import Jobs


@pytest.fixture
def queue(bus: redis.Redis) -> Jobs:
    return Jobs(bus, bus, Settings(lease_s=600))


@pytest.fixture
def gone_workers(queue: Jobs) -> GoneWorkers:
    return GoneWorkers(queue)


def beat(bus: redis.Redis, worker: str, model: str = "m") -> None:
    """Sends a heartbeat of the worker."""
    bus.hset(keys.worker(worker), mapping={"model": model, "slots": 4})
    bus.hincrby(keys.worker(worker), BEATS, 1)
    bus.sadd(keys.WORKERS, worker)


@contextmanager
def connected(bus: redis.Redis, worker: str) -> Iterator[None]:
    """The worker listens on its control channel while the block runs."""
    channel = keys.control(worker)
    with bus.pubsub() as subscription:  # type: ignore[no-untyped-call]
        subscription.subscribe(channel)
        await_that(lambda: bus.pubsub_numsub(channel) == [(channel.encode(), 1)])
        yield
    await_that(lambda: bus.pubsub_numsub(channel) == [(channel.encode(), 0)])


@pytest.fixture
def other(bus: redis.Redis) -> Iterator[str]:
    """Another worker of the model, which lives."""
    beat(bus, "other")
    with connected(bus, "other"):
        yield "other"


def claim(queue: Jobs, worker: str) -> str:
    """A job that the worker has claimed, its heartbeats sent."""
    queue.backlog.submit(Job(new_id(), "m", "/v1/completions", b"{}"))
    claimed = queue.backlog.claim("m", worker)
    assert claimed
    return claimed.job.id


def look(gone_workers: GoneWorkers, times: int = LOOKS + 1) -> None:
    for _ in range(times):
        gone_workers.look()


def state(queue: Jobs, job_id: str) -> str:
    (snapshot,) = queue.backlog.snapshots([job_id])
    assert snapshot
    return snapshot.state


def test_a_worker_without_connection_and_heartbeat_loses_its_jobs_and_no_others(
    bus: redis.Redis, queue: Jobs, gone_workers: GoneWorkers, other: str
) -> None:
    beat(bus, "w")
    lost, kept = claim(queue, "w"), claim(queue, other)
    look(gone_workers, LOOKS)
    assert state(queue, lost) == "in_progress"
    look(gone_workers, 1)
    assert (state(queue, lost), state(queue, kept)) == ("queued", "in_progress")
    assert queue.backlog.claim("m", other, free_slots=3)
    assert not bus.exists(keys.worker("w"))
    assert bus.hget(keys.job(lost), "attempt") == b"2"


def test_a_heartbeat_keeps_the_jobs(
    bus: redis.Redis, queue: Jobs, gone_workers: GoneWorkers, other: str
) -> None:
    """A worker whose connection broke and that has not made another yet."""
    beat(bus, "w")
    kept = claim(queue, "w")
    for _ in range(3):
        look(gone_workers, LOOKS)
        beat(bus, "w")
    assert state(queue, kept) == "in_progress"


def test_a_connection_keeps_the_jobs(
    bus: redis.Redis, queue: Jobs, gone_workers: GoneWorkers, other: str
) -> None:
    """A worker that is stopped, stalls, or whose network swallows everything."""
    beat(bus, "w")
    kept = claim(queue, "w")
    with connected(bus, "w"):
        look(gone_workers, 3 * LOOKS)
    # Looks before it came back do not count.
    look(gone_workers, LOOKS)
    with connected(bus, "w"):
        look(gone_workers, 1)
    look(gone_workers, LOOKS)
    assert state(queue, kept) == "in_progress"


def test_where_nobody_could_go_on_with_them_leases_remain(
    bus: redis.Redis, queue: Jobs, gone_workers: GoneWorkers
) -> None:
    beat(bus, "w")
    beat(bus, "elsewhere", model="another")
    lost = claim(queue, "w")
    with connected(bus, "elsewhere"):
        look(gone_workers, 3 * LOOKS)
        assert state(queue, lost) == "in_progress"
        beat(bus, "replacement")
        with connected(bus, "replacement"):
            look(gone_workers, 1)
            assert state(queue, lost) == "queued"


def test_a_worker_of_an_older_version_keeps_its_leases(
    bus: redis.Redis, queue: Jobs, gone_workers: GoneWorkers, other: str
) -> None:
    beat(bus, "old")
    bus.hdel(keys.worker("old"), BEATS)
    kept = claim(queue, "old")
    look(gone_workers, 3 * LOOKS)
    assert state(queue, kept) == "in_progress"


def test_a_heartbeat_at_the_last_moment_keeps_the_jobs(
    bus: redis.Redis, queue: Jobs, gone_workers: GoneWorkers
) -> None:
    beat(bus, "w")
    kept = claim(queue, "w")
    beat(bus, "w")
    gone_workers.hand_on("w", b"1")
    assert state(queue, kept) == "in_progress"
    assert bus.exists(keys.worker("w"))
    gone_workers.hand_on("w", b"2")
    assert state(queue, kept) == "queued"


def test_the_leases_of_a_thousand_jobs_end(bus: redis.Redis) -> None:
    """More than one slice of them."""
    queue = Jobs(bus, bus, Settings(lease_s=600))
    gone_workers = GoneWorkers(queue)
    beat(bus, "w")
    job_ids = [claim(queue, "w") for _ in range(1100)]
    gone_workers.hand_on("w", b"1")
    assert bus.zcard(keys.LEASES) == 0
    assert bus.zcard(keys.backlog("m", "interactive")) == len(job_ids)


def test_a_worker_that_comes_back_finds_its_jobs_lost(
    bus: redis.Redis, queue: Jobs, gone_workers: GoneWorkers
) -> None:
    beat(bus, "w")
    queue.backlog.submit(Job(new_id(), "m", "/v1/completions", b"{}"))
    claimed = queue.backlog.claim("m", "w")
    assert claimed
    assert queue.backlog.renew([claimed]) == []
    gone_workers.hand_on("w", b"1")
    assert queue.backlog.renew([claimed]) == [claimed]
