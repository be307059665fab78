"""The one ticket that waits for all jobs of a model reaches a worker that has room for them."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from bench.stack import await_that
from gpu_worker.claims import Claims
from gpu_worker.dispatcher import Dispatcher
from tasks.contract import keys
from tasks.contract.job import Job, Room
from tasks.contract.models import Model
from tasks.contract.settings import Settings
from tasks.queue.backlog import Backlog

SLOTS = 4
MODEL = Model(name="m", engine="sim", slots=SLOTS, interactive_reserve=0)


@pytest.fixture
def backlog(bus: redis.Redis) -> Backlog:
    return Backlog(bus, Settings())


def _job(name: str, sequences: int) -> Job:
    return Job(name, "m", "/v1/completions", b"{}", sequences=sequences)


def test_a_busy_worker_leaves_the_ticket_of_a_job_that_fits_only_elsewhere(
    backlog: Backlog,
) -> None:
    """The job waited until maintenance missed the ticket, seconds later."""
    claims = Claims(SLOTS)
    backlog.submit(_job("job_narrow", 1))
    (running,) = claims.take(lambda _: [backlog.claim("m", "w1")]) or []  # type: ignore[list-item]
    backlog.submit(_job("job_wide", SLOTS))
    backlog.redis.delete(keys.tickets("m"))
    # What a dispatcher knows of its worker; nothing runs here.
    worker: Any = SimpleNamespace(
        id="w1", model=MODEL, claims=claims, backlog=backlog, persist=lambda write: write()
    )
    dispatcher = Dispatcher(worker)
    with ThreadPoolExecutor(2) as pool, dispatcher:
        elsewhere = pool.submit(backlog.redis.brpop, [keys.tickets("m")], 4)
        await_that(lambda: backlog.redis.info("clients")["blocked_clients"] == 1)
        busy = pool.submit(dispatcher.serve_ticket, "m")
        is_passed_on = elsewhere.result() is not None
        claims.release(running)
        busy.result()
    assert is_passed_on
    room = Room(SLOTS, SLOTS)
    (wide,) = backlog.claim_several("m", "w2", "token", room, reserve=0, most=1)
    assert wide.job.id == "job_wide"
