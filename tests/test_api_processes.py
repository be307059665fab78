"""An API of several processes: how many there are, and that clients may ask any of them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from api.server import processes_for
from bench.stack import Stack, await_that, running
from db import migrate
from tasks.contract import processors
from tasks.contract.access import KeySpec
from tasks.maintenance import api_keys
from tests.conftest import SIM

SLOW = SIM | {"args": {"tokens-per-s": 40, "first-token-s": 0.05}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
STREAM = CHAT | {"stream": True, "max_tokens": 400}
# Runs on one core, and counts them.
CONFINED = (
    "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    "from tasks.contract import processors; print(processors.count())"
)


@pytest.mark.parametrize(
    ("cores", "processes"), [(1, 1), (2, 1), (7, 1), (8, 2), (12, 3), (16, 4), (128, 4)]
)
def test_an_api_has_a_process_for_each_four_cores_and_four_at_most(
    cores: int, processes: int
) -> None:
    assert processes_for(cores) == processes


@pytest.mark.parametrize(
    ("quota", "cores"), [("200000 100000\n", 2), ("150000 100000\n", 1), ("50000 100000\n", 1)]
)
def test_a_container_has_the_cores_that_its_quota_is_worth(
    tmp_path: Path, quota: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    allowed = processors.count(tmp_path / "missing")
    assert processors.count(tmp_path / "cpu.max") == min(cores, allowed)


def test_a_container_without_a_quota_has_those_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processors.count(tmp_path / "cpu.max") == processors.count(tmp_path / "missing")


def test_what_a_process_may_not_run_on_does_not_count() -> None:
    counted = subprocess.run(
        [sys.executable, "-c", CONFINED], capture_output=True, text=True, timeout=60, check=True
    )
    assert counted.stdout == "1\n"


def test_nothing_that_is_set_means_by_the_cores(home: Path) -> None:
    with running(Stack(home, [SIM], api_processes=0), workers=0) as stack:
        expected = processes_for(processors.count())
        await_that(lambda: len(processes(stack)) == expected)


def processes(stack: Stack) -> list[psutil.Process]:
    return psutil.Process(stack.api_processes[0].pid).children()


@contextmanager
def only(process: psutil.Process, stack: Stack) -> Iterator[None]:
    """New connections are this process's while the block runs: the others stand still."""
    others = [each for each in processes(stack) if each != process]
    try:
        for other in others:
            other.suspend()
            await_that(lambda: other.status() == psutil.STATUS_STOPPED)  # noqa: B023
        yield
    finally:
        for other in others:
            other.resume()


@contextmanager
def two_processes(stack: Stack) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    with running(stack):
        await_that(lambda: len(list((stack.home / "metrics").glob("*/gauge_sum_*.db"))) == 2)
        first, second = processes(stack)
        yield first, second


def test_the_load_is_that_of_all_processes(home: Path) -> None:
    stack = Stack(home, [SLOW], api_processes=2)
    with two_processes(stack) as both, ExitStack() as streams:
        for process in (*both, both[0]):
            with only(process, stack):
                streams.enter_context(ask(stack, STREAM | {"max_tokens": 4000}))
        for process in both:
            with only(process, stack):
                found = requests.get(f"{stack.url}/load", timeout=30)
            assert found.json() == {"server_load": 3}


def test_a_limit_holds_for_all_processes_together(home: Path) -> None:
    stack = Stack(home, [SIM], api_processes=2)
    migrate(stack.database_url)
    spec = KeySpec.model_validate({"name": "two", "limits": {"requests_per_minute": 2}})
    key = api_keys.create(stack.database_url, spec)["key"]
    seen = []
    with two_processes(stack) as (first, second):
        for process in (first, second, first, second):
            with only(process, stack):
                seen.append(ask(stack, CHAT | {"max_tokens": 1}, key).status_code)
    assert seen == [200, 200, 429, 429]


def test_a_process_that_is_killed_takes_its_own_streams_along_and_no_others(home: Path) -> None:
    stack = Stack(home, [SLOW], api_processes=2)
    with two_processes(stack) as (first, second), ExitStack() as streams:
        with only(first, stack):
            cut = streams.enter_context(ask(stack, STREAM))
        with only(second, stack):
            other = streams.enter_context(ask(stack, STREAM))
        first.kill()
        with pytest.raises(requests.RequestException):
            cut.content  # noqa: B018 (reads it)
        assert other.content.endswith(b"data: [DONE]\n\n")
        # Its job goes on, and is there for whoever asks for it, by any process.
        events = f"{stack.url}/v1/jobs/{cut.headers['x-sluice-job']}/events"
        assert b"data: [DONE]\n\n" in requests.get(events, timeout=60).content
        await_that(lambda: first not in processes(stack) and len(processes(stack)) == 2)


def ask(stack: Stack, body: dict[str, Any], key: str = "") -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{stack.url}/v1/chat/completions"
    return requests.post(url, json=body, headers=headers, stream=True, timeout=60)
