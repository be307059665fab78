"""What tracing costs: a Sluice that sends a tenth of its traces beside one that sends none.

Both stay up and take turns, with a simulated engine that has its tokens at once, so that all that
is spent is Sluice's own; the receiver keeps what comes and does nothing else.
"""

from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from bench.drive import run_client
from bench.measurement import Load, Measurement
from bench.otlp import Receiver
from bench.stack import Stack, running, serving

MODEL = {"name": "sim", "engine": "sim", "args": {"tokens-per-s": 0, "first-token-s": 0}}
STREAMS = 64
SAMPLED = 0.1
OFF, ON = "off", f"{SAMPLED:.0%} sampled"
AT_MOST_PERCENT = 2.0


def run(console: Console, rounds: int, requests: int) -> list[str]:
    """Runs and prints the comparison; returns what went wrong."""
    with TemporaryDirectory(prefix="sluice-bench-tracing-") as home, ExitStack() as up:
        receiver = up.enter_context(serving(Receiver()))
        with console.status("starting"):
            stacks = {
                OFF: _start(up, Path(home) / "off"),
                ON: _start(up, Path(home) / "on", receiver.url),
            }
        _take_turns(stacks, 0, requests)
        done = []
        for number in range(1, rounds + 1):
            console.print(f"round {number} of {rounds}")
            done.append(_take_turns(stacks, number, requests))
    traces = {span.trace_id for span in receiver.spans()}
    console.print(f"traces: {len(traces)} of {requests * (rounds + 1)} requests")
    return _report(console, done)


def _start(up: ExitStack, home: Path, endpoint: str = "") -> Stack:
    home.mkdir()
    stack = Stack(home, [MODEL], otlp_endpoint=endpoint)
    stack.env["OTEL_TRACES_SAMPLER"] = "parentbased_traceidratio"
    stack.env["OTEL_TRACES_SAMPLER_ARG"] = str(SAMPLED)
    return up.enter_context(running(stack))


def _take_turns(stacks: dict[str, Stack], number: int, requests: int) -> dict[str, Measurement]:
    """A round of each; another one begins every time."""
    names = list(stacks) if number % 2 else list(reversed(stacks))
    loads = {
        name: Load(stacks[name].url, "sim", STREAMS, requests, is_exact=False, seed=number)
        for name in names
    }
    return {name: run_client(load) for name, load in loads.items()}


def _report(console: Console, done: list[dict[str, Measurement]]) -> list[str]:
    table = Table("tracing", "req/s", "of the same round's without", box=None)
    for name in (OFF, ON):
        rates = [seen[name].requests_per_s for seen in done]
        ratios = [seen[name].requests_per_s / seen[OFF].requests_per_s for seen in done]
        spread = f"{median(ratios):.3f} ({min(ratios):.3f}…{max(ratios):.3f})"
        table.add_row(name, f"{median(rates):.1f}", spread)
    console.print(table)
    cost_percent = 100 * (1 - median(s[ON].requests_per_s / s[OFF].requests_per_s for s in done))
    too_much = [f"{cost_percent:.1f} % fewer requests/s are more than {AT_MOST_PERCENT:g} %"]
    failed = [
        f"{name}: {count} x {what}"
        for seen in done
        for name in (OFF, ON)
        for what, count in seen[name].errors.items()
    ]
    return failed + (too_much if cost_percent > AT_MOST_PERCENT else [])
