"""Tokens out: everything that the jobs produced since the last write goes to Redis in one script.

While one write is under way the next batch gathers, so the busier the engine, the larger a batch:
one round trip per engine tick, however many streams there are.

Recent writes are kept: to a Redis that comes back without its last second they are written again.

A Redis that is away, full, or takes no writes for another reason is waited for. But what it does
not take while it takes other writes would hold up all jobs for ever: its attempt is stopped.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as UnconnectedError
from redis.exceptions import NoPermissionError, OutOfMemoryError, RedisError
from redis.exceptions import TimeoutError as UnansweredError

from tasks.contract import keys
from tasks.contract.events import Attempt, Kind
from tasks.contract.job import Claim
from tasks.contract.settings import get_settings
from tasks.queue.backlog import load_script
from tasks.queue.token_log import Encoder, Wire, wire_arguments

log = logging.getLogger(__name__)

RETRY_S = 0.2
# So often in a row Redis takes another write and not this one before it is given up.
MOST_FAILURES = 3
PROBE_MS = 10_000
# What is no larger is not why a connection breaks: no limit of Redis can be set lower.
SMALL_BYTES = 2**16
# Bounds one script's run in Redis, after a pause in which many entries gathered.
MOST_AT_ONCE = 1000
# Of each attempt: more than the fastest engine makes in the two seconds that Redis may lose.
KEPT = 500


class Refusal(Enum):
    """Why a log takes nothing more from an attempt."""

    STALE = "a later attempt has written"
    GAP = "its log has lost entries that are not kept any more"
    UNWRITABLE = "Redis does not take what it has answered"


class NotTakenError(Exception):
    """Redis takes writes, but not this one."""


class Feed:
    """What one attempt writes into its job's log: numbered, and lately written entries kept."""

    def __init__(self, publisher: "Publisher", claim: Claim, continued: bytes = b"") -> None:
        self.attempt = Attempt.of(claim)
        self.refusal: Refusal | None = None
        self._publisher = publisher
        self._encoder = Encoder(self.attempt, claim.job.listener)
        self._continued = continued
        self._next_seq = 0
        self._kept: deque[Wire] = deque(maxlen=KEPT)
        self._written = 0
        if claim.attempt > 1:
            # Its first entry is in the log since the takeover.
            self.note_written([self._encode(Kind.TAKEOVER, continued)])

    def put(self, *pieces: tuple[Kind, bytes, bytes]) -> None:
        """Hands over entries (kind, data, record) that are written together or not at all."""
        if self.refusal is None:
            self._publisher.put(self, [self._encode(*piece) for piece in pieces])

    async def written(self) -> bool:
        """Returns when Redis has all that was put so far; False: it has refused it."""
        await self._publisher.written()
        return self.refusal is None

    def note_written(self, entries: Sequence[Wire]) -> None:
        """Redis has these entries, the next ones of the attempt."""
        self._kept.extend(entries)
        self._written += len(entries)

    def take_back(self, last: bytes) -> list[Wire]:
        """What Redis had after the entry with that id, and has lost; [] if it is not kept."""
        attempt, _, seq = last.partition(b"-")
        if last == self._continued:
            there = 0
        elif attempt == b"%d" % self.attempt.number:
            there = int(seq) + 1
        else:
            return []
        count = self._written - there
        if count > len(self._kept):
            return []
        self._written = there
        return [self._kept.pop() for _ in range(count)][::-1]

    def _encode(self, kind: Kind, data: bytes, record: bytes = b"") -> Wire:
        wire = self._encoder.encode(self._next_seq, kind, data, record)
        self._next_seq += 1
        return wire


Put = tuple[Feed, list[Wire]]


