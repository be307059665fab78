"""What `python -m bench gpu` runs: each part starts what it needs, and ends it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from bench.figures import Report
from bench.gpu import compare, faults, servers
from bench.jobs import allow_many_files
from bench.peers import turns
from bench.peers.parts import FAILURES

PARTS = ("compare", "faults")


def run(
    console: Console,
    parts: Sequence[str],
    kinds: Sequence[str],
    shape: str,
    levels: Sequence[int],
    rounds: int,
    document: dict[str, Any],
) -> list[str]:
    """Runs and prints the parts of those names; returns what went wrong."""
    allow_many_files()
    errors = []
    for part in parts:
        with TemporaryDirectory(prefix=f"sluice-bench-gpu-{part}-") as home:
            try:
                if part == "compare":
                    done = compare.measure(console, kinds, shape, levels, rounds, Path(home))
                    console.print(compare.as_markdown(done), markup=False)
                    document["rounds"] = compare.as_json(done)
                    errors += turns.errors(done)
                else:
                    errors += _run_faults(console, shape, Path(home), document)
            except FAILURES as failed:
                errors.append(f"{part}: {type(failed).__name__}: {failed}")
    return errors


def _run_faults(console: Console, shape: str, home: Path, document: dict[str, Any]) -> list[str]:
    report = Report(console)
    model = servers.entry(home, shape, faults.STREAMS, faults.TOKENS, **faults.BATCH_INVARIANT)
    try:
        faults.measure(report, home, model)
    finally:
        report.show()
        document["faults"] = [asdict(one) for one in report.figures]
    return report.errors
