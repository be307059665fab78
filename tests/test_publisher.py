"""What a worker writes reaches the log whole, also when Redis has lost some of it."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis

from bench.stack import Stack
from gpu_worker import publisher as publishing
from gpu_worker.publisher import Feed, Publisher, Refusal
from tasks.contract import keys
from tasks.contract.connections import connect_async
from tasks.contract.events import Attempt, Kind
from tasks.contract.job import Claim, Job
from tasks.queue.token_log import TokenLog

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def log(bus: redis.Redis) -> TokenLog:
    return TokenLog(bus)


class Writing:
    """A publisher at work, and the attempts that it stopped."""

    def __init__(self, url: str) -> None:
        self.stopped: list[Attempt] = []
        self._bus = connect_async(url)
        self.publisher = Publisher(self._bus, self.stopped.append)
        self._task = asyncio.ensure_future(self.publisher.run())

    def feed(self, job_id: str = "job_1", attempt: int = 1, continued: bytes = b"") -> Feed:
        claim = Claim(Job(job_id, "m", "/v1/completions", b"{}"), attempt, 0, 0, 3)
        return Feed(self.publisher, claim, continued)

    async def close(self) -> None:
        self._task.cancel()
        await self._bus.aclose()


@pytest.fixture
async def writing(server: Stack, bus: redis.Redis) -> AsyncIterator[Writing]:
    writing = Writing(f"redis://127.0.0.1:{server.redis_port}/0")
    yield writing
    await writing.close()


async def write(feed: Feed, words: range) -> bool:
    """Whether Redis has taken a BODY entry of each number."""
    for word in words:
        feed.put((Kind.BODY, b"%d" % word, b""))
    return await feed.written()


def words(log: TokenLog, job_id: str = "job_1") -> list[int]:
    return [int(e.data) for e in log.read_after(job_id) if e.kind is Kind.BODY]


def saved(bus: redis.Redis, job_id: str = "job_1") -> bytes:
    """The log as it stands now; Redis goes back to it with `lose`."""
    return bytes(bus.dump(keys.log(job_id)) or b"")  # type: ignore[arg-type]


def lose(bus: redis.Redis, then: bytes, job_id: str = "job_1") -> None:
    bus.restore(keys.log(job_id), 0, then, replace=True)


async def test_what_redis_has_lost_is_written_again(
    bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    feed, other = writing.feed(), writing.feed("job_2")
    assert await write(feed, range(50))
    then = saved(bus)
    for start in (50, 100):  # once more of what was written again
        assert await write(feed, range(start, start + 50))
        lose(bus, then)
        assert await write(other, range(start, start + 50))
        assert words(log) == list(range(50))
    assert await write(feed, range(150, 200))
    assert words(log) == list(range(200))
    assert words(log, "job_2") == list(range(50, 150))
    assert writing.stopped == []


async def test_a_log_that_is_gone_is_written_from_its_beginning(
    bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    feed = writing.feed()
    await write(feed, range(publishing.KEPT))
    bus.flushall()
    assert await write(feed, range(publishing.KEPT, publishing.KEPT + 3))
    assert words(log) == list(range(publishing.KEPT + 3))
    assert bus.ttl(keys.log("job_1")) > 0


async def test_an_attempt_that_cannot_fill_its_gap_stops_and_writes_nothing_more(
    bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    feed, other = writing.feed(), writing.feed("job_2")
    await write(feed, range(10))
    then = saved(bus)
    await write(feed, range(10, 12 + publishing.KEPT))
    lose(bus, then)
    other.put((Kind.BODY, b"1", b""))
    assert not await write(feed, range(3))
    assert feed.refusal is Refusal.GAP
    assert writing.stopped == [feed.attempt]
    assert not await write(feed, range(3))
    assert words(log) == list(range(10))
    assert words(log, "job_2") == [1]


async def test_only_the_attempt_that_is_over_is_stopped(log: TokenLog, writing: Writing) -> None:
    old, other = writing.feed(), writing.feed("job_2")
    await write(old, range(5))
    takeover = log.take_over("job_1", 2, "")[-1]
    new = writing.feed("job_1", 2, takeover.data)
    new.put((Kind.BODY, b"5", b""))
    other.put((Kind.BODY, b"0", b""))
    assert not await write(old, range(90, 95))
    assert old.refusal is Refusal.STALE
    assert writing.stopped == [Attempt("job_1", 1)]
    assert await write(new, range(6, 9))
    assert words(log) == list(range(9))
    assert words(log, "job_2") == [0]


async def test_a_takeover_that_redis_has_lost_is_written_again(
    bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    await write(writing.feed(), range(5))
    then = saved(bus)
    takeover = log.take_over("job_1", 2, "")[-1]
    feed = writing.feed("job_1", 2, takeover.data)
    await write(feed, range(5, 8))
    lose(bus, then)
    assert await write(feed, range(8, 10))
    assert words(log) == list(range(10))
    assert [str(e.position) for e in log.read_after("job_1")][5:7] == ["2-0", "2-1"]


async def test_an_attempt_whose_own_basis_is_lost_stops(
    bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    first = writing.feed()
    await write(first, range(3))
    then = saved(bus)
    await write(first, range(3, 5))
    takeover = log.take_over("job_1", 2, "")[-1]
    feed = writing.feed("job_1", 2, takeover.data)
    await write(feed, range(5, 8))
    lose(bus, then)
    assert not await write(feed, range(8, 10))
    assert feed.refusal is Refusal.GAP
    assert words(log) == list(range(3))


async def test_more_than_one_write_can_take_is_written_again_in_order(
    bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    feeds = [writing.feed(f"job_{number}") for number in range(8)]
    for feed in feeds:
        await write(feed, range(400))
    bus.flushall()
    for feed in feeds:
        feed.put((Kind.BODY, b"400", b""))
    assert await feeds[-1].written()
    assert all(words(log, f"job_{n}") == list(range(401)) for n in range(8))
