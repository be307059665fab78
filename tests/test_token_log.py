"""The token log on a real Redis: entries follow without a gap, and nobody late adds any."""

import itertools
import threading
from collections.abc import Callable

import pytest
import redis

from bench.stack import await_that
from tasks.contract import keys
from tasks.contract.events import End, Entry, Kind, Position, Start, decode_frame, encode_head
from tasks.contract.job import State
from tasks.contract.settings import Settings
from tasks.queue.backlog import load_script
from tasks.queue.token_log import Addressed, TokenLog, append_arguments

SETTINGS = Settings()
JOB = "job_1"
KEY = keys.log(JOB)

Append = Callable[..., list[int | bytes]]


@pytest.fixture
def log(bus: redis.Redis) -> TokenLog:
    return TokenLog(bus, SETTINGS)


@pytest.fixture
def append(bus: redis.Redis) -> Append:
    script = load_script(bus, "append")

    def append(*entries: Entry, listener: str = "") -> list[int | bytes]:
        batch = [Addressed(entry, listener) for entry in entries]
        return list(script(**append_arguments(batch, SETTINGS)))

    return append


def _entry(attempt: int, seq: int, kind: Kind = Kind.BODY, data: bytes = b"x") -> Entry:
    return Entry(JOB, Position(attempt, seq), kind, data)


def _entries(attempt: int, seqs: range) -> list[Entry]:
    return [_entry(attempt, seq) for seq in seqs]


def _positions(log: TokenLog) -> list[str]:
    return [str(entry.position) for entry in log.read_after(JOB)]


def test_a_log_lives_on_while_it_is_written(bus: redis.Redis, append: Append) -> None:
    """A stream that ran for longer than the TTL lost its log, and began anew for ever."""
    append(_entry(1, 0, Kind.START, Start(200, [], 0, 1).encode()))
    bus.expire(KEY, 5)
    append(_entry(1, 1))
    assert bus.ttl(KEY) > 5  # type: ignore[operator]


def test_entries_are_read_as_they_were_written(log: TokenLog, append: Append) -> None:
    head = Start(200, [("content-type", "text/plain")], 3, 1)
    assert append(_entry(1, 0, Kind.START, head.encode()), _entry(1, 1)) == []
    log.end(JOB, 1, End(State.CANCELLED), "")
    entries = log.read_after(JOB)
    assert _positions(log) == ["1-0", "1-1", "2-0"]
    assert Start.decode(entries[0].data) == head
    assert End.decode(entries[-1].data).state is State.CANCELLED
    assert log.read_after(JOB, Position(1, 1)) == entries[2:]
    assert log.last(JOB) == entries[-1]


def test_a_zombies_late_entries_are_refused(log: TokenLog, append: Append) -> None:
    append(*_entries(1, range(2)))
    log.end(JOB, 1, End(State.CANCELLED), "")
    assert append(_entry(1, 2)) == [1, b"stale"]
    assert _positions(log) == ["1-0", "1-1", "2-0"]


def test_a_gap_is_refused_with_the_place_where_it_begins(log: TokenLog, append: Append) -> None:
    append(*_entries(1, range(3)))
    assert append(_entry(1, 4), _entry(1, 5)) == [1, b"1-2", 2, b"1-2"]
    assert append(_entry(2, 1)) == [1, b"1-2"]
    assert _positions(log) == ["1-0", "1-1", "1-2"]
    assert append(_entry(1, 3), _entry(1, 4), _entry(2, 0), _entry(2, 1)) == []
    assert _positions(log) == ["1-0", "1-1", "1-2", "1-3", "1-4", "2-0", "2-1"]


def test_a_log_that_is_gone_is_not_begun_in_the_middle(bus: redis.Redis, append: Append) -> None:
    append(*_entries(1, range(3)))
    bus.delete(KEY)
    assert append(_entry(1, 3)) == [1, b""]
    assert append(_entry(2, 1)) == [1, b""]
    assert not bus.exists(KEY)
    assert append(*_entries(1, range(4))) == []


def test_what_is_sent_again_is_written_and_published_once(
    bus: redis.Redis, log: TokenLog, append: Append
) -> None:
    entries = _entries(1, range(4))
    with bus.pubsub(ignore_subscribe_messages=True) as subscription:
        subscription.subscribe(keys.relay("api"))
        await_that(lambda: bus.pubsub_numsub(keys.relay("api"))[0][1] == 1)
        assert append(*entries[:2], listener="api") == []
        for _ in range(2):
            assert append(*entries, listener="api") == []
        messages: list[dict[str, bytes]] = []
        for number in (1, 2):
            await_that(lambda: messages.append(subscription.get_message()) or messages[-1])
            published = list(decode_frame(messages[-1]["data"]))
            assert published == (entries[:2] if number == 1 else entries[2:])
        assert subscription.get_message(timeout=0.2) is None
    assert log.read_after(JOB) == entries
    assert append(_entry(1, 4)) == []


