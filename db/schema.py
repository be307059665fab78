"""Brings a database to the schema of this version."""

from pathlib import Path

from sqlalchemy import Connection, func, select
from sqlalchemy.pool import NullPool

from db.session import BUSY_TIMEOUT_S, for_writing, make_engine, parse

MIGRATIONS = Path(__file__).parent / "migrations"

# How long SQLite waits for another process that migrates; PostgreSQL's lock waits without limit.
MIGRATION_S = 60.0
_LOCK = 0x51_01CE


def migrate(url: str) -> None:
    """Runs the missing migrations in one transaction; makes the SQLite file and its directory.

    Several processes may call it at once: one migrates, the others wait and find nothing to do.

    Raises:
        SQLAlchemyError: the database is away or refuses.
        OSError: SQLite's directory cannot be made.
        alembic.util.CommandError: the schema is of a newer version.
    """
    # Only a migration pays for importing Alembic.
    from alembic import command
    from alembic.config import Config

    _make_directory(url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    engine = make_engine(url, MIGRATION_S, poolclass=NullPool)
    with for_writing(engine).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def reach(url: str) -> None:
    """Connects once, to check that the database is there; makes SQLite's directory.

    Raises:
        SQLAlchemyError: the database is away or refuses.
        OSError: SQLite's directory cannot be made.
    """
    _make_directory(url)
    make_engine(url, BUSY_TIMEOUT_S, poolclass=NullPool).connect().close()


def _make_directory(url: str) -> None:
    location = parse(url)
    if location.get_backend_name() == "sqlite" and location.database:
        Path(location.database).parent.mkdir(parents=True, exist_ok=True)


def revisions(connection: Connection) -> tuple[str | None, list[str]]:
    """The database's migration, None: it has no tables; and those known here, the latest first."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    known = ScriptDirectory(str(MIGRATIONS)).walk_revisions()
    current = MigrationContext.configure(connection).get_current_revision()
    return current, [script.revision for script in known]
