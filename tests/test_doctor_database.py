"""`sluice doctor` and the database: of other versions, hanging, missing; on both kinds."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import text

from bench.postgres import Postgres
from bench.stack import Stack, await_that
from db import get_engine, migrate, writing
from db.models import JobRecord
from db.schema import MIGRATIONS
from tasks.contract import keys
from tests.test_doctor import diagnose


@pytest.fixture
def stack(sim_stack: Stack) -> Stack:
    """A deployment of which maintenance, too, has begun its work."""
    await_that(lambda: sim_stack.redis.exists(keys.MAINTENANCE))
    return sim_stack


def go_back(url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with get_engine(url).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "-1")


def go_beyond(url: str) -> None:
    with get_engine(url).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))


def empty(url: str) -> None:
    with get_engine(url).begin() as connection:
        connection.execute(text("DROP TABLE alembic_version"))


@pytest.mark.parametrize(
    ("change", "found", "do"),
    [
        (go_back, "and this version needs", "they bring it up to date"),
        (go_beyond, "at migration 9999, which this version does not know", "update this"),
        (empty, "has no tables", "start the API or maintenance once: they make them"),
    ],
)
def test_a_database_of_another_version(
    stack: Stack, database_url: str, change: Callable[[str], None], found: str, do: str
) -> None:
    migrate(database_url)
    change(database_url)
    seen = diagnose(stack, SLUICE_DATABASE_URL=database_url)
    assert (seen.code, seen.wrong) == (1, {"database"})
    assert found in seen.of("database", "wrong")
    assert do in seen.of("database", "wrong")


def test_a_check_that_hangs_ends_all_the_same(stack: Stack, postgres: Postgres) -> None:
    url, threads = postgres.create_database(), threading.active_count()
    migrate(url)
    with get_engine(url).begin() as connection:
        connection.execute(text("LOCK TABLE alembic_version"))
        seen = diagnose(stack, SLUICE_DATABASE_URL=url)
    assert (seen.code, seen.wrong) == (1, {"database"})
    assert "no answer within 8 s; check whether it hangs" in seen.of("database", "wrong")
    assert seen.of("dead letters", "warning") == "not checked without database; mend database first"
    assert "is ready" in seen.of("api", "ok")
    await_that(lambda: threading.active_count() == threads)
    get_engine(url).dispose()


def test_a_database_that_is_not_there_is_not_made(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "none.db"
    seen = diagnose(stack, SLUICE_DATABASE_URL=f"sqlite:///{file}")
    assert (seen.code, seen.wrong) == (1, {"database"})
    assert "start the API or maintenance once: they make it" in seen.of("database", "wrong")
    assert not file.exists()


def test_dead_letters_and_clocks_come_from_the_database(stack: Stack, database_url: str) -> None:
    migrate(database_url)
    own = {"model": "sim", "tenant": "default", "endpoint": "/", "lane": "batch", "meta": {}}
    now = datetime.now(UTC)
    with writing(database_url) as session:
        session.add(JobRecord(**own, id="job_1", status="failed", created_at=now, died_at=now))
        session.add(JobRecord(**own, id="job_2", status="queued", created_at=now))
    seen = diagnose(stack, SLUICE_DATABASE_URL=database_url)
    assert (seen.code, seen.wrong) == (0, set())
    assert "1 job(s) were given up; `sluice dead list`" in seen.of("dead letters", "warning")
    is_server = database_url.startswith("postgresql")
    assert ("that of the database" in seen.of("clock", "ok")) == is_server


def test_an_sqlite_without_wal_is_a_warning_and_stays_so(stack: Stack, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sluice.db'}"
    migrate(url)
    with get_engine(url).connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("PRAGMA journal_mode=DELETE")
        connection.exec_driver_sql("BEGIN")
    get_engine(url).dispose()
    for _ in range(2):
        seen = diagnose(stack, SLUICE_DATABASE_URL=url)
        assert (seen.code, seen.wrong) == (0, set())
        assert "journal_mode is delete" in seen.of("database", "warning")
        assert "put SLUICE_HOME on a local disk" in seen.of("database", "warning")
