"""The real SQL under the model: a SQLite file in memory, which goes away on request."""

import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from db import get_engine, migrate
from tests.model.redis_server import Fault

_TABLES = ("webhook_attempts", "webhook_deliveries", "job_events", "results", "ledger", "jobs")


class Row(NamedTuple):
    """What SQL has of a job."""

    id: str
    status: str
    completed_at: str | None
    has_started: bool
    attempts: int
    dispatches: int
    webhook: str | None
    body: bytes | None
    results: int
    entries: int
    """In the ledger."""
    deliveries: int


_ROWS = """
SELECT id, status, completed_at, started_at IS NOT NULL, attempts, dispatches, webhook,
    (SELECT body FROM results WHERE job_id = id), (SELECT count(*) FROM results WHERE job_id = id),
    (SELECT count(*) FROM ledger WHERE job_id = id AND state = status),
    (SELECT count(*) FROM webhook_deliveries WHERE job_id = id)
FROM jobs ORDER BY id
"""


class Database:
    """A migrated database; `fault` makes statements fail, or a commit whose reply is lost."""

    def __init__(self, home: Path) -> None:
        path = home / "sluice.db"
        self.url = f"sqlite:///{path}"
        migrate(self.url)
        self.fault: Fault | None = None
        engine = get_engine(self.url)
        event.listen(engine, "before_cursor_execute", self._before_statement)
        event.listen(engine, "commit", self._before_commit)
        self._reader = sqlite3.connect(path, isolation_level=None)
        self._version = 0

    def close(self) -> None:
        self._reader.close()
        get_engine(self.url).dispose()

    def start_over(self) -> None:
        self.fault = None
        self._reader.execute("BEGIN IMMEDIATE")
        for table in _TABLES:
            self._reader.execute(f"DELETE FROM {table}")
        self._reader.execute("COMMIT")

    def has_changed(self) -> bool:
        """Whether anything was committed since this was asked."""
        (version,) = self._reader.execute("PRAGMA data_version").fetchone()
        has_changed, self._version = version != self._version, version
        return bool(has_changed)

    def rows(self) -> list[Row]:
        return [Row(*values) for values in self._reader.execute(_ROWS)]

    def _before_statement(self, *_: Any) -> None:
        if self.fault and not self.fault.has_run and self.fault.strikes():
            raise _away()

    def _before_commit(self, connection: Any) -> None:
        if self.fault and self.fault.has_run and self.fault.strikes():
            connection.connection.driver_connection.execute("COMMIT")
            raise _away()


def _away() -> OperationalError:
    return OperationalError("", {}, sqlite3.OperationalError("unable to open database file"))


def pieces_of(body: bytes) -> list[str]:
    """The pieces of an answer that SQL has."""
    content: str = orjson.loads(body)["choices"][0]["message"]["content"]
    return content.split()
