"""Clients of Redis, with the bounds that keep a request from hanging when Redis does."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, LifoQueue
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff, NoBackoff
from redis.connection import HiredisRespSerializer
from redis.retry import Retry

CONNECT_TIMEOUT_S = 1.0
COMMAND_TIMEOUT_S = 2.0
MOST_CONNECTIONS = 32
# A command waits so long for a connection while others get theirs.
LONGEST_WAIT_S = 30.0
IDLE_WAITS = 2

_BOUNDS: dict[str, Any] = {
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "socket_timeout": COMMAND_TIMEOUT_S,
    "socket_keepalive": True,
    # A pooled connection that a restart of Redis has closed is detected before it is used.
    "health_check_interval": 10,
}


class _IdleConnections(LifoQueue[redis.Connection | None]):
    """Those of a pool that are not in use. Only where none comes back does a wait for one end.

    As long as Redis answers, there is merely much to do. A process that was held up finds all its
    waits over at once, and the answers unread: so it takes two idle waits.
    """

    _returned = 0

    def put_nowait(self, connection: redis.Connection | None) -> None:
        """Takes a connection back; one that has failed is not connected any more."""
        if connection is not None and connection.is_connected:
            self._returned += 1
        super().put_nowait(connection)

    def get(self, block: bool = True, timeout: float | None = None) -> redis.Connection | None:
        """A connection; `timeout` bounds the time without any that is returned."""
        end_s, idle = time.monotonic() + LONGEST_WAIT_S, 0
        while True:
            returned = self._returned
            try:
                return super().get(block, timeout and timeout / IDLE_WAITS)
            except Empty:
                idle = idle + 1 if self._returned == returned else 0
                if idle == IDLE_WAITS or time.monotonic() > end_s:
                    raise


def connect(url: str) -> redis.Redis:
    """A client whose commands fail after seconds, not minutes; one retry for a stale connection.

    With all its connections in use a command waits for one, as thousands of streams may need.
    """
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=MOST_CONNECTIONS,
        timeout=COMMAND_TIMEOUT_S,
        queue_class=_IdleConnections,
        retry=Retry(ConstantBackoff(0.05), 1),
        **_BOUNDS,
    )
    return redis.Redis(connection_pool=pool)


class _PackedByHiredis:
    """Packs commands in C, as blocking connections do; those on a loop do it in Python."""

    _packer = HiredisRespSerializer()

    def pack_command(self, *args: Any) -> list[bytes]:
        packed: list[bytes] = self._packer.pack(*args)
        return packed


class _LoopConnection(_PackedByHiredis, redis.asyncio.Connection):
    pass


class _LoopTlsConnection(_PackedByHiredis, redis.asyncio.SSLConnection):
    pass


class _LoopClient(redis.asyncio.Redis):
    """A client on an event loop, whose lost connections are errors of Redis also with uvloop."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except RuntimeError as failure:
            # uvloop raises it where asyncio has an OSError: the connection was reset while idle.
            if type(failure) is not RuntimeError:
                raise
            raise redis.ConnectionError(str(failure)) from failure


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for an event loop, without retries: its only user retries in its own way."""
    client = _LoopClient.from_url(url, retry=AsyncRetry(ConstantBackoff(0), 0), **_BOUNDS)
    # As an option of `from_url` it would lose to that for TLS.
    if url.startswith("rediss://"):
        client.connection_pool.connection_class = _LoopTlsConnection
    else:
        client.connection_pool.connection_class = _LoopConnection
    return client


def connect_listener(url: str) -> redis.Redis:
    """A client for one blocking subscription, without retries: its user must see disconnects."""
    bounds = _BOUNDS | {"socket_timeout": None, "health_check_interval": 0}
    return redis.Redis.from_url(url, retry=Retry(ConstantBackoff(0), 0), **bounds)


@contextmanager
def connect_once(url: str) -> Iterator[redis.Redis]:
    """A client that tries once, and sends nothing but its commands: for checks of Redis."""
    bounds = {"socket_connect_timeout": CONNECT_TIMEOUT_S, "socket_timeout": COMMAND_TIMEOUT_S}
    client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **bounds)
    try:
        yield client
    finally:
        client.close()


def check_url(url: str) -> None:
    """Raises a ValueError if that is no URL of a Redis; the message does not show the URL."""
    try:
        redis.ConnectionPool.from_url(url).make_connection()
        is_one = re.fullmatch(r"/?\d*", urlsplit(url).path)  # redis-py takes any other for 0
    except (ValueError, TypeError, redis.RedisError):
        is_one = None
    if not is_one or not url.startswith(("redis://", "rediss://")):
        raise ValueError(
            "write it as redis://USER:PASSWORD@HOST:PORT/0 (rediss:// with TLS), "
            "odd characters of the password as %XX"
        )
