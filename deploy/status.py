"""`sluice status`: models, workers and totals on one screen (tasks/queue/statistics.py)."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import click
import orjson
from redis.exceptions import RedisError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.job_text import make_console
from deploy.operate import queue
from tasks.contract.job import State
from tasks.contract.models import get_catalog
from tasks.contract.settings import get_settings
from tasks.contract.trouble import redis_trouble
from tasks.queue.control import WorkerState, WorkerView
from tasks.queue.counts import Counted
from tasks.queue.problems import KV_CACHE_FULL, Problem, Severity, find_problems
from tasks.queue.statistics import ModelStats, QueueStats, read_stats

REFRESH_S = 1.0

BAD, NOTABLE = "bold red", "yellow"
NOT_KNOWN = "-"
LOAD = "slots", "waiting", "KV cache", "TTFT p50", "TTFT p95"
# Lanes are keys.
JSON_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True)
class Rates:
    """What happened to a model's jobs per second; None before the second reading."""

    accepted: float | None
    completed: float | None
    failed: float | None


@dataclass(frozen=True)
class Status:
    """All that is shown."""

    stats: QueueStats
    rates_per_s: dict[str, Rates]
    """Of each model."""
    problems: list[Problem]

    @property
    def models(self) -> list[ModelStats]:
        """Those of models.yaml, then those that have jobs or workers all the same."""
        return [
            model
            for model in self.stats.models
            if model.name in self.stats.listed or model.waiting.jobs or model.has_workers
        ]

    def as_json(self) -> dict[str, Any]:
        stats = self.stats
        return {
            "models": [asdict(m) | {"rates_per_s": self.rates_per_s[m.name]} for m in self.models],
            "workers": [worker._asdict() for worker in stats.workers],
            "leases": stats.leases,
            "delayed": stats.delayed,
            "dead_letters": stats.total(Counted.DEAD),
            "ledger_records": stats.ledger_records,
            "maintenance": stats.maintenance,
        }


class Observer:
    """Reads the queue repeatedly, and computes rates."""

    def __init__(self) -> None:
        self._listed = [model.name for model in get_catalog().models]
        self._backlog = queue().backlog
        self._last: QueueStats | None = None
        self._last_s = 0.0

    def read(self) -> Status:
        """The current status, with rates since the last reading.

        Raises:
            RedisError: Redis does not answer, or is full.
        """
        stats, now_s = read_stats(self._backlog, self._listed), time.monotonic()
        last, interval_s = self._last, now_s - self._last_s
        self._last, self._last_s = stats, now_s
        rates = {model.name: _rates(model.name, stats, last, interval_s) for model in stats.models}
        return Status(stats, rates, find_problems(stats, get_settings()))


def _rates(model: str, stats: QueueStats, last: QueueStats | None, interval_s: float) -> Rates:
    def per_s(state: State) -> float | None:
        if last is None:
            return None
        happened = stats.total_jobs(model, state) - last.total_jobs(model, state)
        return max(happened, 0) / interval_s  # a Redis that lost its data begins at 0

    return Rates(per_s(State.QUEUED), per_s(State.COMPLETED), per_s(State.FAILED))


def run(*, once: bool, as_json: bool) -> None:
    """Shows the status until Ctrl-C; once on request, and where there is no terminal.

    Raises:
        RedisError: Redis does not answer, or is full.
        ConfigurationError: a setting or models.yaml is wrong.
    """
    console, is_terminal = make_console(), sys.stdout.isatty()
    with suppress(KeyboardInterrupt):
        observer = Observer()
        status = observer.read()
        if is_terminal and not (once or as_json):
            _watch(console, observer, status)
        time.sleep(REFRESH_S)
        status = observer.read()
        if as_json:
            click.echo(orjson.dumps(status.as_json(), option=JSON_OPTIONS))
        else:
            console.print(render(status))


def _watch(console: Console, observer: Observer, status: Status) -> NoReturn:
    """Until Ctrl-C, also while Redis is away."""
    with Live(render(status), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_S)
            try:
                status, trouble = observer.read(), ""
            except RedisError as away:
                trouble = f"as last seen: {redis_trouble(away, get_settings()).error}"
            live.update(Group(render(status), Text(trouble, BAD)), refresh=True)


def render(status: Status) -> Group:
    """Totals and problems first: a small terminal cuts the end off."""
    tables = _queues(status), _engines(status.models), _workers(status.stats.workers)
    parts = [part for table in tables for part in (Text(), table)]
    return Group(_totals(status), *map(_problem, status.problems), *parts)


def _queues(status: Status) -> Table:
    numbers = "interactive", "batch", "oldest", "accepted/s", "completed/s", "failed/s"
    table = _table(["model"], numbers)
    old = {problem.model for problem in status.problems if problem.name == "SluiceQueueOld"}
    for model in status.models:
        rates = status.rates_per_s[model.name]
        table.add_row(
            Text(f"{model.name} (paused)", NOTABLE) if model.is_paused else Text(model.name),
            *(str(waiting.jobs) for waiting in model.depth.values()),
            Text(_oldest(model), BAD if model.name in old else ""),
            *map(_rate, (rates.accepted, rates.completed)),
            Text(_rate(rates.failed), BAD if rates.failed else ""),
        )
    return table


def _engines(models: list[ModelStats]) -> Table:
    table = _table(["model"], ["serving", "draining", *LOAD])
    for model in models:
        table.add_row(
            Text(model.name),
            Text(str(model.serving)) if model.serving else Text("none", BAD),
            Text(str(model.draining), NOTABLE if model.draining else ""),
            *_load(model, model.slots_used, model.engine_waiting),
        )
    return table


def _workers(workers: list[WorkerView]) -> Table:
    table = _table(["worker", "model", "state"], LOAD)
    for worker in workers:
        table.add_row(
            *map(Text, (worker.id, worker.model)),
            Text(worker.state, "" if worker.state is WorkerState.SERVING else NOTABLE),
            *_load(worker, worker.running + worker.waiting, worker.waiting),
        )
    return table


def _load(seen: ModelStats | WorkerView, used: int, waiting: int) -> Iterator[str | Text]:
    """The cells of LOAD."""
    yield f"{used}/{seen.slots}"
    yield str(waiting)
    full = BAD if seen.kv_cache_usage > KV_CACHE_FULL else ""
    yield Text(f"{seen.kv_cache_usage:.0%}", full)
    for time_ms in (seen.ttft_p50_ms, seen.ttft_p95_ms):
        yield NOT_KNOWN if time_ms is None else f"{time_ms:.0f} ms"


def _table(names: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in names:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _oldest(model: ModelStats) -> str:
    return f"{model.waiting.oldest_age_s:.0f} s" if model.waiting.jobs else NOT_KNOWN


def _totals(status: Status) -> Text:
    """One line; notable values have a colour."""
    stats, dead_letters = status.stats, status.stats.total(Counted.DEAD)
    totals = [
        Text(f"leases {stats.leases}"),
        Text(f"delayed {stats.delayed}", NOTABLE if stats.delayed else ""),
        Text(f"dead letters {dead_letters}", NOTABLE if dead_letters else ""),
        Text(f"records not in SQL yet {stats.ledger_records}"),
    ]
    return Text(" · ").join(totals)


def _problem(problem: Problem) -> Text:
    is_bad = problem.severity is Severity.CRITICAL
    return Text(f"{problem.severity}: {problem.what}", BAD if is_bad else NOTABLE)


def _rate(per_s: float | None) -> str:
    return NOT_KNOWN if per_s is None else f"{per_s:.1f}"
