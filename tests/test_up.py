"""`sluice up` as a person has it: one command, then the others beside it, then Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from deploy.redis_server import free_port
from tests.stack import Process, await_that, is_alive

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
        await_that(lambda: "Sluice is ready" in process.log.read_text(), 60, process.log.read_text)
        yield process
    finally:
        process.kill_all()


def test_what_up_says_works(up: Process, env: dict[str, str], home: Path) -> None:
    url = f"http://127.0.0.1:{env['SLUICE_PORT']}"
    assert url in up.log.read_text()
    answer = requests.post(
        url + "/v1/chat/completions", json={"message": "Hello", "max_tokens": 5}, timeout=30
    )
    assert answer.text.endswith("data: [DONE]\n\n")
    # The other commands find the Redis that was started on any free port.
    listed = subprocess.run(
        [*SLUICE, "drain"], env=env, capture_output=True, text=True, timeout=30, check=True
    )
    assert "serving" in listed.stdout
    subprocess.run([*SLUICE, "doctor"], env=env, stdout=subprocess.DEVNULL, timeout=30, check=True)

    parts = psutil.Process(up.pid).children(recursive=True)
    assert len(parts) >= 5
    began_s = time.monotonic()
    up.signal(signal.SIGINT)
    assert up.popen.wait(15) == 0
    assert time.monotonic() - began_s < 10
    assert [part for part in parts if is_alive(part)] == []
    assert not (home / "redis-url").exists()


def test_a_second_one_in_the_same_home_says_so(up: Process, env: dict[str, str]) -> None:
    again = subprocess.run(
        [*SLUICE, "up"], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert again.returncode != 0
    (sentence,) = again.stderr.splitlines()
    assert sentence.startswith("sluice: ")
    assert up.popen.poll() is None
