"""Engines and transactions, used alike on SQLite and PostgreSQL.

SQLite has one write lock for the whole file. A transaction that reads first and writes later cannot
wait for it (SQLite refuses at once), so `writing` takes it at its start; `reading` never needs it.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Session

# Waiting for SQLite's lock stops a whole process under gevent: it is tried again instead.
BUSY_TIMEOUT_S = 0.02
BUSY_RETRY_S = 0.02
LONGEST_BUSY_S = 5.0
CONNECT_TIMEOUT_S = 3
UNACKNOWLEDGED_MS = 10_000

_BEGIN = "sqlite_begin"


@functools.cache
def get_engine(url: str) -> Engine:
    """The process's engine for that database, with a pool of connections."""
    return make_engine(url, BUSY_TIMEOUT_S)


@contextmanager
def reading(url: str) -> Iterator[Session]:
    """A transaction that only reads; what it has read can be used after it."""
    with Session(get_engine(url), expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def writing(url: str) -> Iterator[Session]:
    """A transaction that may write: committed at its end, rolled back by an exception.

    Inside, wait for nothing but the database: on SQLite every other writer waits for the end, and a
    greenlet that yields here can stop its process.
    """
    engine = for_writing(get_engine(url))
    with Session(engine, expire_on_commit=False) as session:
        _begin(session)
        yield session
        session.commit()


def _begin(session: Session) -> None:
    """Begins, when another process holds SQLite's lock as soon as that ends."""
    deadline_s = time.monotonic() + LONGEST_BUSY_S
    while True:
        try:
            session.connection()
            return
        except OperationalError as busy:
            if "locked" not in str(busy.orig) or time.monotonic() > deadline_s:
                raise
        session.rollback()
        time.sleep(BUSY_RETRY_S)


def database_now(session: Session) -> datetime:
    """The database's time: the same for every process."""
    if session.get_bind().dialect.name == "sqlite":
        text = session.scalars(select(func.strftime("%Y-%m-%dT%H:%M:%f", "now"))).one()
        return datetime.fromisoformat(str(text)).replace(tzinfo=UTC)
    now: datetime = session.scalars(select(func.clock_timestamp())).one()
    return now.astimezone(UTC)


def insert_new(session: Session, rows: Sequence[DeclarativeBase]) -> int:
    """Inserts rows of one table, passing over those that are there; returns how many were new."""
    if not rows:
        return 0
    once, values = _insert(session, rows)
    counted = {"preserve_rowcount": True}
    return session.connection().execute(once, values, execution_options=counted).rowcount


def insert_returning(
    session: Session, rows: Sequence[DeclarativeBase], column: InstrumentedAttribute[str]
) -> set[str]:
    """The same; returns that column of those that were new."""
    if not rows:
        return set()
    once, values = _insert(session, rows)
    return set(session.connection().execute(once.returning(column), values).scalars())


def _insert(session: Session, rows: Sequence[DeclarativeBase]) -> tuple[Any, list[dict[str, Any]]]:
    table = type(rows[0])
    columns = inspect(table).column_attrs
    values = [{c.columns[0].name: getattr(row, c.key) for c in columns} for row in rows]
    dialect = session.get_bind().dialect.name
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(table.__table__).on_conflict_do_nothing(), values  # type: ignore[arg-type]


def parse(url: str) -> URL:
    """The parts of the URL.

    Raises:
        ArgumentError: it is none.
    """
    try:
        return make_url(url)
    except ValueError:
        raise ArgumentError("its port is no number") from None


def for_writing(engine: Engine) -> Engine:
    """The same engine, whose transactions hold SQLite's write lock from their start."""
    return engine.execution_options(**{_BEGIN: "IMMEDIATE"})


def make_engine(url: str, busy_timeout_s: float, **options: Any) -> Engine:
    """A new engine; `busy_timeout_s` is how long SQLite waits for another writer."""
    # Else its errors show parameters, which hold prompts and answers.
    options["hide_parameters"] = True
    if parse(url).get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": busy_timeout_s}, **options)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    bounds = {"connect_timeout": CONNECT_TIMEOUT_S, "tcp_user_timeout": UNACKNOWLEDGED_MS}
    return create_engine(url, pool_pre_ping=True, connect_args=bounds, **options)


def _set_up_sqlite(connection: Any, _record: object) -> None:
    # The driver must not begin transactions by itself: it would begin them without the lock.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get(_BEGIN, '')}")
