"""The server and the database that all examples share; how many steps are run."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tasks.contract.settings import get_settings
from tasks.maintenance import ledger, reconciler
from tasks.queue import backlog
from tests.model.database import Database
from tests.model.redis_server import Server, write_scripts
from tests.model.world import World

Patches = dict[str, list[tuple[str, str]]]
Make = Callable[[Patches], AbstractContextManager[World]]

# A clock of its own makes these long times pass in no time; real time must not matter beside them.
SETTINGS = {
    "LEASE_S": "300",
    "MAX_BACKLOG": "4",
    "MAX_BACKLOG_BYTES": "250",
    "LOG_RETENTION_S": "3600",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--steps", type=int, default=100_000, help="steps that tests/model takes")


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A directory whose files are in memory, where there is one."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def server(memory: Path) -> Iterator[Server]:
    server = Server(memory)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def database(memory: Path) -> Iterator[Database]:
    database = Database(memory)
    yield database
    database.close()


@pytest.fixture
def make_world(
    server: Server, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """Makes the world, with some scripts patched."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(f"SLUICE_{name}", value)
    # Bounds that are reached.
    monkeypatch.setattr(backlog, "REAPED_AT_ONCE", 2)
    monkeypatch.setattr(backlog, "MOST_RECORDS", 15)
    monkeypatch.setattr(ledger, "RECORDS_AT_ONCE", 4)
    # Dead letters that are retried get ids of this moment.
    monkeypatch.setattr(reconciler, "OLD_ENOUGH_S", -60)

    @contextmanager
    def make(patches: Patches) -> Iterator[World]:
        scripts = tmp_path / "lua"
        write_scripts(scripts, patches)
        monkeypatch.setattr(backlog, "LUA", scripts)
        backlog.read_scripts.cache_clear()
        get_settings.cache_clear()
        logging.disable()
        world = World(server, database)
        try:
            yield world
        finally:
            logging.disable(logging.NOTSET)
            world.close()

    yield make
    monkeypatch.undo()
    backlog.read_scripts.cache_clear()
    get_settings.cache_clear()
