"""`sluice bench`: measures a running server, and compares it with a run that was saved earlier."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.baseline import PERCENTILES, TIMES, Change, Run, compare
from bench.drive import run_client
from bench.measurement import Load, Measurement
from deploy.client import Api, RequestRefusedError
from deploy.job_text import make_console
from tasks.contract.errors import ConfigurationError
from tasks.contract.settings import get_settings

WARM_UP_REQUESTS_PER_STREAM = 2
STREAMS = 8
STALL_S = 60  # and a second per token: no real server is slower


@dataclass(frozen=True)
class Options:
    """The command's."""

    url: str | None
    model: str | None
    streams: int | None
    requests: int
    max_tokens: int
    rounds: int
    save: Path | None
    baseline: Path | None
    max_regression_percent: float
    sla_ttft_ms: float
    sla_tpot_ms: float
    as_json: bool


def run(options: Options) -> int:
    """Measures, compares and prints; the program's exit code: 1 for errors or a regression.

    Raises:
        RequestRefusedError: no server answers, or not as it should.
        BaselineError, ConfigurationError: the run cannot be compared, or not saved.
    """
    baseline = Run.read(options.baseline) if options.baseline else None
    refuse_unwritable("--save", options.save)
    load = compose(options, STREAMS)
    if baseline:
        baseline.refuse_other(load)
    measured = Run.of(load, measure(load, options.rounds))
    changes = compare(baseline, measured) if baseline else []
    if options.as_json:
        print_json(measured.as_json(), changes)
    else:
        _show(measured, changes)
    if complain(errors(measured) or regressions(changes, options)):
        return 1
    if options.save:
        measured.save(options.save)
    return 0


def refuse_unwritable(option: str, file: Path | None) -> None:
    """Raises a ConfigurationError if the file that the option names cannot be made."""
    if file and not os.access(file.absolute().parent, os.W_OK):
        raise ConfigurationError(f"{option}: no file can be made in {file.parent}")


def compose(options: Options, default_streams: int) -> Load:
    """The load of a round, on a server that answers."""
    api = Api(options.url)
    if urlsplit(api.address).scheme == "https":
        raise RequestRefusedError(
            f"`sluice bench` speaks http only, not {api.shown_url}; run it where the API listens"
        )
    names = api.models()
    if not (model := options.model or next(iter(names), "")):
        raise RequestRefusedError(f"{api.shown_url} lists no model; name one with --model")
    return Load(
        url=api.address,  # it is sent as Host, printed and saved
        model=model,
        streams=options.streams or default_streams,
        requests=options.requests,
        max_tokens=options.max_tokens,
        is_exact=False,
        api_key=get_settings().api_key,
        stall_s=STALL_S + options.max_tokens,
        sla_ttft_ms=options.sla_ttft_ms,
        sla_tpot_ms=options.sla_tpot_ms,
    )


def measure(load: Load, rounds: int, level: str = "") -> list[Measurement]:
    """The rounds after a warm-up; only those up to one, or the warm-up, that gets no answer."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    hidden = not console.is_interactive
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=hidden
    ) as progress:
        few = min(load.requests, load.streams * WARM_UP_REQUESTS_PER_STREAM)
        seen = _measure_round(progress, f"{level}warm-up", replace(load, requests=few, seed=0))
        done = [] if seen.completed else [seen]
        for number in range(1, rounds + 1):
            if not seen.completed:
                break
            # Another seed per round; the same in every run.
            part = replace(load, seed=number)
            seen = _measure_round(progress, f"{level}round {number} of {rounds}", part)
            done.append(seen)
    return done


def _measure_round(progress: Progress, name: str, load: Load) -> Measurement:
    bar = progress.add_task(name, total=load.requests)
    seen = run_client(load, lambda finished: progress.update(bar, completed=finished))
    progress.update(bar, completed=load.requests)
    return seen


def errors(measured: Run) -> list[str]:
    """A sentence for each kind of answer that was none."""
    return [f"{times} x {what}" for what, times in measured.errors().items()]


def regressions(changes: list[Change], options: Options) -> list[str]:
    """A sentence for each figure that is worse than allowed."""
    most = options.max_regression_percent
    return [
        f"{change.figure} is {change.percent:.0f} % worse than in {options.baseline}; "
        f"{most:g} % are allowed"
        for change in changes
        if change.is_worse(most)
    ]


def complain(sentences: list[str]) -> bool:
    """Prints the sentences, and says whether there are any."""
    for sentence in sentences:
        click.echo(f"sluice: {sentence}", err=True)
    return bool(sentences)


def print_json(measured: dict[str, Any], changes: list[Change]) -> None:
    """Prints what was measured, and the changes beside it, for programs."""
    compared = [asdict(change) | {"percent": change.percent} for change in changes]
    click.echo(orjson.dumps(measured | {"changes": compared}))


def _show(measured: Run, changes: list[Change]) -> None:
    if not measured.rounds[-1].completed:
        return  # there are only errors to report
    console = make_console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("ms", *PERCENTILES):
        table.add_column(column, no_wrap=True)
    for time in TIMES:
        spreads = [measured.latency_ms(time, percentile) for percentile in PERCENTILES]
        table.add_row(time, *map(str, spreads))
    console.print(
        f"{measured.model} at {measured.url}: {measured.streams} streams, {measured.max_tokens} "
        f"tokens, {measured.requests} requests a round; median (lowest..highest) of the rounds"
    )
    console.print(table)
    console.print(f"requests/s  {measured.spread(lambda seen: seen.requests_per_s)}")
    console.print(f"goodput     {measured.spread(lambda seen: seen.goodput)}")
    console.print(f"tokens/s    {measured.spread(lambda seen: seen.tokens_per_s)}")
    console.print(f"errors      {measured.errors().total()}")
    for change in changes:
        console.print(str(change))
