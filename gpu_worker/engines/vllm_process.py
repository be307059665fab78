"""What each of vLLM's engine processes does for itself when it starts (a vLLM general plugin).

vLLM loads its plugins in each of its processes; this one acts only in those that a worker of
Sluice has started: EngineCore, EngineCore's own workers, and a worker's front ends.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from gpu_worker.engines import vllm_clients
from gpu_worker.parent import end_with_parent
from tasks.contract.tracebacks import cut

WORKER_PID_VARIABLE = "_SLUICE_WORKER_PID"
FAILURES_VARIABLE = "_SLUICE_LOAD_FAILURES"
LONGEST_MESSAGE = 600
# In the messages of vLLM's processes that only report the failure of another one.
ELSEWHERE = "root cause"
KILLED = (
    "its process ended without a message; perhaps the system killed it for want of memory "
    "(see `dmesg`): take a smaller model, or a smaller --kv-cache-memory-bytes"
)


@contextmanager
def mark_worker(directory: Path) -> Iterator[Path]:
    """Within the block, processes that this one starts are its engine's, and record failures."""
    failures = directory / "failures"
    failures.touch(mode=0o600)
    os.environ |= {WORKER_PID_VARIABLE: str(os.getpid()), FAILURES_VARIABLE: str(failures)}
    try:
        yield failures
    finally:
        failures.unlink()


def die_with_parent() -> None:
    """Makes the kernel kill the engine process with its parent, and so with the worker.

    A killed worker would otherwise leave the engine holding the GPU's memory: EngineCore's workers
    watch it themselves, but not while they hang.
    """
    worker_pid = os.environ.get(WORKER_PID_VARIABLE)
    if worker_pid is None or int(worker_pid) == os.getpid():
        return
    end_with_parent()
    vllm_clients.teach_engine_core()
    logging.getLogger("vllm").addHandler(_Failures())


class _Failures(logging.Handler):
    """Records the exceptions that vLLM logs while it loads: the worker does not receive them."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        # The file is there during the load only: later errors may hold prompts.
        with suppress(FileNotFoundError):
            if error and (
                file := os.open(os.environ[FAILURES_VARIABLE], os.O_WRONLY | os.O_APPEND)
            ):
                os.write(file, f"{describe(error)}\n".encode())
                os.close(file)


def root_cause(failures: Path, error: BaseException) -> str:
    """Why the engine could not be loaded: the first failure, in whichever process it was."""
    noted = [*failures.read_text().splitlines(), describe(error)]
    return next((line for line in noted if ELSEWHERE not in line), KILLED)


def describe(error: BaseException) -> str:
    """The exception in one line; of one that lists what pydantic refuses, the reasons alone."""
    if isinstance(error, ValidationError):
        reasons = (reason["msg"].removeprefix("Value error, ") for reason in error.errors())
        text = "; ".join(reasons)
    else:
        text = f"{type(error).__name__}: {error}"
    return cut(" ".join(text.split()), LONGEST_MESSAGE)
