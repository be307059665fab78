"""Rounds of load on all servers in turn, and their figures as tables in Markdown."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bench.gpu import servers
from bench.gpu.servers import PROMPT_WORDS, VLLM
from bench.measurement import Load, Measurement
from bench.peers import turns
from bench.report import FIGURES
from bench.rounds import Round, of
from bench.spread import Spread, short
from bench.stacks import Stack
from tasks.contract.models import Model

TOKENS = 128
COMPARED = ("req/s", "TTFT p50", "TTFT p99", "gap p99", "TPOT p50")
# One stream of an 8B model answers in half a second, so a few of them tell as much as minutes do.
FEWEST = 12
# Of an API with several processes each answers some.
WARM_UP = 32
MOST_WAVES, LONG_ENOUGH = 12, 384


def requests_of(streams: int) -> int:
    """So many that each round takes some seconds: at least four from each stream."""
    return max(4 * streams, min(MOST_WAVES * streams, LONG_ENOUGH), FEWEST)


def run(
    console: Console,
    stacks: Sequence[Stack],
    model: Model,
    levels: Sequence[int],
    rounds: int,
) -> list[Round]:
    """A short warm-up, then the counted rounds, level by level.

    Raises:
        StackError: a server answered no request of a round.
    """
    done: list[Round] = []
    for streams in levels:
        console.print(f"{streams} streams", markup=False)
        compose = _composing(model, streams)
        progress = lambda text: console.print(f"  {text}", markup=False)
        done += turns.take_turns(stacks, rounds, compose, progress)
    return done


def _composing(model: Model, streams: int) -> Callable[[Stack, int], Load]:
    """Makes a round's load: the same for all servers, and of no round before."""

    def compose(stack: Stack, number: int) -> Load:
        return Load(
            stack.url,
            model.name,
            streams,
            requests_of(streams) if number else max(streams, WARM_UP),
            max_tokens=TOKENS,
            seed=10_000 * number + streams,
            prompt_words=PROMPT_WORDS,
        )

    return compose


def as_markdown(rounds: Sequence[Round]) -> str:
    """Medians of each server; ratios to vLLM's, round by round; processor time by process."""
    names = list(dict.fromkeys(one.stack for one in rounds))
    levels = sorted({one.streams for one in rounds})
    tables = [_figures(rounds, names, levels)]
    if VLLM in names:
        tables.append(_ratios(rounds, [name for name in names if name != VLLM], levels))
    return "\n\n".join([*tables, _cpu(rounds, names, levels)])


def _figures(rounds: Sequence[Round], names: Sequence[str], levels: Sequence[int]) -> str:
    rows = []
    for streams in levels:
        for name in names:
            seen = [one.measurement for one in of(rounds, name, streams)]
            figures = [short(median(map(figure, seen))) for figure in FIGURES.values()]
            wrong = sum(sum(one.errors.values()) for one in seen)
            rows.append([str(streams), name, *figures, str(wrong)])
    return _table(["streams", "server", *FIGURES, "errors"], rows, left=2)


def _ratios(rounds: Sequence[Round], names: Sequence[str], levels: Sequence[int]) -> str:
    rows = [
        [name, figure, *(str(_ratio(rounds, name, n, FIGURES[figure])) for n in levels)]
        for name in names
        for figure in COMPARED
    ]
    return _table(["÷ vLLM: median (lowest..highest)", "", *map(str, levels)], rows, left=2)


def _ratio(
    rounds: Sequence[Round], name: str, streams: int, figure: Callable[[Measurement], float]
) -> Spread:
    level = [one for one in rounds if one.streams == streams]
    return Spread.of(turns.ratios(level, name, VLLM, lambda one: figure(one.measurement)))


def _cpu(rounds: Sequence[Round], names: Sequence[str], levels: Sequence[int]) -> str:
    rows = [
        [name, role, *(_cpu_cell(rounds, name, n, role) for n in levels)]
        for name in names
        for role in sorted({role for one in rounds if one.stack == name for role in one.cpu_s})
    ]
    return _table(["CPU s per 1,000 tokens", "process", *map(str, levels)], rows, left=2)


def _cpu_cell(rounds: Sequence[Round], name: str, streams: int, role: str) -> str:
    used = [one.cpu_s_per_1000_tokens.get(role, 0.0) for one in of(rounds, name, streams)]
    return f"{median(used):.3f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """In Markdown; so many columns are text, the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def as_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Every round, the warm-ups included."""
    return [one.as_json() for one in rounds]


def measure(
    console: Console,
    kinds: Sequence[str],
    shape: str,
    levels: Sequence[int],
    rounds: int,
    home: Path,
) -> list[Round]:
    """Starts the servers, and compares them.

    Raises:
        StackError: a server does not start, or answers nothing.
    """
    model = servers.entry(home, shape, max(levels), TOKENS)
    console.print(f"starting {', '.join(kinds)}; they load for a minute or more", markup=False)
    with servers.all_up(kinds, model, home) as stacks:
        return run(console, stacks, model, levels, rounds)
