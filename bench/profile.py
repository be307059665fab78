"""Where the time of a request goes: µs for each request and for each token, by process and step.

Answers of two lengths give two equations: what a request costs whatever its length, and what each
token adds. CPU time is the kernel's count for each process. Of the steps, py-spy tells how often
each held the interpreter's lock; it stops the process for each sample, so read their shares.
"""

import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.cost import make_copy
from bench.drive import run_client
from bench.measurement import Load
from bench.rounds import run_round
from bench.stacks import Stack, StackError, sluice
from bench.steps import STEPS, count_steps
from tasks.contract.models import Model

# Fast streams, and few: 2 cores have time left, so nothing waits for a processor.
SIM_RATE = 100
SIM = Model(name="sim", engine="sim", args={"tokens-per-s": SIM_RATE, "first-token-s": 0})
STREAMS = 16
SHORT, LONG = 32, 256
SAMPLE_HZ = 200
LOAD_S = 15
ATTACH_S = 3.0  # py-spy reads symbols first
CPU = "CPU, all threads"
Costs = Mapping[str, float]
Loads = Callable[[int, int], Load]


class Observed(NamedTuple):
    """What answers of one length cost: µs for each request, by whatever was told apart."""

    tokens: float
    us: Costs


@dataclass(frozen=True)
class Cost:
    """One line of the budget."""

    process: str
    step: str
    us_per_request: float
    us_per_token: float


def split(short: Observed, long: Observed) -> dict[str, tuple[float, float]]:
    """By name: µs for each request, and for each of its tokens."""
    found = {}
    for name in sorted({*short.us, *long.us}):
        less, more = short.us.get(name, 0.0), long.us.get(name, 0.0)
        per_token = (more - less) / (long.tokens - short.tokens)
        found[name] = less - per_token * short.tokens, per_token
    return found


def run(
    console: Console,
    model: Model,
    rounds: int,
    scale: float,
    document: dict[str, Any],
    other: Path | None = None,
) -> list[str]:
    """Measures and prints the budget, of another checkout if given; returns what went wrong.

    Raises:
        StackError: Sluice does not start, or answers nothing.
    """
    errors: list[str] = []
    with TemporaryDirectory(prefix="sluice-bench-profile-") as home, ExitStack() as up:
        source = make_copy(Path(home) / "source", "Sluice", other) if other else None
        stack = up.enter_context(sluice(model, Path(home), source))
        loads = _loads(stack, model.name, scale)
        by_process = _by_process(console, stack, loads, rounds, errors)
        costs = [Cost(role, CPU, *cost) for role, cost in by_process.items()]
        if spy := _find_spy():
            for role in STEPS:
                console.print(f"py-spy: {role}")
                try:
                    costs += _by_step(spy, stack, loads, role, Path(home))
                except StackError as refused:
                    console.print(f"no steps of {role}: {refused}", markup=False)
        else:
            console.print("py-spy is not installed (the extra `test` has it): no steps")
    costs.sort(key=lambda one: (one.process, one.step != CPU, -one.us_per_request))
    _show(console, costs)
    document["budget"] = [asdict(one) for one in costs]
    return errors


def _by_process(
    console: Console, stack: Stack, loads: Loads, rounds: int, errors: list[str]
) -> dict[str, tuple[float, float]]:
    """CPU time of each role: the median of the rounds' differences."""
    seen: list[dict[str, tuple[float, float]]] = []
    for number in range(rounds + 1):
        console.print(f"round {number} of {rounds}" if number else "warm-up")
        pair = []
        for tokens in (SHORT, LONG):
            one = run_round(number, stack, (), loads(tokens, number))
            errors += [
                f"round {number}: {n} x {what}" for what, n in one.measurement.errors.items()
            ]
            if not (completed := one.measurement.completed):
                raise StackError(f"Sluice answers nothing: {one.measurement.errors}")
            us = {role: 1e6 * spent_s / completed for role, spent_s in one.cpu_s.items()}
            pair.append(Observed(tokens, us))
        if number:
            seen.append(split(*pair))
    roles = sorted({role for one in seen for role in one})
    return {role: _medians([one.get(role, (0.0, 0.0)) for one in seen]) for role in roles}


def _medians(costs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return median(one[0] for one in costs), median(one[1] for one in costs)


def _by_step(spy: str, stack: Stack, loads: Loads, role: str, home: Path) -> list[Cost]:
    """Who held the lock of the role's busiest process, while answers of each length were made.

    Raises:
        StackError: py-spy may not look at the process, or fails.
    """
    used_s = {pid: usage.cpu_s for pid, usage in stack.snapshot().items() if usage.role == role}
    pid = max(used_s, key=used_s.__getitem__)
    pair = [
        Observed(tokens, _sampled(spy, pid, role, loads(tokens, 0), home / "samples"))
        for tokens in (SHORT, LONG)
    ]
    return [Cost(role, step, *cost) for step, cost in split(*pair).items()]


def _sampled(spy: str, pid: int, role: str, load: Load, file: Path) -> Costs:
    """µs for each request, by step.

    Raises:
        StackError: py-spy may not look at the process, or fails.
    """
    command = [spy, "record", "--pid", str(pid), "--gil", "--native", "--full-filenames"]
    command += ["--format", "raw", "--rate", str(SAMPLE_HZ), "--output", str(file)]
    # Until SIGINT, which ends it with its file written: the load decides how long.
    with subprocess.Popen(
        [*command, "--duration", "unlimited"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as sampling:
        time.sleep(ATTACH_S)
        seen = run_client(load)
        sampling.send_signal(signal.SIGINT)
        _, said = sampling.communicate()
    if not file.exists():
        raise StackError(f"py-spy: {said.decode(errors='replace')[-500:]} (it needs root, perhaps)")
    counted = count_steps(file.read_text().splitlines(), role)
    file.unlink()
    per_request = 1e6 / SAMPLE_HZ / (seen.completed or math.nan)
    return {step: samples * per_request for step, samples in counted.items()}


def _loads(stack: Stack, model: str, scale: float) -> Loads:
    """Makes the load of a length and a round: LOAD_S seconds with the simulated engine."""

    def compose(tokens: int, number: int) -> Load:
        requests = max(round(STREAMS * LOAD_S * scale * SIM_RATE / tokens), STREAMS)
        return Load(stack.url, model, STREAMS, requests, max_tokens=tokens, seed=number)

    return compose


def _find_spy() -> str | None:
    beside = str(Path(sys.executable).parent)
    return shutil.which("py-spy", path=beside) or shutil.which("py-spy")


def _show(console: Console, costs: Sequence[Cost]) -> None:
    table = Table("process", "step", "µs per request", "µs per token", box=None)
    for one in costs:
        figures = (f"{one.us_per_request:.0f}", f"{one.us_per_token:.1f}")
        table.add_row(one.process, one.step, *figures)
    console.print(table)
    console.print("Steps: time in which each held its interpreter's lock, in samples of py-spy.")
