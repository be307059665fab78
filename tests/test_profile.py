"""`python -m bench profile`: how costs are told apart, and the command itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.profile import Observed, split
from bench.steps import STEPS, count_steps

ROOT = Path(__file__).parent.parent
OURS = ("/api/", "/tasks/", "/gpu_worker/", "/db/")


def test_two_lengths_tell_what_a_request_and_a_token_cost() -> None:
    short = Observed(32, {"worker": 4000 + 32 * 80, "redis": 100})
    long = Observed(256, {"worker": 4000 + 256 * 80, "redis": 100})
    costs = split(short, long)
    assert costs["worker"] == pytest.approx((4000, 80))
    assert costs["redis"] == pytest.approx((100, 0))


def test_a_sample_counts_for_the_innermost_step() -> None:
    lines = [
        "run (/x/gpu_worker/worker.py:1);put (/x/gpu_worker/publisher.py:9);pack (/x/redis.py:5) 3",
        "run (/x/gpu_worker/worker.py:1);info (/usr/lib/python3/logging/__init__.py:7) 2",
        "start (libpython.so) 1",
        "broken",
    ]
    counted = count_steps(lines, "worker")
    assert counted == {"publish events": 3, "log lines": 2, "other": 1}


def test_all_files_that_steps_name_exist() -> None:
    paths = {path for steps in STEPS.values() for named in steps.values() for path in named}
    missing = {path for path in paths if path.startswith(OURS) and not (ROOT / path[1:]).exists()}
    assert not missing


def test_the_command_writes_a_budget_of_each_process(tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    command = [sys.executable, "-m", "bench", "profile", "--rounds=1", "--scale=0.2"]
    command.append(f"--json={file}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    budget = json.loads(file.read_text())["budget"]
    processes = {one["process"] for one in budget if one["step"].startswith("CPU")}
    assert processes >= {"api", "worker", "redis", "maintenance", "client"}
    worker = next(one for one in budget if one["process"] == "worker")
    assert worker["us_per_token"] > 0