class Publisher:
    """Writes entries to the token logs and to the relays that listen, on the engine's loop."""

    def __init__(self, bus: Redis, on_refused: Callable[[Attempt], None]) -> None:
        self._bus = bus
        self._append = load_script(bus, "append")
        self._on_refused = on_refused
        self._settings = get_settings()
        self._pending: list[Put] = []
        self._wake = asyncio.Event()
        self._put, self._written = 0, 0
        self._progress = asyncio.Event()

    def put(self, feed: Feed, entries: list[Wire]) -> None:
        """Hands over entries; they are written within an engine tick, all of them or none."""
        self._pending.append((feed, entries))
        self._put += 1
        self._wake.set()

    async def written(self) -> None:
        """Returns when all that was put so far is written or refused."""
        wanted = self._put
        while self._written < wanted:
            await self._progress.wait()

    async def run(self) -> None:
        """Writes until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            puts, self._pending = self._pending, []
            await self._write(puts)
            self._written += len(puts)
            self._progress.set()
            self._progress = asyncio.Event()

    async def _write(self, puts: list[Put]) -> None:
        """Writes the puts, and before them what Redis has lost."""
        while puts:
            now = [put for put in puts[:MOST_AT_ONCE] if not put[0].refusal]
            puts = puts[MOST_AT_ONCE:]
            try:
                refused = await self._send([entry for _, entries in now for entry in entries])
            except NotTakenError as failure:
                await self._single_out(now, failure)
                continue
            lost = self._take_back(now, refused) if refused else {}
            for feed, entries in now:
                if feed not in lost and not feed.refusal:
                    feed.note_written(entries)
            again = [put for put in now if put[0] in lost]
            puts = [*((f, [e]) for f, entries in lost.items() for e in entries), *again, *puts]

    async def _single_out(self, puts: Sequence[Put], failure: Exception) -> None:
        """Writes each of the puts alone, one of which Redis does not take; refuses it if it is."""
        if len(puts) > 1:
            for put in puts:
                await self._write([put])
            return
        ((feed, _),) = puts
        log.error("job %s: Redis does not take what it has answered: %s", feed.attempt, failure)
        self._refuse(feed, Refusal.UNWRITABLE)

    async def _send(self, batch: Sequence[Wire]) -> list[Any]:
        """Writes the batch, however long Redis is away; returns what append.lua does.

        Raises:
            NotTakenError: it is not away.
        """
        if not batch:
            return []
        arguments = wire_arguments(batch, self._settings)
        failures = 0
        while True:
            try:
                refused: list[Any] = await self._append(**arguments)
                return refused
            except RedisError as failure:
                log.warning("token log not written, trying again: %s", failure)
                await asyncio.sleep(RETRY_S)
                failures = failures + 1 if await self._is_at_fault(failure, batch) else 0
                if failures == MOST_FAILURES:
                    raise NotTakenError(str(failure)) from failure

    async def _is_at_fault(self, failure: RedisError, batch: Sequence[Wire]) -> bool:
        """Whether Redis takes another write, so that its state is not why it did not take this one.

        That says nothing of a Redis that stalls, or is full: something small may be in time, and
        fit. Nor of a connection that broke on something small, or of what no script may do.
        """
        if isinstance(failure, UnansweredError | OutOfMemoryError | NoPermissionError):
            return False
        if isinstance(failure, UnconnectedError) and _size_of(batch) <= SMALL_BYTES:
            return False
        for _ in range(2):
            try:
                await self._bus.set(keys.PROBE, b"", px=PROBE_MS)
            except UnconnectedError:
                continue  # what Redis could not read has it close the connection
            except RedisError:
                return False
            return True
        return False

    def _take_back(self, puts: Sequence[Put], refused: Sequence[Any]) -> dict[Feed, list[Wire]]:
        """What the attempts that were refused can write once more; stops those that cannot."""
        feeds = [feed for feed, entries in puts for _ in entries]
        lost: dict[Feed, list[Wire]] = {}
        for place, reason in zip(refused[::2], refused[1::2], strict=True):
            feed = feeds[place - 1]
            if feed in lost or feed.refusal:
                continue
            if missing := feed.take_back(reason):
                log.warning("job %s: writes %d lost entries again", feed.attempt, len(missing))
                lost[feed] = missing
            else:
                self._refuse(feed, Refusal.STALE if reason == b"stale" else Refusal.GAP)
        return lost

    def _refuse(self, feed: Feed, refusal: Refusal) -> None:
        feed.refusal = refusal
        self._on_refused(feed.attempt)


def _size_of(batch: Sequence[Wire]) -> int:
    return sum(len(part) for wire in batch for part in wire if not isinstance(part, int))
