"""The logs that `sluice up` has its parts write stay bounded, and nearly whole."""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.stack import await_that
from deploy import log_files
from deploy.log_files import KEPT, MOST_BYTES
from deploy.process import Part

LINES = 2_000_000
# Where nothing rotates the log, its writers wait here.
MOST_WRITTEN_BYTES = 3 * MOST_BYTES // 2
# 200 MB, up to 30 a second, from two processes.
WRITE_LINES = f"""
import os, sys, time
is_child = os.fork() == 0
for first in range(is_child * 500, {LINES}, 1000):
    lines = (f"{{number:09d}} {{'x' * 89}}\\n" for number in range(first, first + 500))
    while os.fstat(1).st_size > {MOST_WRITTEN_BYTES}:
        time.sleep(0.001)
    os.write(1, "".join(lines).encode())
    time.sleep(0.003)
if not is_child:
    os.wait()
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "talker-1.5.log"


def numbers(path: Path) -> list[int]:
    """Those of the lines, of which none is broken but the first and the last."""
    lines = path.read_bytes().split(b"\n")
    assert {len(line) for line in lines[1:-1]} <= {99}
    return [int(line[:9]) for line in lines if len(line) == 99]


def test_a_log_of_many_megabytes_is_bounded(log: Path, report: Callable[[str], None]) -> None:
    part = Part("writer", [sys.executable, "-c", WRITE_LINES], log, os.environ)
    messages: list[str] = []
    largest = 0
    part.start()
    while part.exit_code() is None:
        time.sleep(0.02)
        log_files.rotate(log, messages.append)
        largest = max(largest, sum(path.stat().st_size for path in log.parent.iterdir()))
    assert part.exit_code() == 0
    assert messages == []
    kept = [log.with_name(f"{log.name}.{number}") for number in range(KEPT, 0, -1)]
    assert sorted(log.parent.iterdir()) == sorted([log, *kept])
    # It grows between two looks, and while it is copied: on a busy machine until its writers wait.
    assert largest < (KEPT + 1) * 2 * MOST_BYTES
    # The log itself may just have been moved away.
    assert {len(path.read_bytes().splitlines()[1]) for path in kept} == {99}
    found = [number for path in (*kept, log) for number in numbers(path)]
    # In the order in which each process has printed them, to the last one.
    for turn in (0, 1):
        own = [number for number in found if number // 500 % 2 == turn]
        assert own == sorted(own)
        assert own[-1] == LINES - 1 - 500 * (1 - turn)
        printed = [n for n in range(own[0], LINES) if n // 500 % 2 == turn]
        report(f"process {turn}: {len(printed) - len(own)} of {len(printed):,} lines lost")
        assert len(own) > 0.99 * len(printed)


def test_a_part_goes_on_writing_when_nobody_rotates_any_more(log: Path) -> None:
    part = Part("writer", [sys.executable, "-c", WRITE_LINES], log, os.environ)
    part.start()
    await_that(lambda: log.stat().st_size > MOST_BYTES)
    log_files.rotate(log, pytest.fail)
    assert log.stat().st_size < MOST_BYTES
    await_that(lambda: log.stat().st_size > MOST_BYTES)
    part.kill_group()


def test_the_logs_of_earlier_runs_are_kept(log: Path) -> None:
    for run in range(KEPT + 2):
        log_files.begin(log)
        log.write_text(f"run {run}")
    texts = {path.name: path.read_text() for path in log.parent.iterdir()}
    older = {f"{log.name}.{number}": f"run {KEPT + 1 - number}" for number in range(1, KEPT + 1)}
    assert texts == {log.name: f"run {KEPT + 1}"} | older


def test_a_log_that_cannot_be_kept_is_dropped(log: Path) -> None:
    """As where the disk is full: what takes its place is the log itself."""
    log.write_bytes(bytes(MOST_BYTES))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    messages: list[str] = []
    try:
        log_files.rotate(log, messages.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (sentence,) = messages
    assert "is dropped" in sentence
    assert [(path.name, path.stat().st_size) for path in log.parent.iterdir()] == [(log.name, 0)]
