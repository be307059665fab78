"""Checks of the servers that Sluice depends on: Redis, the bus and the database."""

import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from redis.exceptions import RedisError
from sqlalchemy import Connection, create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from db import dead
from db.schema import revisions
from db.session import CONNECT_TIMEOUT_S as SQL_TIMEOUT_S
from db.session import database_now, parse
from deploy.findings import Remark, UnusableError, ok, warning, wrong
from tasks.contract.connections import connect_once
from tasks.contract.settings import Settings, without_password
from tasks.contract.trouble import SAME_HOME, ask_redis, judge_redis
from tasks.queue.problems import Problem, Severity, find_memory_problem
from tasks.queue.statistics import RedisMemory

# The first with all commands that tasks/ uses.
LEAST_REDIS = (7, 0)
CLOCK_APART_S = 2.0
SOON_DAYS = 21
DAY_S = 86_400
TLS_PORTS = {"https": 443, "rediss": 6379}
TLS_TIMEOUT_S = 1.0

NTP = "have NTP set both clocks (`timedatectl`): times in lists are wrong; leases do not mind"


def check_redis(settings: Settings) -> Iterator[Remark]:
    """The queue's Redis."""
    yield from _check_redis(settings, "redis_url")


def check_bus(settings: Settings) -> Iterator[Remark]:
    """The bus, if it is a Redis of its own."""
    if settings.bus_url == settings.redis_url:
        yield ok("the same Redis")
        return
    yield from _check_redis(settings, "bus_url")


def _check_redis(settings: Settings, name: str) -> Iterator[Remark]:
    url = getattr(settings, name)
    try:
        with connect_once(url) as redis:
            info: Any = redis.info()
    except RedisError as failure:
        unusable = judge_redis(failure, settings, name)
        raise UnusableError(unusable.found, unusable.do) from None
    yield _judge_version(info, without_password(url))
    if url.startswith("rediss:"):
        authority = parse_qs(urlsplit(url).query).get("ssl_ca_certs", [None])[0]
        yield from warn_of_end(url, ssl.create_default_context(cafile=authority))
    # One that takes no writes has still answered.
    trouble = ask_redis(settings, [name])
    yield wrong(trouble.found, trouble.do) if trouble else _judge_persistence(info)
    yield _judge_eviction(info)
    yield _judge_memory(info)


def warn_of_end(url: str, context: ssl.SSLContext) -> Iterator[Remark]:
    """A warning if the certificate that is shown there, and has just been accepted, ends soon."""
    place = urlsplit(url)
    address = place.hostname, place.port or TLS_PORTS[place.scheme]
    # Whether it is for that name was up to whoever accepted it.
    context.check_hostname = False
    try:
        with (
            socket.create_connection(address, TLS_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=place.hostname) as shown,
        ):
            ends_at = str((shown.getpeercert() or {})["notAfter"])
    except OSError:
        return  # accepted without a look at it, as ssl_cert_reqs=none has it
    left_days = (ssl.cert_time_to_seconds(ends_at) - time.time()) / DAY_S
    if left_days < SOON_DAYS:
        yield warning(
            f"the certificate at {without_password(url)} ends in {left_days:.0f} day(s), {ends_at}",
            "renew it before: docs/deploy.md, Certificates",
        )


def _judge_version(info: dict[str, Any], url: str) -> Remark:
    version = str(info["redis_version"])
    server = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {version}"
    found = f"{url} answers, {server}"
    if tuple(map(int, version.split(".")[:2])) < LEAST_REDIS:
        return wrong(found, "install Redis 7.0 or newer")
    if info["role"] != "master":
        return wrong(f"{found}, a replica, which takes no writes", "give the URL of its primary")
    return ok(found)


def _judge_persistence(info: dict[str, Any]) -> Remark:
    failed = [
        what
        for what, key in (
            ("write to its AOF", "aof_last_write_status"),
            ("rewrite of its AOF", "aof_last_bgrewrite_status"),
            ("snapshot", "rdb_last_bgsave_status"),
        )
        if info.get(key, "ok") != "ok"
    ]
    if failed:
        return wrong(
            f"its last {failed[0]} failed, and it may refuse writes",
            "check its log, and the space and the permissions of its directory",
        )
    if not info["aof_enabled"]:
        return warning(
            "appendonly is off: a restart loses what waits and runs",
            "`redis-cli config set appendonly yes`, and the same in its configuration",
        )
    return ok("appendonly is on, the last write went well")


