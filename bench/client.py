"""The load client: a process of its own, so that its CPU time is separate from the servers'.

Reads a Load from stdin, drives the server with it, and writes a Measurement to stdout, after lines
with the number of finished requests. It speaks HTTP/1.1 over raw sockets with the least
parsing that is correct, and without the garbage collector, because it shares the machine's cores
with what it measures.
"""

import asyncio
import functools
import gc
import json
import os
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import cast

from bench.measurement import Load, Measurement, Percentiles
from bench.reply import Reply

PROGRESS_S = 0.5


class Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request on it."""

    def __init__(self, new_reply: Callable[[float], Reply] = Reply) -> None:
        self.is_open = False
        self.reply = new_reply(0)  # to the latest request
        self._new_reply = new_reply
        self._transport: asyncio.Transport
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by type
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._answered is None:
            self._transport.abort()  # no request is pending
            return
        self.reply.feed(data, now_s)
        if self.reply.is_complete:
            self.reply.ended_at_s = now_s
            self._finish()

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_open = False
        self._finish()

    async def ask(self, request: bytes) -> Reply:
        """Sends the request and returns its reply, which may be incomplete if the server left."""
        self.reply = self._new_reply(time.perf_counter())
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._answered
        self._answered = None
        if self.reply.closes_connection:
            self.close()
        return self.reply

    def close(self) -> None:
        self.is_open = False
        self._transport.close()

    def _finish(self) -> None:
        if self._answered and not self._answered.done():
            self._answered.set_result(None)


async def drive(load: Load) -> tuple[list[Reply], float]:
    """All replies, and the seconds from the first request to the last reply."""
    requests = load.http_requests()
    replies: list[Reply] = []
    connections = [await _connect(load) for _ in range(load.streams)]
    gc.collect()
    gc.freeze()
    gc.disable()
    start_s = time.perf_counter()
    apart_s = 1 / load.per_s if load.per_s else 0
    due = iter([(start_s + number * apart_s, one) for number, one in enumerate(requests)])
    streams = [
        asyncio.create_task(_stream(load, connection, due, replies)) for connection in connections
    ]
    reporting = asyncio.create_task(_report(replies))
    await _wait(streams, replies, load.stall_s)
    wall_s = time.perf_counter() - start_s
    reporting.cancel()
    return replies, wall_s


async def _connect(load: Load) -> Connection:
    """A connection; it is not open when the server is gone."""
    try:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, *load.address, ssl=_trust(load)))[1]
    except OSError:
        return Connection()


@functools.cache
def _trust(load: Load) -> ssl.SSLContext | None:
    """Whose certificates count; SSL_CERT_FILE adds others."""
    return ssl.create_default_context() if load.url.startswith("https://") else None


async def _stream(
    load: Load,
    connection: Connection,
    due: Iterator[tuple[float, bytes]],
    replies: list[Reply],
) -> None:
    """One connection; a request that none was free for in time has waited since its time."""
    for due_s, request in due:
        early_s = due_s - time.perf_counter()
        if early_s > 0:
            await asyncio.sleep(early_s)
        if not connection.is_open:
            connection = await _connect(load)
        if not connection.is_open:
            return  # what was not sent counts as not answered
        reply = await connection.ask(request)
        if load.per_s and early_s <= 0:
            reply.asked_at_s = due_s
        replies.append(reply)
    if connection.is_open:
        connection.close()


async def _report(replies: list[Reply]) -> None:
    """Reports the number of replies periodically; exits if the parent has."""
    while True:
        await asyncio.sleep(PROGRESS_S)
        try:
            print(json.dumps({"finished": len(replies)}), flush=True)
        except BrokenPipeError:
            os._exit(1)


async def _wait(streams: list[asyncio.Task[None]], replies: list[Reply], stall_s: float) -> None:
    """Waits for the streams for as long as replies come."""
    pending = set(streams)
    before = -1
    while pending and len(replies) > before:
        before = len(replies)
        done, pending = await asyncio.wait(pending, timeout=stall_s)
        for stream in done:
            stream.result()
    for stream in pending:
        stream.cancel()


def measure(load: Load) -> Measurement:
    """Drives the server and sums up what came back."""
    cpu_start_s = time.process_time()
    replies, wall_s = _new_runner().run(drive(load))
    cpu_s = time.process_time() - cpu_start_s

    errors = Counter(error for reply in replies if (error := _error(reply, load)))
    if missing := load.requests - len(replies):
        errors["no answer"] = missing
    good = [reply for reply in replies if not _error(reply, load)]
    streamed = [reply for reply in good if reply.is_stream]
    gaps_s = [later - at for reply in streamed for at, later in pairwise(reply.text_at_s)]
    tpots_s = [reply.tpot_s for reply in streamed if reply.tokens > 1]
    return Measurement(
        wall_s=wall_s,
        completed=len(good),
        tokens=sum(reply.tokens for reply in good),
        ttft_ms=Percentiles.of_ms([reply.ttft_s for reply in streamed]),
        tpot_ms=Percentiles.of_ms(tpots_s),
        gap_ms=Percentiles.of_ms(gaps_s),
        end_to_end_ms=Percentiles.of_ms([reply.ended_at_s - reply.asked_at_s for reply in good]),
        client_cpu_s=cpu_s,
        errors=dict(errors),
        events=sum(len(reply.text_at_s) for reply in streamed),
        within_sla=sum(_is_within_sla(reply, load) for reply in streamed),
    )


def _is_within_sla(reply: Reply, load: Load) -> bool:
    ttft_ms, tpot_ms = reply.ttft_s * 1000, reply.tpot_s * 1000
    return ttft_ms <= load.sla_ttft_ms and tpot_ms <= load.sla_tpot_ms


def _new_runner() -> asyncio.Runner:
    try:
        import uvloop
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def _error(reply: Reply, load: Load) -> str:
    """What is wrong with the reply; empty if nothing is."""
    if reply.status != 200:
        return f"status {reply.status}: {reply.text[:200]!r}"
    if not reply.is_complete:
        kind = "stream" if reply.is_stream else "body"
        return f"connection closed in mid-{kind}, after {reply.text[-200:]!r}"
    if reply.is_stream and not reply.has_done:
        return "stream without [DONE]"
    fewest = load.max_tokens if load.is_exact else 1
    if not fewest <= reply.tokens <= load.max_tokens:
        return f"{reply.tokens} tokens instead of {load.max_tokens}"
    if reply.is_stream and not reply.text_at_s:
        return "stream without text"
    return ""


if __name__ == "__main__":
    print(measure(Load.decode(sys.stdin.readline())).encode())
