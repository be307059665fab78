"""Deployments that tests share; tests that kill parts start their own."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from bench.postgres import Postgres, running_postgres
from bench.stack import Stack, await_that, running
from db import get_engine
from tasks.contract.models import BUILT_IN, Model, load_catalog
from tests import vllm_server as vllm

# A shell that runs the tests in the background has SIGINT ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeat", type=int, default=1, help="rounds of each test of tests/faults")
    parser.addoption(
        "--outage-s", type=float, default=10, help="how long those tests keep a server away"
    )


class ByDeployment(LoadFileScheduling):  # type: ignore[misc]
    """Runs in one process what shares a deployment: a file, or all files with a loaded vLLM."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if _uses_vllm(file):
            return "vllm"
        # Faults are done to deployments that one test alone has.
        return nodeid if file.startswith("tests/faults/") else file


@cache
def _uses_vllm(file: str) -> bool:
    text = Path(file).read_text()
    return any(f"{loaded}:" in text for loaded in ("vllm_stack", "vllm_server", "own_stack"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByDeployment:
    return ByDeployment(config, log)


@pytest.fixture(autouse=True)
def unchanged_umask() -> Iterator[None]:
    """Commands that a test calls in its own process make files for their user alone."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Iterator[Callable[[str], None]]:
    """A test reports lines with it, which are shown when all tests are over."""
    lines: list[str] = []
    yield lines.append
    record_property("report", lines)


_REPORTED: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    lines = dict(report.user_properties).get("report")
    if report.when == "teardown" and isinstance(lines, list):
        _REPORTED[report.nodeid] = lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for test, lines in _REPORTED.items():
        terminalreporter.section(test)
        for line in lines:
            terminalreporter.write_line(line)


SIM: dict[str, Any] = {
    "name": "sim",
    "engine": "sim",
    "aliases": ["gpt-3.5-turbo"],
    "args": {"tokens-per-s": 200, "first-token-s": 0.01},
}


@pytest.fixture(scope="session")
def sim_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """API, maintenance and one worker with the sim engine."""
    with running(Stack(tmp_path_factory.mktemp("sim"), [SIM], keep_alive_s=1)) as stack:
        yield stack


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The state directory of a test's own deployment."""
    return tmp_path


@pytest.fixture(scope="module")
def without_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All jobs stay in the queue."""
    home = tmp_path_factory.mktemp("idle")
    with running(Stack(home, [SIM], keep_alive_s=1), workers=0) as stack:
        yield stack


@pytest.fixture
def idle_stack(without_workers: Stack) -> Stack:
    """A deployment without workers or jobs."""
    without_workers.clear()
    return without_workers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis alone, of a model `m`."""
    stack = Stack(tmp_path_factory.mktemp("redis"), [{"name": "m", "engine": "sim"}])
    stack.start_redis()
    yield stack
    stack.stop()


@pytest.fixture
def bus(server: Stack) -> redis.Redis:
    """An empty one."""
    server.redis.flushall()
    return server.redis


@pytest.fixture(scope="session")
def demo_model() -> Model:
    """The entry of the demo model in the models.yaml that is bundled."""
    return load_catalog(BUILT_IN).default


@pytest.fixture(scope="session")
def vllm_stack(tmp_path_factory: pytest.TempPathFactory, demo_model: Model) -> Iterator[Stack]:
    """API, maintenance and one worker with the demo model on vLLM."""
    home = tmp_path_factory.mktemp("vllm")
    with running(Stack(home, [demo_model.model_dump(mode="json")])) as stack:
        yield stack


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory, demo_model: Model) -> Iterator[str]:
    """The URL of vLLM's own server with the same model and arguments."""
    with vllm.serving(demo_model, tmp_path_factory.mktemp("vllm-server")) as url:
        yield url


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; a test that stops it starts it again."""
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables, of each kind."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'database' / 'sluice.db'}"
    else:
        url = request.getfixturevalue("postgres").create_database()
    yield url
    # One that has not ended in time has a connection that would stay open.
    await_that(lambda: "webhooks" not in {thread.name for thread in threading.enumerate()}, 60)
    get_engine(url).dispose()
