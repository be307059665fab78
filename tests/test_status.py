"""`sluice status`: the real program beside a deployment at work."""

import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
import yaml

from bench.stack import Stack, await_that, running
from tasks.contract import keys
from tests.conftest import SIM

SLOTS = 2
SLOW = SIM | {"slots": SLOTS, "args": {"tokens-per-s": 40, "first-token-s": 0.05}}
IDLE = {"name": "idle", "engine": "sim"}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two workers of one model, two jobs at once each; and a second model that nobody serves."""
    home = tmp_path_factory.mktemp("status")
    with running(Stack(home, [SLOW], lease_s=6), workers=2) as stack:
        (home / "models.yaml").write_text(yaml.safe_dump({"models": [SLOW, IDLE]}))
        yield stack


def command(stack: Stack, *arguments: str, **env: str) -> dict[str, Any]:
    """What subprocess needs to run the program against the stack."""
    return {
        "args": [sys.executable, "-m", "deploy.cli", "status", *arguments],
        "env": stack.env | env,
    }


def status(stack: Stack, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        **command(stack, *arguments, **env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def read_status(stack: Stack) -> dict[str, Any]:
    done = status(stack, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    seen: dict[str, Any] = orjson.loads(done.stdout)
    return seen


def row(screen: str, first: str, number: int = 0) -> list[str]:
    """The cells of the row that begins with that, of the table of that number."""
    lines = [line.split() for line in screen.splitlines()]
    return [cells for cells in lines if cells and cells[0] == first][number]


def submit(stack: Stack, jobs: int, tokens: int) -> list[str]:
    body = CHAT | {"max_tokens": tokens}
    job = {"endpoint": "/v1/chat/completions", "body": body}
    answers = [requests.post(f"{stack.url}/v1/jobs", json=job, timeout=10) for _ in range(jobs)]
    assert {answer.status_code for answer in answers} == {202}
    return [answer.json()["id"] for answer in answers]


@pytest.fixture
def load(stack: Stack) -> Iterator[None]:
    """Jobs that never end: one in each slot of the workers, and three that wait."""
    jobs = submit(stack, 2 * 2 * SLOTS - 1, tokens=100_000)
    await_that(lambda: heartbeats(stack, "running") == [b"2", b"2"])
    yield
    for job in reversed(jobs):
        requests.post(f"{stack.url}/v1/jobs/{job}/cancel", timeout=10)
    await_that(lambda: heartbeats(stack, "running") == [b"0", b"0"])


def heartbeats(stack: Stack, field: str) -> list[Any]:
    """What the workers report of themselves."""
    return [stack.redis.hget(key, field) for key in stack.redis.keys(keys.worker("*"))]


def test_depth_slots_and_workers_under_load(stack: Stack, load: None) -> None:
    seen = read_status(stack)
    sim, idle = seen["models"]
    assert sim["depth"]["batch"]["jobs"] == 3
    assert sim["depth"]["batch"]["oldest_age_s"] > 0
    assert sim["depth"]["interactive"] == {"jobs": 0, "oldest_age_s": 0}
    assert (sim["serving"], sim["draining"]) == (2, 0)
    assert (sim["slots"], sim["slots_used"], seen["leases"]) == (4, 4, 4)
    assert sim["rates_per_s"] == {"accepted": 0, "completed": 0, "failed": 0}
    assert (idle["name"], idle["serving"], idle["slots"]) == ("idle", 0, 0)
    assert {worker["state"] for worker in seen["workers"]} == {"serving"}
    assert [worker["running"] for worker in seen["workers"]] == [SLOTS, SLOTS]

    done = status(stack, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert row(done.stdout, "sim")[:3] == ["sim", "0", "3"]
    assert row(done.stdout, "sim", 1)[:4] == ["sim", "2", "0", "4/4"]
    assert row(done.stdout, "idle", 1)[:4] == ["idle", "none", "0", "0/0"]
    assert row(done.stdout, seen["workers"][0]["id"])[1:4] == ["sim", "serving", "2/2"]
    assert done.stdout.startswith("leases 4 · delayed 0 · dead letters 0 · ")
    assert status(stack).stdout.splitlines()[1:3] == done.stdout.splitlines()[1:3]


@contextmanager
def submitting(stack: Stack) -> Iterator[None]:
    """More jobs than the workers have slots, again and again."""
    is_over = threading.Event()

    def submit_on() -> None:
        while not is_over.is_set():
            for job in submit(stack, 3 * SLOTS, tokens=1):
                url = f"{stack.url}/v1/jobs/{job}"
                requests.get(url, headers={"Prefer": "wait=10"}, timeout=60)

    thread = threading.Thread(target=submit_on)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_rates_and_first_tokens_of_a_busy_model(stack: Stack) -> None:
    rates: dict[str, float] = {}

    def is_busy() -> bool:
        rates.update(read_status(stack)["models"][0]["rates_per_s"])
        return rates["accepted"] > 0 and rates["completed"] > 0

    with submitting(stack):
        await_that(is_busy, explain=lambda: rates)
        await_that(lambda: all(worker["ttft_p50_ms"] for worker in read_status(stack)["workers"]))
    assert rates["failed"] == 0
    sim = read_status(stack)["models"][0]
    assert 50 <= sim["ttft_p50_ms"] <= sim["ttft_p95_ms"]


def test_a_paused_model_and_a_draining_worker(home: Path) -> None:
    with running(Stack(home, [SLOW], lease_s=6, drain_s=60)) as stack:
        (job,) = submit(stack, 1, tokens=100_000)
        await_that(lambda: heartbeats(stack, "running") == [b"1"])
        for arguments in (["pause", "sim"], ["drain", read_status(stack)["workers"][0]["id"]]):
            program = command(stack)
            program["args"] = [*program["args"][:3], *arguments]
            subprocess.run(**program, check=True, timeout=60, stdout=subprocess.DEVNULL)
        await_that(lambda: heartbeats(stack, "state") == [b"draining"])
        screen = status(stack, "--once").stdout
        requests.post(f"{stack.url}/v1/jobs/{job}/cancel", timeout=10)
        assert row(screen, "sim")[1] == "(paused)"
        assert row(screen, "sim", 1)[:4] == ["sim", "none", "1", "1/0"]
        await_that(lambda: stack.workers == [])


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.file, end = pty.openpty()
        start["env"] |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
        self.program = subprocess.Popen(
            **start,
            **dict.fromkeys(("stdin", "stdout", "stderr"), end),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (no threads)
        )
        os.close(end)
        self.seen = ""

    def read_until(self, pattern: str, times: int = 1) -> None:
        """Reads until the pattern has been there that often."""
        while len(re.findall(pattern, self.seen)) < times:
            piece = os.read(self.file, 4096).decode(errors="replace")
            self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", piece)

    def press_ctrl_c(self) -> int:
        """The exit code after it."""
        os.write(self.file, b"\x03")
        try:
            return self.program.wait(60)
        finally:
            os.close(self.file)


def test_the_live_screen_goes_on_until_ctrl_c(stack: Stack, load: None) -> None:
    terminal = Terminal(command(stack))
    terminal.read_until(r"sim +0 +3 +\d+ s", times=1)
    terminal.read_until(r"sim +0 +3 +\d+ s +0\.0 +0\.0 +0\.0", times=2)
    terminal.read_until(r"idle +none +0 +0/0")
    assert terminal.press_ctrl_c() == 0
    assert "Traceback" not in terminal.seen


def test_the_live_screen_outlives_redis(home: Path) -> None:
    with running(Stack(home, [SLOW]), workers=0) as stack:
        terminal = Terminal(command(stack))
        terminal.read_until(r"sim +0 +0 +- +0\.0")
        stack.part("redis").kill()
        terminal.read_until("as last seen: no Redis answers at")
        assert terminal.press_ctrl_c() == 0


def test_without_redis_or_with_wrong_settings_it_is_one_sentence(stack: Stack) -> None:
    done = status(stack, SLUICE_REDIS_URL="redis://:secret-7f@127.0.0.1:1/0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sluice: no Redis answers at redis://:…@127.0.0.1:1/0")
    assert "start it, or set SLUICE_REDIS_URL" in done.stderr
    done = status(stack, SLUICE_PORT="x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "SLUICE_PORT" in done.stderr


def test_a_lost_maintenance_is_shown(home: Path) -> None:
    with running(Stack(home, [SIM]), workers=0) as stack:
        await_that(lambda: stack.redis.exists(keys.MAINTENANCE))
        maintenance = stack.part("maintenance")
        assert read_status(stack)["maintenance"].endswith(f"-{maintenance.pid}")
        assert "maintenance" not in status(stack, "--once").stdout
        maintenance.kill()
        stack.redis.delete(keys.MAINTENANCE)  # its seconds pass faster
        assert read_status(stack)["maintenance"] is None
        assert "no maintenance lives" in status(stack, "--once").stdout
