"""`sluice up` as a person has it: one command, then the others beside it, then Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import redis
import requests

from bench.stack import Process, await_that, is_alive, slack
from deploy.redis_server import OUTGOING_PORTS, free_port
from tasks.contract import running
from tasks.contract.settings import Settings

SLUICE = [sys.executable, "-m", "deploy.cli"]


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    own = {"SLUICE_HOME": str(home), "SLUICE_MODEL": "sim", "SLUICE_PORT": str(free_port())}
    return os.environ | own


@pytest.fixture
def up(home: Path, env: dict[str, str]) -> Iterator[Process]:
    """A deployment that is ready."""
    process = Process([*SLUICE, "up"], env, home / "up.log")
    try:
        await_that(lambda: "Sluice is ready" in process.log.read_text(), 240, process.log.read_text)
        yield process
    finally:
        process.kill_all()


def test_what_up_prints_works(up: Process, env: dict[str, str], home: Path) -> None:
    url = f"http://127.0.0.1:{env['SLUICE_PORT']}"
    assert url in up.log.read_text()
    answer = requests.post(
        url + "/v1/chat/completions", json={"message": "Hello", "max_tokens": 5}, timeout=120
    )
    assert answer.text.endswith("data: [DONE]\n\n")
    # The other commands find the Redis that was started on any free port.
    listed = subprocess.run(
        [*SLUICE, "drain"], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert "serving" in listed.stdout
    subprocess.run([*SLUICE, "doctor"], env=env, stdout=subprocess.DEVNULL, timeout=120, check=True)

    parts = psutil.Process(up.pid).children(recursive=True)
    assert len(parts) >= 5
    began_s = time.monotonic()
    up.signal(signal.SIGINT)
    assert up.popen.wait(120) == 0
    assert time.monotonic() - began_s < slack(10)
    assert [part for part in parts if is_alive(part)] == []
    assert not running.record(home).exists()


def test_what_it_keeps_is_its_users_alone(up: Process, env: dict[str, str], home: Path) -> None:
    url = f"http://127.0.0.1:{env['SLUICE_PORT']}"
    requests.post(url + "/v1/chat/completions", json={"message": "Hello"}, timeout=120)
    made = [path for path in home.rglob("*") if path.name not in {"up.log", "pytest"}]
    assert {"up.json", "sluice.db", "api.log", "redis.conf"} <= {path.name for path in made}
    assert not {path for path in made if is_open_to_others(path)}
    # Whoever else is on this machine cannot speak to its Redis.
    server = urlsplit(Settings(home=home).redis_url)
    with redis.Redis(port=server.port or 0) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    secret = server.password or ""
    assert secret
    parts = psutil.Process(up.pid).children(recursive=True)
    assert not [part for part in parts if secret in " ".join(part.cmdline())]
    assert not [log for log in (home / "logs").iterdir() if secret in log.read_text()]


def is_open_to_others(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o077)
    except FileNotFoundError:
        return False  # Redis and SQLite have files that come and go


def test_workers_are_not_given_the_operators_secrets(home: Path, env: dict[str, str]) -> None:
    marked = {
        "SLUICE_ADMIN_KEY": "marked-admin",
        "SLUICE_WEBHOOK_SECRETS": f"whsec_{'MARKED' * 4}",
        "SLUICE_DATABASE_URL": f"sqlite:///{home}/marked.db",
    }
    process = Process([*SLUICE, "up"], env | marked, home / "up.log")
    try:
        await_that(lambda: "Sluice is ready" in process.log.read_text(), 240, process.log.read_text)
        parts = psutil.Process(process.pid).children(recursive=True)
        (worker,) = [part for part in parts if "worker" in part.cmdline()]
        assert not set(marked) & worker.environ().keys()
    finally:
        process.kill_all()


def test_a_second_one_in_the_same_home_is_refused(up: Process, env: dict[str, str]) -> None:
    again = subprocess.run(
        [*SLUICE, "up"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode != 0
    (sentence,) = again.stderr.splitlines()
    assert sentence.startswith("sluice: ")
    assert up.popen.poll() is None


def test_it_serves_no_others_without_a_key(env: dict[str, str]) -> None:
    command = [*SLUICE, "up", "--host", "0.0.0.0"]
    refused = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 1
    assert "make one with `sluice keys create NAME`" in refused.stderr


def test_no_outgoing_connection_is_given_the_port_of_a_server_that_is_away() -> None:
    """Its own clients were, and it could not come back."""
    first, last = map(int, OUTGOING_PORTS.read_text().split())
    assert not any(first <= free_port() <= last for _ in range(100))
