"""The database: migrations, transactions and the ledger's table, on SQLite and PostgreSQL."""

import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError, StatementError

from bench.postgres import Postgres
from db import get_engine, migrate, reading, writing
from db.models import Base, LedgerEntry
from db.schema import MIGRATIONS
from db.session import insert_new

NOON = datetime(2026, 11, 1, 12, 0, 0, 123456, tzinfo=UTC)


def entry(job_id: str, **changes: Any) -> LedgerEntry:
    values: dict[str, Any] = {
        "model": "sim",
        "tenant": "default",
        "endpoint": "/v1/chat/completions",
        "lane": "interactive",
        "state": "completed",
        "attempts": 1,
        "queued_at": NOON,
        "started_at": NOON + timedelta(microseconds=1),
        "ended_at": NOON + timedelta(seconds=1),
    }
    return LedgerEntry(job_id=job_id, **values | changes)


def record(url: str, rows: list[LedgerEntry]) -> int:
    with writing(url) as session:
        return insert_new(session, rows)


def entries(url: str) -> list[LedgerEntry]:
    with reading(url) as session:
        return list(session.scalars(select(LedgerEntry).order_by(LedgerEntry.job_id)))


def test_migrations_and_models_agree(database_url: str) -> None:
    migrate(database_url)
    with get_engine(database_url).connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_migrations_go_back_and_forth(database_url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    migrate(database_url)
    with get_engine(database_url).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    migrate(database_url)
    assert entries(database_url) == []


def test_processes_may_migrate_at_once(database_url: str) -> None:
    program = [sys.executable, "-c", f"from db import migrate; migrate({database_url!r})"]
    processes = [subprocess.Popen(program, stderr=subprocess.PIPE) for _ in range(4)]
    assert [(p.communicate(timeout=90)[1], p.returncode) for p in processes] == [(b"", 0)] * 4
    assert entries(database_url) == []


def test_entries_are_written_once(database_url: str) -> None:
    migrate(database_url)
    assert record(database_url, []) == 0
    assert record(database_url, [entry("a"), entry("b"), entry("a", state="failed")]) == 2
    assert record(database_url, [entry("b", state="failed"), entry("c")]) == 1
    assert [(e.job_id, e.state) for e in entries(database_url)] == [
        ("a", "completed"),
        ("b", "completed"),
        ("c", "completed"),
    ]


def test_times_keep_their_microseconds_and_come_back_in_utc(database_url: str) -> None:
    migrate(database_url)
    elsewhere = NOON.astimezone(timezone(timedelta(hours=-7)))
    record(database_url, [entry("a", queued_at=elsewhere, started_at=None)])
    (found,) = entries(database_url)
    assert (found.queued_at.isoformat(), found.started_at) == (NOON.isoformat(), None)
    with pytest.raises(StatementError, match="has no timezone"):
        record(database_url, [entry("b", ended_at=NOON.replace(tzinfo=None))])


def test_spans_of_time_can_be_asked_for(database_url: str) -> None:
    migrate(database_url)
    record(database_url, [entry(f"{i}", ended_at=NOON + timedelta(hours=i)) for i in range(4)])
    used = select(func.count()).where(
        LedgerEntry.tenant == "default",
        LedgerEntry.ended_at >= NOON + timedelta(hours=1),
        LedgerEntry.ended_at < NOON + timedelta(hours=3),
    )
    with reading(database_url) as session:
        assert session.scalar(used) == 2


def test_an_exception_undoes_the_transaction(database_url: str) -> None:
    migrate(database_url)

    def write_and_fail() -> None:
        with writing(database_url) as session:
            session.add(entry("a"))
            session.flush()
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    assert entries(database_url) == []


def test_sqlite_is_set_up_for_many_processes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sluice.db'}"
    migrate(url)
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 20}
    with reading(url) as session:
        found = {name: session.scalar(text(f"PRAGMA {name}")) for name in wanted}
    assert found == wanted
    get_engine(url).dispose()


def test_sqlite_writers_hold_the_lock_before_they_read_and_readers_go_on(tmp_path: Path) -> None:
    file = tmp_path / "sluice.db"
    url = f"sqlite:///{file}"
    migrate(url)
    other = sqlite3.connect(file, timeout=0, isolation_level=None)
    with writing(url) as session:
        session.execute(select(LedgerEntry))
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        assert entries(url) == []
        session.add(entry("a"))
    other.execute("BEGIN IMMEDIATE")
    assert len(entries(url)) == 1
    with pytest.raises(OperationalError, match="locked"):
        record(url, [entry("b")])
    other.close()
    get_engine(url).dispose()


def test_connections_survive_a_restart_of_postgresql(postgres: Postgres) -> None:
    url = postgres.create_database()
    migrate(url)
    record(url, [entry("a")])
    postgres.stop()
    try:
        with pytest.raises(OperationalError):
            record(url, [entry("b")])
    finally:
        postgres.start()
    assert record(url, [entry("b")]) == 1
    get_engine(url).dispose()
