"""vLLM's own server, started as in its manual, with what models.yaml gives Sluice's engine."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests

from bench.stack import Process, await_that
from deploy import redis_server
from gpu_worker.engines.vllm_args import command_line, environment
from tasks.contract.models import Model

LOAD_TIMEOUT_S = 600


@contextmanager
def serving(model: Model, home: Path) -> Iterator[str]:
    """The URL of a server of the model; its engine's processes end with it."""
    port = redis_server.free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command_line(model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = Process(command, environment(model), home / "vllm-server.log")
    url = f"http://127.0.0.1:{port}"
    try:
        await_that(lambda: _is_ready(server, url), LOAD_TIMEOUT_S)
        yield url
    finally:
        _end(server)


def _is_ready(server: Process, url: str) -> bool:
    if server.popen.poll() is not None:
        raise AssertionError(f"vLLM's server ended:\n{server.log.read_text()[-4000:]}")
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


def _end(server: Process) -> None:
    """SIGTERM to the server alone; to the whole group it makes the engine write tracebacks."""
    try:
        tree = psutil.Process(server.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    server.signal(signal.SIGTERM)
    server.stop()
    for left in psutil.wait_procs(tree, timeout=10)[1]:
        left.kill()
