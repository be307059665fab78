"""The figures as tables for people and as one JSON document for programs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import sub
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.measurement import Measurement
from bench.rounds import REQUESTS, Round, of, pairwise
from bench.spread import Spread

Figure = Callable[[Measurement], float]

FIGURES: dict[str, Figure] = {
    "req/s": lambda seen: seen.requests_per_s,
    "tok/s": lambda seen: seen.tokens_per_s,
    "TTFT p50": lambda seen: seen.ttft_ms.p50,
    "TTFT p99": lambda seen: seen.ttft_ms.p99,
    "gap p50": lambda seen: seen.gap_ms.p50,
    "gap p99": lambda seen: seen.gap_ms.p99,
    "TPOT p50": lambda seen: seen.tpot_ms.p50,
}
LEGEND = """\
Medians over the rounds; times in ms. TTFT: from sending the request to the first event with text.
gap: between successive events with text; events read at once are 0 apart, and may hold several
tokens. TPOT: (last event - first event) / (tokens - 1) of a request."""


@dataclass(frozen=True)
class Aim:
    """What Sluice is meant to reach beside vLLM's own server."""

    text: str
    streams: int
    figure: Figure
    relate: Callable[[float, float], float]
    is_met: Callable[[float], bool]


def ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.nan


AIMS = (
    Aim("req/s at 64 streams >= 1.0 x", 64, FIGURES["req/s"], ratio, lambda x: x >= 1),
    Aim("TTFT p50 at 1 stream <= + 5 ms", 1, FIGURES["TTFT p50"], sub, lambda ms: ms <= 5),
    *(
        Aim(f"TTFT p99 at {n} streams <= 2 x", n, FIGURES["TTFT p99"], ratio, lambda x: x <= 2)
        for n in REQUESTS
    ),
)


def show(console: Console, rounds: Sequence[Round], names: Sequence[str]) -> None:
    """Prints all tables; the comparison only when both stacks were measured."""
    console.print(_figures_table(rounds, names), LEGEND, "")
    console.print(_cpu_table(rounds, names), "")
    if len(names) > 1:
        console.print(_ratio_table(rounds), "")
        console.print(_aims_table(rounds), "")
        for name in names:
            idle = median(one.idle_percent for one in rounds if one.number and one.stack != name)
            console.print(f"{name}, idle while the other was measured: {idle:.1f} % of a core")


def _figures_table(rounds: Sequence[Round], names: Sequence[str]) -> Table:
    table = _table("streams", "server", *FIGURES)
    for streams in REQUESTS:
        for name in names:
            seen = [one.measurement for one in of(rounds, name, streams)]
            cells = [_short(median(map(figure, seen))) for figure in FIGURES.values()]
            table.add_row(str(streams), name, *cells)
        table.add_section()
    return table


def _cpu_table(rounds: Sequence[Round], names: Sequence[str]) -> Table:
    table = _table("server", "process", *(f"{n} streams" for n in REQUESTS))
    table.title = "CPU seconds per 1,000 tokens"
    for name in names:
        for role in sorted({role for one in rounds if one.stack == name for role in one.cpu_s}):
            table.add_row(name, role, *(_cpu_cell(rounds, name, n, role) for n in REQUESTS))
        sums = [
            median(sum(one.cpu_s_per_1000_tokens.values()) for one in of(rounds, name, n))
            for n in REQUESTS
        ]
        table.add_row(name, "all", *(f"{value:.3f}" for value in sums))
        table.add_section()
    return table


def _cpu_cell(rounds: Sequence[Round], name: str, streams: int, role: str) -> str:
    used = [one.cpu_s_per_1000_tokens.get(role, 0.0) for one in of(rounds, name, streams)]
    return f"{median(used):.3f}"


def _ratio_table(rounds: Sequence[Round]) -> Table:
    table = _table("Sluice / vLLM", *(f"{n} streams" for n in REQUESTS))
    table.title = "Ratios of the same round: median (lowest..highest)"
    for name, figure in FIGURES.items():
        spreads = [pairwise(rounds, n, figure, ratio) for n in REQUESTS]
        table.add_row(name, *(_spread(spread) for spread in spreads))
    return table


def _aims_table(rounds: Sequence[Round]) -> Table:
    table = _table("aim", "measured", "")
    for aim in AIMS:
        spread = pairwise(rounds, aim.streams, aim.figure, aim.relate)
        table.add_row(aim.text, _spread(spread), "met" if aim.is_met(spread.median) else "missed")
    return table


def _table(*columns: str) -> Table:
    table = Table(title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}..{spread.high:.2f})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def as_json(rounds: Sequence[Round], names: Sequence[str]) -> dict[str, Any]:
    """The rounds, and the figures of the tables."""
    document: dict[str, Any] = {"rounds": [one.as_json() for one in rounds]}
    if len(names) > 1:
        document["ratios"] = {
            str(n): {name: asdict(pairwise(rounds, n, f, ratio)) for name, f in FIGURES.items()}
            for n in REQUESTS
        }
        document["aims"] = [
            {
                "aim": aim.text,
                **asdict(spread := pairwise(rounds, aim.streams, aim.figure, aim.relate)),
                "is_met": aim.is_met(spread.median),
            }
            for aim in AIMS
        ]
    return document