def _judge_eviction(info: dict[str, Any]) -> Remark:
    policy = info["maxmemory_policy"]
    if policy != "noeviction":
        return wrong(
            f"maxmemory-policy is {policy}: full memory drops accepted jobs",
            "`redis-cli config set maxmemory-policy noeviction`, and the same in its configuration",
        )
    return ok("maxmemory-policy is noeviction")


def _judge_memory(info: dict[str, Any]) -> Remark:
    memory = RedisMemory.decode(info)
    problem = find_memory_problem(memory)
    return judge(problem) if problem else ok(str(memory))


def judge(problem: Problem) -> Remark:
    """The remark about a problem of the queue."""
    make = wrong if problem.severity is Severity.CRITICAL else warning
    return make(problem.what, problem.remedy)


def check_database(settings: Settings) -> Iterator[Remark]:
    """The database: whether it answers, its tables, SQLite's WAL."""
    url = without_password(settings.database_url)
    with _open_database(settings) as connection:
        current, known = revisions(connection)
        if current not in known:
            raise UnusableError(*_foreign(url, current))
        if current != known[0]:
            raise UnusableError(
                f"{url} is at migration {current}, and this version needs {known[0]}",
                "restart the API or maintenance with this version: they bring it up to date",
            )
        yield ok(f"{url} answers, at migration {current}")
        if connection.dialect.name == "sqlite":
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
            yield (
                ok("SQLite's journal is a WAL")
                if mode == "wal"
                else warning(
                    f"SQLite's journal_mode is {mode}: readers and writers wait for each other",
                    "put SLUICE_HOME on a local disk, and restart the API and maintenance",
                )
            )


def _foreign(url: str, current: str | None) -> tuple[str, str]:
    """What is wrong with a database at a migration that this version does not know."""
    if current is None:
        return f"{url} has no tables", "start the API or maintenance once: they make them"
    newer = f"{url} is at migration {current}, which this version does not know"
    return newer, "update this installation to the version that the API and maintenance run"


def _open_database(settings: Settings) -> Connection:
    """A connection that changes nothing: SQLite's file is not made, its journal not switched.

    Raises:
        UnusableError: there is no database.
        SQLAlchemyError: it does not answer.
    """
    location = parse(settings.database_url)
    if location.get_backend_name() != "sqlite" or not location.database:
        bounds = {"connect_timeout": SQL_TIMEOUT_S}
        return create_engine(location, poolclass=NullPool, connect_args=bounds).connect()
    if not Path(location.database).exists():
        raise UnusableError(
            f"there is no database at {location.database}",
            f"start the API or maintenance once: they make it; {SAME_HOME}",
        )
    query = {"mode": "ro", "uri": "true"}
    location = location.set(database=f"file:{location.database}", query=query)
    return create_engine(location, poolclass=NullPool).connect()


def check_dead_letters(settings: Settings) -> Iterator[Remark]:
    """Jobs that were given up."""
    with _open_database(settings) as connection, Session(connection) as session:
        letters = dead.count(session)
    if letters:
        yield warning(
            f"{letters} job(s) were given up",
            "`sluice dead list` and `sluice dead show JOB` show why; then retry or purge them",
        )
        return
    yield ok("none")


def check_redis_clock(settings: Settings) -> Iterator[Remark]:
    """The clock of this machine against that of the queue's Redis."""
    with connect_once(settings.redis_url) as redis:
        redis.time()  # connects
        before_s = time.time()
        answer: Any = redis.time()
        here_s = (before_s + time.time()) / 2
    yield _judge_clock("Redis", here_s - answer[0] - answer[1] / 1e6)


def check_database_clock(settings: Settings) -> Iterator[Remark]:
    """The clock of this machine against that of the database; SQLite has none of its own."""
    with _open_database(settings) as connection, Session(connection) as session:
        if connection.dialect.name != "sqlite":
            there = database_now(session)
            yield _judge_clock("the database", (datetime.now(UTC) - there).total_seconds())


def _judge_clock(server: str, ahead_s: float) -> Remark:
    found = f"{abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} that of {server}"
    return warning(found, NTP) if abs(ahead_s) > CLOCK_APART_S else ok(found)
