"""What is measured: vLLM's own server and Sluice, each started and ended with all its processes."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from bench.processes import Snapshot, snapshot
from deploy.redis_server import free_port
from gpu_worker.engines import vllm_args
from tasks.contract.models import Model

LOAD_TIMEOUT_S = 600
STOP_TIMEOUT_S = 20
# The benchmark's Sluice stays away from servers in use; its other settings are the user's.
NOT_INHERITED = {
    *("SLUICE_REDIS_URL", "SLUICE_BUS_URL", "SLUICE_DATABASE_URL"),
    *("SLUICE_HOST", "SLUICE_MODEL", "SLUICE_MODEL_ARGS"),
}


class StackError(Exception):
    """A stack did not start, or answers nothing."""


@dataclass(frozen=True)
class Stack:
    """A running server and the root of its process tree."""

    name: str
    port: int
    root_pid: int
    load_s: float  # from its start until it was ready

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def snapshot(self) -> Snapshot:
        return snapshot(self.root_pid)


@contextmanager
def vllm_server(model: Model, home: Path) -> Iterator[Stack]:
    """The server of vLLM, with the arguments and environment that Sluice gives the engine."""
    port = free_port()
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*server, *vllm_args.command_line(model), "--host", "127.0.0.1", "--port", str(port)]
    with launched("vLLM", command, vllm_args.environment(model), port, "/health", home) as launch:
        yield launch.await_ready()


@contextmanager
def sluice(
    model: Model, home: Path, source: Path | None = None, name: str = "Sluice"
) -> Iterator[Stack]:
    """`launched_sluice`, ready."""
    with launched_sluice(model, home, source, name) as launch:
        yield launch.await_ready()


@contextmanager
def launched_sluice(
    model: Model, home: Path, source: Path | None = None, name: str = "Sluice"
) -> Iterator["Launch"]:
    """`sluice up` with this model only, and with its own Redis and database.

    The packages in `source` are run, if that is given.
    """
    port = free_port()
    models = home / "models.yaml"
    models.write_text(
        yaml.safe_dump({"models": [model.model_dump(mode="json", exclude_defaults=True)]})
    )
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    env = inherited | {
        "SLUICE_HOME": str(home / "sluice"),
        "SLUICE_PORT": str(port),
        "SLUICE_MODELS": str(models),
    }
    if source:
        paths = [str(source), os.environ.get("PYTHONPATH")]
        env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-P", "-m", "deploy.cli", "up"]
    with launched(name, command, env, port, "/health/ready", home) as launch:
        yield launch


@dataclass(frozen=True)
class Launch:
    """A server that is starting; several may load at the same time."""

    name: str
    port: int
    ready_path: str
    log: Path
    process: subprocess.Popen[bytes]
    started_s: float

    def await_ready(self) -> Stack:
        """The server, once it answers with 200.

        Raises:
            StackError: it does not; with the end of its log.
        """
        _wait_until_ready(self.process, f"http://127.0.0.1:{self.port}{self.ready_path}", self.log)
        return Stack(self.name, self.port, self.process.pid, time.monotonic() - self.started_s)


@contextmanager
def launched(
    name: str,
    command: list[str],
    env: dict[str, str],
    port: int,
    ready_path: str,
    home: Path,
) -> Iterator[Launch]:
    """The server, from the start of its process on; its whole tree ends with the block."""
    log = home / f"{name}.log"
    started_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield Launch(name, port, ready_path, log, process, started_s)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + LOAD_TIMEOUT_S
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline_s:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise StackError(f"{url} does not answer; the end of the log:\n{tail}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole tree: by SIGTERM, then whatever is left of it."""
    if process.poll() is not None:
        return
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    for left in psutil.wait_procs(tree, timeout=STOP_TIMEOUT_S)[1]:
        left.kill()
