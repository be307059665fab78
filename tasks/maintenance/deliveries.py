"""Calls webhooks as they fall due, at least once; a receiver knows a repeat by its `webhook-id`.

Calls run at once on an event loop in a thread: when one ends, the next that is due begins. A claim
is taken just before its call. The claims of a process that dies expire, and calls that were
not recorded in SQL are made again.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from db import migrate
from db.models import WebhookAttempt
from db.webhooks import Claimed, Due, Noted, claim, due, give_back, note_attempts
from tasks.contract import open_files, tracing
from tasks.contract.settings import Settings
from tasks.maintenance.traces import record_calls
from tasks.maintenance.webhooks import Sender, decide, make_event
from tasks.queue import counts
from tasks.queue.counts import Counted

log = logging.getLogger(__name__)

POLL_S = 0.5
# A receiver that hangs keeps a place for 15 s: there are places for a thousand of them.
AT_ONCE = 1200
# Enough for 40 calls a second to a receiver that takes 0.2 s for each. Once half of all places are
# taken, a receiver that has one gets no other: the rest is for those that nobody has called yet.
AT_ONE_RECEIVER = 8
# Bounds one read; the next one starts after it.
RECEIVERS_PER_READ = 500
# Longer than a call lasts and SQL is usually away.
HOLD_S = 60.0
STOP_S = 2.0
RESTART_S = 5.0


class Deliverer:
    """Makes the calls that are due in SQL; one per process."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._settings = settings
        self._url = settings.database_url
        self._redis = redis
        # The other half is for the rest of the process.
        self._places = min(AT_ONCE, open_files.allow(2 * AT_ONCE) // 2)
        self._calls: dict[asyncio.Task[None], Claimed] = {}
        self._ended: list[Noted] = []
        self._uncounted: Counter[str] = Counter()
        self._after = ""
        self._is_migrated = False
        self._is_away = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends within seconds; calls that have not ended then are made again, by any process."""
        self._is_stopping = True
        self._thread.join(2 * STOP_S)

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                asyncio.run(self._deliver())
            except Exception:
                log.exception("webhooks: no calls for %g s", RESTART_S)
                time.sleep(RESTART_S)

    async def _deliver(self) -> None:
        # The state of a loop that has failed is of no use to this one.
        self._sender, self._calls, self._has_ended = Sender(self._settings), {}, asyncio.Event()
        while not self._is_stopping:
            self._has_ended.clear()
            if not await self._begin_due():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._has_ended.wait(), POLL_S)
        await self._end()

    async def _begin_due(self) -> bool:
        """Records calls that have ended and starts due ones; whether there may be more of them.

        While the database is away one warning is logged: due calls wait there, ended ones here.
        """
        busy = Counter(claimed.delivery.receiver for claimed in self._calls.values())
        try:
            begun, is_more = await asyncio.to_thread(self._exchange, busy)
        except (SQLAlchemyError, OSError) as away:
            if not self._is_away:
                log.warning("webhooks: the database is away, calls wait: %s", away)
            self._is_away = True
            return False
        if self._is_away:
            log.info("webhooks: the database is back")
        self._is_away = False
        for claimed in begun:
            call = asyncio.create_task(self._call(claimed))
            self._calls[call] = claimed
            call.add_done_callback(self._note_end)
        return is_more

    def _exchange(self, busy: Counter[str]) -> tuple[list[Claimed], bool]:
        if not self._is_migrated:
            migrate(self._url)
            self._is_migrated = True
        self._note()
        if busy.total() >= self._places:
            return [], False
        found = due(self._url, self._after, RECEIVERS_PER_READ)
        self._after = found[-1].receiver if len(found) == RECEIVERS_PER_READ else ""
        chosen = choose(found, busy, self._places)
        claimed = claim(self._url, [one.job_id for one in chosen if one.job_id], HOLD_S)
        if busy.total() + len(chosen) >= self._places:
            # The receiver after these gets the next free place.
            self._after = chosen[-1].receiver
        return claimed, bool(claimed or self._after)

    def _note(self) -> None:
        """Records calls that have ended; keeps them for the next time if that fails."""
        ended = self._ended[:]
        note_attempts(self._url, ended)
        # Meanwhile the loop has only appended.
        del self._ended[: len(ended)]
        self._uncounted.update(note.state for note in ended)
        with suppress(RedisError):
            for state in list(self._uncounted):
                counts.add(self._redis, Counted.WEBHOOKS, state, times=self._uncounted[state])
                del self._uncounted[state]
        record_calls(ended)

    async def _call(self, claimed: Claimed) -> None:
        delivery, traceparent = claimed
        at = datetime.now(UTC)
        event_id, body = make_event(delivery.job_id, delivery.type, delivery.created_at)
        outcome = await self._sender.send(event_id, delivery.url, body, at)
        attempt = WebhookAttempt(
            job_id=delivery.job_id,
            attempt=delivery.attempts + 1,
            at=at,
            status_code=outcome.status_code,
            error=outcome.error,
            duration_ms=outcome.duration_ms,
        )
        state, wait_s = decide(outcome, attempt.attempt)
        self._ended.append(Noted(attempt, state, wait_s, traceparent))
        # Its URL may hold a secret too.
        form = "webhook %s: %s in attempt %d after %d ms, now %s"
        what = event_id, outcome.summary, attempt.attempt, outcome.duration_ms, state
        about = {"job": delivery.job_id, **tracing.log_fields(traceparent)}
        log.info(form, *what, extra=about)

    def _note_end(self, call: asyncio.Task[None]) -> None:
        self._calls.pop(call, None)
        self._has_ended.set()

    async def _end(self) -> None:
        if self._calls:
            await asyncio.wait(self._calls, timeout=STOP_S)
        unfinished = dict(self._calls)
        for call in unfinished:
            call.cancel()
        deliveries = [claimed.delivery for claimed in unfinished.values()]
        try:
            await asyncio.to_thread(self._note)
            await asyncio.to_thread(give_back, self._url, deliveries)
        except (SQLAlchemyError, OSError) as away:
            calls = len(self._ended) + len(unfinished)
            log.warning("webhooks: %d calls are made again, SQL is away: %s", calls, away)


def choose(found: Sequence[Due], busy: Counter[str], places: int) -> list[Due]:
    """The receivers that get a place: one more each, in order, as long as its share allows."""
    chosen: list[Due] = []
    taken = busy.total()
    for one in found:
        share = AT_ONE_RECEIVER if taken < places // 2 else 1
        if one.job_id is not None and busy[one.receiver] < share and taken < places:
            chosen.append(one)
            taken += 1
    return chosen
