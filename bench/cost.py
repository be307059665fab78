"""What durability and metrics cost: Sluice beside copies of itself without them.

They cannot be switched off, so each copy is the source with a few lines changed, in a directory of
its own; or it is another checkout, such as one before a change. All stacks stay up, with the same
model on vLLM, and take turns.
"""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from bench.measurement import Load
from bench.rounds import REQUESTS, Round, run_round
from bench.stacks import Stack, StackError, sluice
from tasks.contract.models import Model

ROOT = Path(__file__).parent.parent
PACKAGES = ("api", "tasks", "gpu_worker", "db", "deploy")
STREAMS = 64
WHOLE = "Sluice"

# What each copy lacks: file, lines there, lines instead.
COPIES = {
    "without logs and renewed leases": (
        ("tasks/queue/lua/append.lua", "return redis.pcall(unpack(command))", "return id"),
        (
            "gpu_worker/heartbeat.py",
            "for lost in worker.backlog.renew(worker.claims.held()):",
            "for lost in ():",
        ),
        ("gpu_worker/replay_log.py", "self._new.append(note)", "pass"),
    ),
    "without metrics": (
        (
            "tasks/queue/lua/state.lua",
            "local function count(what, value, job)",
            "local function count(what, value, job) if true then return end",
        ),
        ("gpu_worker/running.py", "self.meter.output(self.replay_log.output_tokens)", "pass"),
        (
            "gpu_worker/running.py",
            "self.meter.end(*self.replay_log.total())",
            "pass",
        ),
        ("api/instruments.py", "app.after_request(_note_answer)", "pass"),
        ("api/instruments.py", "app.before_request(_note_begin)", "pass"),
    ),
}


def run(
    console: Console, model: Model, rounds: int, scale: float, other: Path | None = None
) -> list[str]:
    """Runs and prints the comparison, with the checkout `other` if given; returns what failed."""
    names = [WHOLE, *COPIES] if other is None else [WHOLE, f"Sluice in {other}"]
    with TemporaryDirectory(prefix="sluice-bench-cost-") as home, ExitStack() as running:
        stacks = []
        for number, name in enumerate(names):
            directory = Path(home) / str(number)
            source = make_copy(directory / "source", name, other if number else None)
            with console.status(f"starting {name}"):
                stack = running.enter_context(sluice(model, directory, source, f"stack {number}"))
            console.print(f"{name}: ready after {stack.load_s:.0f} s")
            stacks.append(replace(stack, name=name))
        done = _take_turns(stacks, model.name, rounds, scale, console)
    _show(console, names, done)
    return [
        f"{one.stack}, round {one.number}: {count} x {what}"
        for one in done
        for what, count in one.measurement.errors.items()
    ]


def make_copy(source: Path, name: str, other: Path | None) -> Path:
    """The source, of another checkout if given, with the lines of that copy changed.

    Raises:
        StackError: a line is not there any more; COPIES must follow the source.
    """
    for package in PACKAGES:
        shutil.copytree((other or ROOT) / package, source / package)
    for path, old, new in COPIES.get(name, ()):
        text = (source / path).read_text()
        if text.count(old) != 1:
            raise StackError(f"{path} has {old!r} {text.count(old)} times, not once")
        (source / path).write_text(text.replace(old, new))
    return source


def _take_turns(
    stacks: list[Stack], model: str, rounds: int, scale: float, console: Console
) -> list[Round]:
    """A warm-up round, then the counted rounds; another stack begins in each."""
    done = []
    requests = max(round(REQUESTS[STREAMS] * scale), STREAMS)
    for number in range(rounds + 1):
        first = number % len(stacks)
        for stack in stacks[first:] + stacks[:first]:
            console.print(f"round {number} of {rounds}: {stack.name}")
            load = Load(stack.url, model, STREAMS, requests, seed=number)
            others = [other for other in stacks if other is not stack]
            done.append(run_round(number, stack, others, load))
    return [one for one in done if one.number]


def _show(console: Console, names: list[str], done: list[Round]) -> None:
    whole = [one for one in done if one.stack == WHOLE]
    table = Table("64 streams", "req/s", "of Sluice's", "CPU s per 1,000 tokens", "of Sluice's")
    for name in names:
        rounds = sorted((one for one in done if one.stack == name), key=lambda one: one.number)
        rates = [one.measurement.requests_per_s for one in rounds]
        costs = [_cpu_s(one) for one in rounds]
        table.add_row(
            *(name, f"{median(rates):.1f}"),
            _spread(rates, [one.measurement.requests_per_s for one in whole]),
            *(f"{median(costs):.3f}", _spread(costs, [_cpu_s(one) for one in whole])),
        )
    console.print(table)


def _cpu_s(one: Round) -> float:
    """CPU per 1,000 tokens of all but the client and EngineCore, which spins."""
    costs = one.cpu_s_per_1000_tokens
    return sum(s for role, s in costs.items() if not role.startswith(("EngineCore", "client")))


def _spread(values: list[float], of: list[float]) -> str:
    ratios = [value / whole for value, whole in zip(values, of, strict=True)]
    return f"{median(ratios):.3f} ({min(ratios):.3f}…{max(ratios):.3f})"
