"""A client's connections are shared: who waits for one fails only if Redis does not answer."""

import asyncio
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from bench.stack import Stack, slack
from tasks.contract.connections import COMMAND_TIMEOUT_S, MOST_CONNECTIONS, connect, connect_async

COMMAND_S = 0.3
# Of each connection, so that those who come last wait longer than a command may take.
TURNS = 9


@pytest.fixture
def client(server: Stack) -> Iterator[redis.Redis]:
    client = connect(server.env["SLUICE_REDIS_URL"])
    yield client
    client.close()


def test_many_commands_at_once_wait_for_each_other(client: redis.Redis) -> None:
    """Of 500 clients that came at once on a slow machine half got 503."""
    number = TURNS * MOST_CONNECTIONS
    with ThreadPoolExecutor(number) as pool:
        answers = list(pool.map(lambda _: client.blpop(["nothing"], COMMAND_S), range(number)))
    assert answers == [None] * number


def test_no_command_waits_long_for_a_redis_that_does_not_answer(
    server: Stack, client: redis.Redis
) -> None:
    def fail(_: int) -> float:
        begun_s = time.monotonic()
        with pytest.raises((redis.ConnectionError, redis.TimeoutError)):
            client.ping()
        return time.monotonic() - begun_s

    number = 3 * MOST_CONNECTIONS
    process = server.part("redis")
    process.signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(number) as pool:
            waits_s = list(pool.map(fail, range(number)))
    finally:
        process.signal(signal.SIGCONT)
    # The wait, the command and the greeting before it, and one retry of both.
    assert max(waits_s) < slack(5 * COMMAND_TIMEOUT_S)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
async def test_a_client_on_a_loop_sends_every_kind_of_value_as_it_is(server: Stack) -> None:
    values: list[Any] = ["text: é€𝄞", b"\0\xff\r\n", b"", 7, -(2**40), 0.5, b"x" * 100_000]
    values.append(memoryview(b"view"))
    async with connect_async(server.env["SLUICE_REDIS_URL"]) as client:
        echo = await client.register_script("return ARGV")(args=values)
        piped = client.pipeline(transaction=False)
        for value in values:
            piped.echo(value)
        wanted = [str(v).encode() if isinstance(v, str | int | float) else bytes(v) for v in values]
        assert echo == await piped.execute() == wanted
        with pytest.raises(redis.DataError):
            await client.set("key", None)


class Resetting:
    """A Redis that says OK to all, and resets its connections when told to."""

    def __init__(self) -> None:
        self._clients: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._answer, "127.0.0.1", 0) as server:
            yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
            await self.reset()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.append(writer)
        while data := await reader.read(65536):
            writer.write(b"+OK\r\n" * data.count(b"*"))

    async def reset(self) -> None:
        for client in self._clients:
            now = struct.pack("ii", 1, 0)
            client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            client.transport.abort()
        self._clients.clear()
        await asyncio.sleep(0.1)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
async def test_a_connection_that_was_reset_while_idle_is_made_again() -> None:
    """The loop of a worker has an error of its own for it, which ended the worker."""
    server = Resetting()
    async with server.serving() as url, connect_async(url) as client:
        for _ in range(3):
            try:
                await client.set("key", "value")
            except redis.ConnectionError:
                await client.set("key", "value")
            await server.reset()
