"""Other terminals find the `sluice up` that runs: its Redis, address, model and settings."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.postgres import Postgres
from bench.stack import Process, await_that
from deploy.redis_server import free_port
from tasks.contract import running
from tasks.contract.settings import Settings

SLUICE = [sys.executable, "-m", "deploy.cli"]
OF_ITS_OWN = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
CATALOG = """
models:
  - {name: large, engine: sim, aliases: [gpt-4]}
  - {name: small, engine: sim, args: {tokens-per-s: 500}}
"""


def _up(home: Path, *options: str, **settings: str) -> Process:
    env = OF_ITS_OWN | {"SLUICE_HOME": str(home)} | settings
    log = home / f"up-{len(list(home.glob('up-*.log')))}.log"
    process = Process([*SLUICE, "up", *options], env, log)
    await_that(lambda: "Sluice is ready" in process.log.read_text(), 240, process.log.read_text)
    return process


@pytest.fixture(scope="module")
def port() -> str:
    return str(free_port())


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, port: str) -> Iterator[Path]:
    """The user's directory of a deployment, which is in the default place, started elsewhere."""
    user = tmp_path_factory.mktemp("user")
    (user / ".sluice").mkdir()
    (user / "models.yaml").write_text(CATALOG)
    (user / "elsewhere").mkdir()
    command = ["env", "-C", str(user), *SLUICE, "up", "--port", port]
    env = OF_ITS_OWN | {"HOME": str(user), "SLUICE_MODELS": "models.yaml"}
    process = Process(command, env | {"PYTHONPATH": str(Path.cwd())}, user / "up.log")
    try:
        await_that(lambda: "Sluice is ready" in process.log.read_text(), 240, process.log.read_text)
        yield user
    finally:
        process.kill_all()


class Terminal:
    """Where nothing is set, in another directory."""

    def __init__(self, user: Path, env: dict[str, str]) -> None:
        self._cwd = user / "elsewhere"
        self._env = OF_ITS_OWN | env | {"PYTHONPATH": str(Path.cwd())}

    def run(self, *command: str, **settings: str) -> str:
        done = subprocess.run(
            [*SLUICE, *command],
            env=self._env | settings,
            cwd=self._cwd,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_every_command_speaks_to_what_runs(up: Path, port: str) -> None:
    run = Terminal(up, {"HOME": str(up)}).run
    assert f"http://127.0.0.1:{port} answers, and is ready" in run("doctor")
    assert {"large", "small"} == {m["name"] for m in json.loads(run("status", "--json"))["models"]}
    job = run("submit", "Hello", "--model", "small", "--max-tokens", "3").strip()
    assert run("watch", job)
    await_that(lambda: job in run("jobs", "--model", "small", "--json"))
    assert "large is paused" in run("pause", "gpt-4")
    assert json.loads(run("status", "--json"))["models"][0]["is_paused"]
    assert "served again" in run("resume", "large")
    assert "serving" in run("drain")
    short = ("--streams", "1", "--requests", "2", "--rounds", "1", "--max-tokens", "4")
    assert json.loads(run("bench", "--model", "small", *short, "--json"))


def test_what_runs_is_found_in_a_home_of_another_place(up: Path, port: str) -> None:
    run = Terminal(up, {"SLUICE_HOME": str(up / ".sluice")}).run
    assert f"http://127.0.0.1:{port} answers, and is ready" in run("doctor")
    assert run("submit", "Hello", "--model", "small", "--max-tokens", "3", "--watch")
    assert {"large", "small"} == {m["name"] for m in json.loads(run("status", "--json"))["models"]}


def test_what_is_set_goes_before_what_runs(up: Path, port: str) -> None:
    home = up / ".sluice"
    assert Settings(home=home).port == int(port)
    assert Settings(home=home).models == up / "models.yaml"
    mine = Settings(home=home, port=1234, models=Path("/my.yaml"))
    assert (mine.api_url, mine.models) == ("http://127.0.0.1:1234", Path("/my.yaml"))
    other = Settings(home=home, redis_url="redis://127.0.0.1:1/0")
    assert (other.port, other.models, other.bus_url) == (8000, None, other.redis_url)


def test_one_that_was_killed_is_not_found(home: Path) -> None:
    up = _up(home, "--model", "sim", "--port", str(free_port()))
    try:
        assert Settings(home=home).model == "sim"
        up.kill()
        assert running.record(home).exists()
        assert running.find(home) == {}
        assert Settings(home=home).model == ""
    finally:
        up.kill_all()
    again = _up(home, "--model", "sim", "--port", str(free_port()))
    try:
        assert Settings(home=home).port != 8000
    finally:
        assert again.stop() == 0
    assert not running.record(home).exists()


def test_no_secret_but_that_of_redis_is_written_down(home: Path, postgres: Postgres) -> None:
    database = postgres.create_database()
    secrets = {
        "SLUICE_ADMIN_KEY": "marked-admin",
        "SLUICE_API_KEY": "marked-key",
        "SLUICE_ALERT_WEBHOOK": "https://marked.example/hook",
        "SLUICE_WEBHOOK_SECRETS": f"whsec_{'MARKED' * 4}",
        "SLUICE_DATABASE_URL": database.replace("@", ":marked@") + "?password=marked",
    }
    up = _up(home, "--model", "sim", "--port", str(free_port()), **secrets)
    try:
        record = running.record(home)
        assert "marked" not in record.read_text().lower()
        assert record.stat().st_mode & 0o077 == 0
        assert Settings(home=home).database_url == database
    finally:
        up.kill_all()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("10.0.0.7", "http://10.0.0.7:8000"),
    ],
)
def test_an_api_is_reached_where_it_listens(home: Path, host: str, url: str) -> None:
    assert Settings(home=home, host=host).api_url == url
