"""`sluice bench --sweep`: measures level by level, draws the saturation curve, names the knee."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

from rich.table import Table

from bench.baseline import Change, Run
from bench.measurement import Load
from bench.sweep import COLUMNS, REQUESTS_PER_STREAM, Sweep, cells, compare, count, ladder
from deploy import gate
from deploy.job_text import make_console
from tasks.contract.errors import ConfigurationError

MOST_STREAMS = 256


def run(options: gate.Options, page: Path) -> int:
    """Measures, draws, compares and prints; 1 for errors or a regression.

    Raises:
        RequestRefusedError: no server answers, or not as it should.
        BaselineError, ConfigurationError: the sweep cannot be drawn, compared or saved.
    """
    drawing = _load_drawing()
    baseline = Sweep.read(options.baseline) if options.baseline else None
    _refuse_other_suffix(page)
    gate.refuse_unwritable("--sweep", page)
    gate.refuse_unwritable("--save", options.save)
    highest = gate.compose(options, MOST_STREAMS)
    if baseline:
        baseline.refuse_other(highest)
    levels, wrong = _climb(highest, options.rounds)
    if not levels:
        gate.complain(wrong)
        return 1
    sla = {"sla_ttft_ms": options.sla_ttft_ms, "sla_tpot_ms": options.sla_tpot_ms}
    sweep = Sweep(**sla, levels=levels, failed="; ".join(wrong))
    changes = compare(baseline, sweep) if baseline and not wrong else []
    png = drawing.picture(sweep, baseline)
    page.with_suffix(".png").write_bytes(png)
    page.write_text(drawing.page(sweep, changes, png))
    if options.as_json:
        gate.print_json(sweep.as_json(), changes)
    else:
        _show(sweep, changes, page)
    if gate.complain(wrong or gate.regressions(changes, options)):
        return 1
    if options.save:
        sweep.save(options.save)
    return 0


def _load_drawing() -> ModuleType:
    try:
        from bench import saturation
    except ModuleNotFoundError as missing:
        raise ConfigurationError(
            f"--sweep draws with {missing.name}, which is not installed; it is in the extra "
            "`load`: `.venv/bin/uv pip install -e '.[load]'`"
        ) from None
    return saturation


def _refuse_other_suffix(page: Path) -> None:
    if page.suffix != ".html":
        raise ConfigurationError(
            f"--sweep: the name of the page must end with .html, and {page} does not; a picture "
            "of the same name with .png is put beside it"
        )


def _climb(highest: Load, rounds: int) -> tuple[list[Run], list[str]]:
    """The levels, up to the first one with a wrong answer, and what was wrong with that."""
    levels: list[Run] = []
    for streams in ladder(highest.streams):
        level = _measure(highest, streams, rounds)
        if wrong := [f"at {count(streams)}: {what}" for what in gate.errors(level)]:
            return levels, wrong
        levels.append(level)
    return levels, []


def _measure(highest: Load, streams: int, rounds: int) -> Run:
    requests = max(highest.requests, streams * REQUESTS_PER_STREAM)
    load = replace(highest, streams=streams, requests=requests)
    return Run.of(load, gate.measure(load, rounds, f"{count(streams)}, "))


def _show(sweep: Sweep, changes: list[Change], page: Path) -> None:
    console = make_console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in COLUMNS:
        table.add_column(column, no_wrap=True)
    for level in sweep.levels:
        table.add_row(*cells(level))
    first = sweep.levels[0]
    console.print(
        f"{first.model} at {first.url}: {first.max_tokens} tokens; goodput: TTFT within "
        f"{sweep.sla_ttft_ms:g} ms, TPOT within {sweep.sla_tpot_ms:g} ms"
    )
    console.print(table)
    for line in [*sweep.describe(), *map(str, changes), f"drawn in {page}"]:
        console.print(line)