def test_what_is_refused_is_not_published(bus: redis.Redis, log: TokenLog, append: Append) -> None:
    with bus.pubsub(ignore_subscribe_messages=True) as subscription:
        subscription.subscribe(keys.relay("api"))
        await_that(lambda: bus.pubsub_numsub(keys.relay("api"))[0][1] == 1)
        fresh = Entry("job_2", Position(1, 0), Kind.BODY, b"seen")
        gap = Entry("job_3", Position(1, 3), Kind.BODY, b"gap")
        log.take_over(JOB, 2, "")
        refused = append(_entry(1, 5), fresh, gap, listener="api")
        assert refused == [1, b"stale", 3, b""]
        messages: list[dict[str, bytes]] = []
        await_that(lambda: messages.append(subscription.get_message()) or messages[-1])
        assert list(decode_frame(messages[-1]["data"])) == [fresh]


def test_a_takeover_returns_what_was_written_before_and_fences_it(
    log: TokenLog, append: Append
) -> None:
    append(_entry(1, 0, Kind.START), Entry(JOB, Position(1, 1), Kind.BODY, b"x", b"[1]"))
    for _ in range(2):
        assert [e.record for e in log.take_over(JOB, 2, "")] == [b"", b"[1]", b""]
    assert append(_entry(1, 2)) == [1, b"stale"]
    assert append(_entry(2, 1)) == []


def test_a_takeover_records_what_it_goes_on_from(log: TokenLog, append: Append) -> None:
    append(*_entries(1, range(12)))
    for _ in range(2):
        assert log.take_over(JOB, 2, "")[-1] == _entry(2, 0, Kind.TAKEOVER, b"1-11")
    log.take_over(JOB, 3, "")
    assert log.last(JOB) == _entry(3, 0, Kind.TAKEOVER, b"2-0")
    assert log.take_over("job_2", 2, "")[-1].data == b""


@pytest.mark.parametrize("number", range(20))
def test_a_takeover_misses_nothing_that_a_zombie_writes_meanwhile(
    bus: redis.Redis, log: TokenLog, append: Append, number: int
) -> None:
    seqs = itertools.count()

    def write_on() -> None:
        while not append(_entry(1, next(seqs))):
            pass

    zombie = threading.Thread(target=write_on)
    zombie.start()
    await_that(lambda: bus.xlen(KEY) > number)
    *written, takeover = log.take_over(JOB, 2, "")
    zombie.join()
    assert takeover.data.decode() == str(written[-1].position)
    assert log.read_after(JOB) == [*written, takeover]


def test_a_log_is_kept_for_as_long_as_its_end_is_not_recorded(
    bus: redis.Redis, log: TokenLog, append: Append
) -> None:
    append(_entry(1, 0))
    assert 0 < bus.ttl(KEY) <= SETTINGS.job_ttl_s
    append(_entry(1, 1, Kind.END, End(State.COMPLETED).encode()))
    assert bus.ttl(KEY) == -1
    log.end("job_2", 1, End(State.CANCELLED), "")
    assert bus.ttl(keys.log("job_2")) == -1


def test_a_second_end_does_not_keep_a_log_that_sql_has(
    bus: redis.Redis, log: TokenLog, append: Append
) -> None:
    start = _entry(1, 0, Kind.START, Start(200, [], 0, 1).encode())
    append(start, _entry(1, 1, Kind.END, End(State.COMPLETED).encode()))
    log.expire([JOB])
    log.end(JOB, 1, End(State.CANCELLED), "")
    assert [entry.kind for entry in log.read_after(JOB)][-2:] == [Kind.END, Kind.END]
    assert bus.ttl(KEY) > 0


def test_frames_carry_any_bytes() -> None:
    entries = [
        Entry("job_1", Position(1, 0), Kind.START, b"[]"),
        Entry("job_2", Position(2**31, 7), Kind.BODY, bytes(range(256))),
        Entry("job_1", Position(1, 1), Kind.END, b""),
    ]
    values = [entry.encode_value() for entry in entries]
    frame = b"".join(
        encode_head(entry.job_id.encode(), *entry.position, value) + value
        for entry, value in zip(entries, values, strict=True)
    )
    assert list(decode_frame(frame)) == entries


def test_what_stands_in_a_logs_place_gives_way_to_its_next_attempt_and_its_end(
    bus: redis.Redis, log: TokenLog
) -> None:
    """A worker tried again for ever."""
    bus.set(KEY, "no stream")
    assert [entry.kind for entry in log.take_over(JOB, 2, "")] == [Kind.TAKEOVER]
    bus.set(KEY, "no stream")
    log.end(JOB, 2, End(State.FAILED), "")
    assert _positions(log) == ["3-0"]
