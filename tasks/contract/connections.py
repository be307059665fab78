"""Clients of Redis, with the bounds that keep a request from hanging when Redis does."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff, NoBackoff
from redis.retry import Retry

CONNECT_TIMEOUT_S = 1.0
COMMAND_TIMEOUT_S = 2.0
MOST_CONNECTIONS = 32

_BOUNDS: dict[str, Any] = {
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "socket_timeout": COMMAND_TIMEOUT_S,
    "socket_keepalive": True,
    # A pooled connection that a restart of Redis has closed is detected before it is used.
    "health_check_interval": 10,
}


def connect(url: str) -> redis.Redis:
    """A client whose commands fail after seconds, not minutes; one retry for a stale connection.

    With all its connections in use a command waits for one, as thousands of streams may need.
    """
    retry = Retry(ConstantBackoff(0.05), 1)
    pool = redis.BlockingConnectionPool.from_url(
        url, max_connections=MOST_CONNECTIONS, timeout=COMMAND_TIMEOUT_S, retry=retry, **_BOUNDS
    )
    return redis.Redis(connection_pool=pool)


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for an event loop, without retries: its only user retries in its own way."""
    return redis.asyncio.Redis.from_url(url, retry=AsyncRetry(ConstantBackoff(0), 0), **_BOUNDS)


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
