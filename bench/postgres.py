"""A real PostgreSQL on loopback, of Debian's package or any on PATH, with its data in /tmp."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import psycopg

from bench.stack import await_that
from deploy.redis_server import free_port

STOP_S = 30.0


class Postgres:
    """A server that tests stop and start; each creates databases of its own."""

    def __init__(self, directory: Path) -> None:
        self._data = directory / "data"
        self._log = directory / "log"
        self._port = free_port()
        self._server: subprocess.Popen[bytes] | None = None
        self._numbers = count(1)
        # PostgreSQL refuses to run as root.
        self._as: dict[str, Any] = {"cwd": directory}
        if os.geteuid() == 0:
            self._as |= {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(directory, "postgres", "postgres")
        settings = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync"]
        initdb = [_program("initdb"), *settings, "--pgdata", str(self._data)]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, timeout=60, **self._as)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self._port}/{database}"

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self._numbers)}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def start(self) -> None:
        options = ["-D", str(self._data), "-p", str(self._port), "-k", "", "-F", "-h", "127.0.0.1"]
        with self._log.open("ab") as log:
            command = [_program("postgres"), *options]
            self._server = subprocess.Popen(command, stdout=log, stderr=log, **self._as)
        await_that(self._answers)

    def stop(self) -> None:
        """Ends it at once, with all its connections."""
        if self._server:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(STOP_S)
        self._server = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It accepts connections, and answers nothing."""
        assert self._server
        server = psutil.Process(self._server.pid)
        # The server itself first: it starts no more of the processes that serve connections.
        server.suspend()
        serving = server.children()
        for process in serving:
            process.suspend()
        try:
            yield
        finally:
            for process in (*serving, server):
                process.resume()

    def _answers(self) -> bool:
        if self._server and self._server.poll() is not None:
            raise AssertionError(f"PostgreSQL ended:\n{self._log.read_text()[-2000:]}")
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _connect(self) -> psycopg.Connection[Any]:
        address = f"host=127.0.0.1 port={self._port} user=postgres dbname=postgres"
        return psycopg.connect(address, autocommit=True, connect_timeout=3)


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A started server; its data is gone afterwards."""
    # Not below pytest's directory, which is closed to all but the user that runs the tests.
    with tempfile.TemporaryDirectory(prefix="sluice-postgres-") as directory:
        server = Postgres(Path(directory))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _program(name: str) -> str:
    """The path of one of PostgreSQL's programs, of the newest version that is there.

    Raises:
        AssertionError: PostgreSQL is not installed.
    """
    found = shutil.which(name)
    debian = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    versions = sorted(debian, key=lambda path: int(path.parts[-3]))
    if not found and not versions:
        raise AssertionError("tests need PostgreSQL: `apt-get install postgresql`")
    return found or str(versions[-1])
