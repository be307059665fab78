"""Why a job that will not start waits: the API and the program both show it."""

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
import requests
from websockets.sync.client import connect

from bench.stack import Stack, await_that, running
from tests.conftest import SIM
from tests.test_client import PROMPT, command, read_until, sluice
from tests.test_client import submit as queue

ORPHAN = SIM | {"name": "orphan", "aliases": []}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A worker for `sim`, which has answered once, and none for `orphan`."""
    stack = Stack(tmp_path_factory.mktemp("waiting"), [SIM, ORPHAN], keep_alive_s=1)
    stack.models = ["sim"]
    with running(stack):
        assert sluice(stack, "submit", PROMPT, "--max-tokens", "5", "--watch").returncode == 0
        yield stack


@contextmanager
def paused(stack: Stack) -> Iterator[None]:
    assert sluice(stack, "pause", "sim").returncode == 0
    try:
        yield
    finally:
        assert sluice(stack, "resume", "sim").returncode == 0


def get(stack: Stack, job: str) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{stack.url}/v1/jobs/{job}", timeout=10).json()
    return found


def test_the_job_of_a_paused_model_shows_it_and_promises_no_start(stack: Stack) -> None:
    with paused(stack):
        jobs = [queue(stack, PROMPT, "--max-tokens", "5") for _ in range(2)]
        expected = {"position": 2, "eta_s": None, "is_paused": True, "workers": 1}
        assert get(stack, jobs[1])["queue"] == expected
        listed = requests.get(f"{stack.url}/v1/jobs", params={"limit": 1}, timeout=10).json()
        assert listed["data"][0]["queue"] == expected
        url = f"{stack.url}/v1/jobs/{jobs[1]}/events".replace("http", "ws")
        with connect(url) as socket:
            frame = orjson.loads(socket.recv(timeout=10))
            assert (frame["event"], frame["data"]) == ("queue", expected)
        await_queue_event(stack, jobs[1], expected)
    for job in jobs:
        await_that(lambda job=job: get(stack, job)["status"] == "completed")
    assert get(stack, jobs[1])["queue"] is None


def test_a_job_without_a_worker_has_no_eta(stack: Stack) -> None:
    job = queue(stack, PROMPT, "--model", "orphan")
    expected = {"position": 1, "eta_s": None, "is_paused": False, "workers": 0}
    assert get(stack, job)["queue"] == expected
    await_queue_event(stack, job, expected)
    assert "no worker" in sluice(stack, "job", job).stdout
    (row,) = [row for row in sluice(stack, "jobs").stdout.splitlines() if job in row]
    assert "1, no worker" in row
    assert sluice(stack, "cancel", job).returncode == 0


def test_a_follower_of_a_job_gets_the_pause(stack: Stack) -> None:
    """And of its end, before the first token."""
    with paused(stack):
        job = queue(stack, PROMPT, "--max-tokens", "5")
        url = f"{stack.url}/v1/jobs/{job}/events"
        with requests.get(url, stream=True, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines) == b"event: queue"
            assert b'"is_paused":true' in next(lines)
            assert sluice(stack, "resume", "sim").returncode == 0
            assert b"data: [DONE]" in lines


def await_queue_event(stack: Stack, job: str, expected: dict[str, Any]) -> None:
    """The first event of the job has it."""
    url = f"{stack.url}/v1/jobs/{job}/events"
    with requests.get(url, stream=True, timeout=10) as answer:
        lines = answer.iter_lines()
        assert next(lines) == b"event: queue"
        assert orjson.loads(next(lines).removeprefix(b"data: ")) == expected


def test_the_program_shows_paused_wherever_it_shows_the_job(stack: Stack) -> None:
    with paused(stack):
        job = queue(stack, PROMPT, "--max-tokens", "5")
        assert "place 1, paused" in sluice(stack, "job", job).stdout
        (row,) = [row for row in sluice(stack, "jobs").stdout.splitlines() if job in row]
        assert "1, paused" in row
        assert "sim (paused)" in sluice(stack, "status").stdout
        terminal, its_end = pty.openpty()
        watching = command(stack, "watch", job)
        watching["env"] |= {"TERM": "xterm", "COLUMNS": "80"}
        with subprocess.Popen(**watching, stdout=subprocess.PIPE, stderr=its_end) as watch:
            read_until(terminal, lambda seen: b"place 1 in the queue, paused" in seen)
            watch.send_signal(signal.SIGINT)
            assert watch.wait(60) == 130
        os.close(terminal)
        os.close(its_end)
