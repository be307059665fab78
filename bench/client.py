"""The load client: a process of its own, so that its CPU time can be told from the servers'.

Reads a Load from stdin, drives the server with it, and writes a Measurement to stdout. It speaks
HTTP/1.1 over raw sockets with the least parsing that is correct, and without the garbage collector,
because it shares the machine's cores with what it measures.
"""

import asyncio
import gc
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import cast

from bench.load import Load, Measurement, percentile_ms
from bench.reply import Reply


class Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request on it."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport
        self._reply: Reply
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by type
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._answered is None:
            self._transport.abort()  # nothing was asked
            return
        self._reply.feed(data, now_s)
        if self._reply.is_complete:
            self._finish()

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_open = False
        self._finish()

    async def ask(self, request: bytes) -> Reply:
        """Sends the request and returns its reply, which may be incomplete if the server left."""
        self._reply = Reply(time.perf_counter())
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._answered
        self._answered = None
        if self._reply.closes_connection:
            self.close()
        return self._reply

    def close(self) -> None:
        self.is_open = False
        self._transport.close()

    def _finish(self) -> None:
        if self._answered and not self._answered.done():
            self._answered.set_result(None)


async def drive(load: Load) -> tuple[list[Reply], float]:
    """All replies, and the seconds from the first request to the last reply."""
    requests = iter(load.http_requests())
    replies: list[Reply] = []
    connections = [await _connect(load.port) for _ in range(load.streams)]
    gc.collect()
    gc.freeze()
    gc.disable()
    start_s = time.perf_counter()
    streams = [
        asyncio.create_task(_stream(load.port, connection, requests, replies))
        for connection in connections
    ]
    await _wait(streams, replies, load.stall_s)
    return replies, time.perf_counter() - start_s


async def _connect(port: int) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


async def _stream(
    port: int, connection: Connection, requests: Iterator[bytes], replies: list[Reply]
) -> None:
    for request in requests:
        if not connection.is_open:
            try:
                connection = await _connect(port)
            except OSError:
                return  # the server is gone; what was not sent counts as not answered
        replies.append(await connection.ask(request))
    connection.close()


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
    stamps = [reply.text_at_s for reply in good if reply.text_at_s]
    ttfts_s = [reply.text_at_s[0] - reply.asked_at_s for reply in good if reply.text_at_s]
    gaps_s = [after - before for times in stamps for before, after in pairwise(times)]
    tpots_s = [(times[-1] - times[0]) / (load.max_tokens - 1) for times in stamps]
    return Measurement(
        wall_s=wall_s,
        completed=len(good),
        tokens=sum(reply.tokens for reply in good),
        ttft_p50_ms=percentile_ms(ttfts_s, 50),
        ttft_p99_ms=percentile_ms(ttfts_s, 99),
        gap_p50_ms=percentile_ms(gaps_s, 50),
        gap_p99_ms=percentile_ms(gaps_s, 99),
        tpot_p50_ms=percentile_ms(tpots_s, 50),
        tpot_p99_ms=percentile_ms(tpots_s, 99),
        client_cpu_s=cpu_s,
        errors=dict(errors),
    )


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
    if reply.tokens != load.max_tokens:
        return f"{reply.tokens} tokens instead of {load.max_tokens}"
    return ""


if __name__ == "__main__":
    print(measure(Load.decode(sys.stdin.readline())).encode())
