"""deploy/postgres/roles.sh, run as PostgreSQL's image runs it: who owns, and who only watches."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import URL, make_url

from bench.postgres import _program, running_postgres
from db import get_engine, migrate
from deploy import make_secrets
from tests.prometheus import DEPLOY


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[URL]:
    """On a server of its own: roles are those of all its databases."""
    home = tmp_path_factory.mktemp("roles")
    make_secrets.main("localhost", home)
    script = (DEPLOY / "postgres" / "roles.sh").read_text()
    with running_postgres() as server:
        url = make_url(server.create_database())
        env = os.environ | {
            "PGHOST": str(url.host),
            "PGPORT": str(url.port),
            "POSTGRES_USER": str(url.username),
            "POSTGRES_DB": str(url.database),
            "PATH": f"{os.environ['PATH']}{os.pathsep}{Path(_program('psql')).parent}",
        }
        here = script.replace("/run/secrets", str(home / "secrets"))
        done = subprocess.run(
            ["sh", "-c", here], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        yield url


def ask(database: URL, user: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(
        host=database.host, port=database.port, dbname=database.database, user=user
    ) as connection:
        return connection.execute(query).fetchall()


def test_its_owner_makes_the_tables_and_is_no_superuser(database: URL) -> None:
    url = database.set(username="sluice").render_as_string()
    migrate(url)
    get_engine(url).dispose()
    assert ask(database, "sluice", "SELECT count(*) FROM jobs") == [(0,)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        ask(database, "sluice", "COPY jobs FROM PROGRAM 'true'")


def test_the_exporter_reads_statistics_and_no_table(database: URL) -> None:
    assert ask(database, "exporter", "SELECT pg_database_size(current_database()) > 0") == [(True,)]
    assert ask(database, "exporter", "SELECT count(*) > 0 FROM pg_stat_activity") == [(True,)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        ask(database, "exporter", "SELECT * FROM jobs")


def test_both_have_passwords(database: URL) -> None:
    query = "SELECT rolname FROM pg_authid WHERE rolpassword LIKE 'SCRAM-SHA-256$%' ORDER BY 1"
    assert ask(database, "postgres", query) == [("exporter",), ("sluice",)]
