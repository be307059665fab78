"""What `python -m bench peers` measures: each part starts what it needs, and ends it."""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from redis.exceptions import RedisError
from rich.console import Console

from bench.figures import Report
from bench.jobs import allow_many_files
from bench.peers import comparisons, failure, queue_alone, slow_streams
from bench.stacks import StackError
from tasks.contract.errors import SluiceError

# A part that does not start or answer; the others go on.
FAILURES = (
    AssertionError,
    OSError,
    RedisError,
    SluiceError,
    StackError,
    subprocess.SubprocessError,
)

PARTS: dict[str, Callable[[Report, Path, int, float], None]] = {
    "serve": comparisons.serve,
    "relay": comparisons.relay,
    "answer": comparisons.answer,
    "failure": lambda report, home, _rounds, _scale: failure.measure(report, home),
    "slow-streams": lambda report, home, _rounds, scale: slow_streams.measure(report, home, scale),
    "queue": queue_alone.measure,
}


def run(
    console: Console, parts: Sequence[str], rounds: int, scale: float, document: dict[str, Any]
) -> list[str]:
    """Runs and prints the parts of those names; returns what went wrong."""
    allow_many_files()
    document["peers"] = {}
    errors = []
    for part in parts:
        report = Report(console)
        with TemporaryDirectory(prefix=f"sluice-bench-{part}-") as home:
            try:
                PARTS[part](report, Path(home), rounds, scale)
            except FAILURES as failed:
                report.errors.append(f"{type(failed).__name__}: {failed}")
        report.show()
        document["peers"][part] = [one.as_json() for one in report.figures]
        errors += [f"{part}: {error}" for error in report.errors]
    return errors
