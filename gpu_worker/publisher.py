"""Tokens out: everything that the jobs produced since the last write goes to Redis in one script.

While one write is under way the next batch gathers, so the busier the engine, the larger a batch:
one round trip per engine tick, however many streams there are.
"""

import asyncio
import logging
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tasks.backlog import load_script
from tasks.settings import get_settings
from tasks.token_log import Addressed, append_arguments

log = logging.getLogger(__name__)

RETRY_S = 0.2
# Bounds one script's run in Redis, after a pause that let much gather.
MOST_AT_ONCE = 1000


class Publisher:
    """Writes entries to the token logs and to the relays that listen, on the engine's loop."""

    def __init__(self, bus: Redis, on_refused: Callable[[str], None]) -> None:
        self._append = load_script(bus, "append")
        self._on_refused = on_refused
        self._settings = get_settings()
        self._pending: list[list[Addressed]] = []
        self._wake = asyncio.Event()
        self._put, self._written = 0, 0
        self._progress = asyncio.Event()

    def put(self, entries: list[Addressed]) -> None:
        """Hands over entries; they are written within an engine tick, all of them or none."""
        self._pending.append(entries)
        self._put += 1
        self._wake.set()

    async def written(self) -> None:
        """Returns when Redis has all that was put so far."""
        wanted = self._put
        while self._written < wanted:
            await self._progress.wait()

    async def run(self) -> None:
        """Writes until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                puts = self._pending[:MOST_AT_ONCE]
                del self._pending[:MOST_AT_ONCE]
                await self._write([addressed for entries in puts for addressed in entries])
                self._written += len(puts)
                self._progress.set()
                self._progress = asyncio.Event()

    async def _write(self, batch: list[Addressed]) -> None:
        """Writes the batch, however long Redis is away."""
        arguments = append_arguments(batch, self._settings)
        uncertain = False
        while True:
            try:
                refused = await self._append(**arguments)
                break
            except RedisError as failure:
                log.warning("token log not written, trying again: %s", failure)
                # The write may have happened: an id that is refused now tells nothing.
                uncertain = True
                await asyncio.sleep(RETRY_S)
        if refused and not uncertain:
            for job_id in {batch[place - 1].entry.job_id for place in refused}:
                self._on_refused(job_id)
