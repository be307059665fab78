"""What a worker writes reaches the log whole, also when Redis has lost some of it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis

from bench.stack import Stack, await_that
from gpu_worker import publisher as publishing
from gpu_worker.publisher import Feed, Publisher, Refusal
from tasks.contract import keys
from tasks.contract.connections import connect_async
from tasks.contract.events import Attempt, Entry, Kind, Position
from tasks.contract.job import Claim, Job
from tasks.contract.settings import get_settings
from tasks.queue.backlog import load_script
from tasks.queue.token_log import Addressed, TokenLog, append_arguments

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}  # as workers do


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


MOST_BYTES = 2**20
TOO_LARGE = b"x" * 2 * MOST_BYTES


@pytest.fixture
def small_bus(bus: redis.Redis) -> Iterator[redis.Redis]:
    """A Redis that closes the connection on which somebody sends more than MOST_BYTES at once."""
    name = "proto-max-bulk-len"
    before: Any = bus.config_get(name)
    bus.config_set(name, MOST_BYTES)
    yield bus
    bus.config_set(name, before[name])


async def test_what_redis_does_not_take_holds_up_nobody_else(
    small_bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    large, other = writing.feed("job_1"), writing.feed("job_2")
    other.put((Kind.BODY, b"0", b""))
    large.put((Kind.BODY, TOO_LARGE, b""))
    large.put((Kind.END, b"", b""))
    assert await asyncio.wait_for(write(other, range(1, 20)), 60)
    assert words(log, "job_2") == list(range(20))
    assert large.refusal is Refusal.UNWRITABLE
    assert writing.stopped == [large.attempt]
    # Nothing of what comes after it either: a log has no gaps.
    assert not await write(large, range(3))
    assert log.read_after("job_1") == []


async def test_what_was_written_before_stays_and_can_be_gone_on_from(
    small_bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    feed = writing.feed()
    assert await write(feed, range(5))
    feed.put((Kind.BODY, TOO_LARGE, b""))
    assert not await asyncio.wait_for(feed.written(), 60)
    takeover = log.take_over("job_1", 2, "")[-1]
    assert await write(writing.feed("job_1", 2, takeover.data), range(5, 8))
    assert words(log) == list(range(8))


async def test_a_log_that_something_else_has_become_holds_up_nobody_else(
    bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    broken, other = writing.feed("job_1"), writing.feed("job_2")
    bus.set(keys.log("job_1"), "no stream")
    broken.put((Kind.BODY, b"0", b""))
    assert await asyncio.wait_for(write(other, range(3)), 60)
    assert broken.refusal is Refusal.UNWRITABLE
    assert writing.stopped == [broken.attempt]


async def test_what_was_written_before_an_error_is_published(
    bus: redis.Redis, log: TokenLog
) -> None:
    bus.set(keys.log("job_2"), "no stream")
    entries = [Entry(f"job_{n}", Position(1, 0), Kind.BODY, b"0", b"") for n in (1, 2)]
    arguments = append_arguments([Addressed(entry, "here") for entry in entries], get_settings())
    with bus.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(keys.relay("here"))
        await_that(lambda: bus.pubsub_numsub(keys.relay("here"))[0][1] == 1)
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            load_script(bus, "append")(**arguments)
        assert words(log) == [0]
        await_that(listener.get_message)


def _fill(bus: redis.Redis) -> None:
    bus.config_set("maxmemory", 1)


def _fill_nearly(bus: redis.Redis) -> None:
    """What is small still fits."""
    used: Any = bus.info("memory")
    bus.config_set("maxmemory", used["used_memory"] + MOST_BYTES)


def _follow(bus: redis.Redis) -> None:
    bus.replicaof("127.0.0.1", 1)


def _miss_replicas(bus: redis.Redis) -> None:
    bus.config_set("min-replicas-to-write", 1)


def _pause_writes(bus: redis.Redis) -> None:
    """As Redis does by itself while a replica takes its place: all else is answered."""
    bus.client_pause(60_000, all=False)


def _recover(bus: redis.Redis) -> None:
    bus.client_unpause()  # type: ignore[no-untyped-call]
    bus.replicaof("NO", "ONE")
    bus.config_set("maxmemory", 0)
    bus.config_set("min-replicas-to-write", 0)


@pytest.mark.parametrize(
    ("take_no_writes", "for_s"),
    [(_fill, 3), (_fill_nearly, 3), (_follow, 3), (_miss_replicas, 3), (_pause_writes, 8)],
)
async def test_a_redis_that_takes_nothing_at_the_moment_is_waited_for(
    bus: redis.Redis, log: TokenLog, writing: Writing, take_no_writes: Any, for_s: float
) -> None:
    large, other = writing.feed("job_1"), writing.feed("job_2")
    assert await write(other, range(3))
    take_no_writes(bus)
    try:
        large.put((Kind.BODY, TOO_LARGE, b""))
        await asyncio.sleep(for_s)
        assert log.read_after("job_1") == []
    finally:
        _recover(bus)
    assert await write(other, range(3, 6))
    assert words(log, "job_2") == list(range(6))
    assert [e.data for e in log.read_after("job_1")] == [TOO_LARGE]
    assert writing.stopped == []


@pytest.mark.parametrize("piece", [b"0", TOO_LARGE])
async def test_a_redis_that_stalls_again_and_again_refuses_nothing(
    log: TokenLog, server: Stack, piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers in between, but always just too late for the tokens."""
    stalls = 8

    def load_stalling(bus: Any, name: str) -> Any:
        append = load_script(bus, name)

        async def call(**arguments: Any) -> Any:
            nonlocal stalls
            stalls -= 1
            if stalls >= 0:
                raise redis.TimeoutError("Timeout reading from socket")
            return await append(**arguments)

        return call

    monkeypatch.setattr(publishing, "load_script", load_stalling)
    writing = Writing(f"redis://127.0.0.1:{server.redis_port}/0")
    feed = writing.feed()
    feed.put((Kind.BODY, piece, b""))
    assert await asyncio.wait_for(feed.written(), 60)
    assert stalls < 0
    assert writing.stopped == []
    assert [e.data for e in log.read_after("job_1")] == [piece]
    await writing.close()


async def test_what_comes_before_a_refused_answer_is_written(
    small_bus: redis.Redis, log: TokenLog, writing: Writing
) -> None:
    feed = writing.feed()
    feed.put((Kind.BODY, b"0", b""))
    feed.put((Kind.BODY, TOO_LARGE, b""))
    feed.put((Kind.BODY, b"1", b""))
    assert not await asyncio.wait_for(feed.written(), 60)
    assert words(log) == [0]
    assert writing.stopped == [feed.attempt]
