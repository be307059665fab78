"""A client's connections are shared: who waits for one fails only if Redis does not answer."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from bench.stack import Stack, slack
from tasks.contract.connections import COMMAND_TIMEOUT_S, MOST_CONNECTIONS, connect

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
