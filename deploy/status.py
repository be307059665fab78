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
from tasks.contract.job import Lane, State
from tasks.contract.models import get_catalog
from tasks.contract.settings import get_settings
from tasks.contract.trouble import redis_trouble
from tasks.queue.control import WorkerState, WorkerView
from tasks.queue.counts import Counted, Happening
from tasks.queue.depth import Depth
from tasks.queue.statistics import Vitals, look

REFRESH_S = 1.0
KV_CACHE_FULL = 0.95

BAD, NOTABLE = "bold red", "yellow"
NOT_KNOWN = "-"
LOAD = "slots", "waiting", "KV cache", "TTFT p50", "TTFT p95"
# Lanes are keys.
JSON_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True)
class Rates:
    """What happened to a model's jobs per second; None before there are two looks."""

    accepted: float | None
    completed: float | None
    failed: float | None


@dataclass(frozen=True)
class ModelStatus:
    """One model: what waits for it, and its workers together."""

    name: str
    is_paused: bool
    depth: dict[Lane, Depth]
    serving: int
    draining: int
    slots: int
    """Of the serving workers, as the next ones."""
    slots_used: int
    """Requests inside the engines of all workers, running or waiting there."""
    engine_waiting: int
    kv_cache_usage: float
    """0 to 1, of the fullest worker; the next ones of the slowest."""
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    rates_per_s: Rates


@dataclass(frozen=True)
class Status:
    """All that is shown."""

    models: list[ModelStatus]
    workers: list[WorkerView]
    leases: int
    delayed: int
    dead_letters: int
    """Since Redis began; `sluice dead list` shows those that are left."""
    ledger_records: int
    maintenance: str | None
    """None: no maintenance process lives."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"workers": [worker._asdict() for worker in self.workers]}


class Observer:
    """Looks at the queue again and again, and so knows rates."""

    def __init__(self) -> None:
        self._listed = [model.name for model in get_catalog().models]
        self._backlog = queue().backlog
        self._last: Vitals | None = None
        self._last_s = 0.0

    def look(self) -> Status:
        """What is so now, with rates since the look before.

        Raises:
            RedisError: Redis does not answer, or is full.
        """
        seen, now_s = look(self._backlog, self._listed), time.monotonic()
        last, interval_s = self._last, now_s - self._last_s
        self._last, self._last_s = seen, now_s
        return Status(
            models=[self._model(name, seen, last, interval_s) for name in self._names(seen)],
            workers=seen.workers,
            leases=seen.leases,
            delayed=seen.delayed,
            dead_letters=sum(n for what, n in seen.counts.items() if what.what is Counted.DEAD),
            ledger_records=seen.ledger_records,
            maintenance=seen.maintenance,
        )

    def _names(self, seen: Vitals) -> list[str]:
        """The models of models.yaml, then those that have jobs or workers all the same."""
        busy = [model for (model, _), waiting in seen.depths.items() if waiting.jobs]
        served = [worker.model for worker in seen.workers]
        return list(dict.fromkeys([*self._listed, *busy, *served]))

    def _model(
        self, name: str, seen: Vitals, last: Vitals | None, interval_s: float
    ) -> ModelStatus:
        workers = [worker for worker in seen.workers if worker.model == name]
        serving = [worker for worker in workers if worker.state is WorkerState.SERVING]

        def rate(state: State) -> float | None:
            if last is None:
                return None
            happened = _count(seen, name, state) - _count(last, name, state)
            return max(happened, 0) / interval_s  # a Redis that lost its data begins at 0

        return ModelStatus(
            name=name,
            is_paused=name in seen.paused,
            depth={lane: seen.depths.get((name, lane), Depth(0, 0.0)) for lane in Lane},
            serving=len(serving),
            draining=len(workers) - len(serving),
            slots=sum(worker.slots for worker in serving),
            slots_used=sum(worker.running + worker.waiting for worker in workers),
            engine_waiting=sum(worker.waiting for worker in workers),
            kv_cache_usage=max((worker.kv_cache_usage for worker in workers), default=0.0),
            ttft_p50_ms=_slowest(worker.ttft_p50_ms for worker in workers),
            ttft_p95_ms=_slowest(worker.ttft_p95_ms for worker in workers),
            rates_per_s=Rates(rate(State.QUEUED), rate(State.COMPLETED), rate(State.FAILED)),
        )


def _count(seen: Vitals, model: str, state: State) -> int:
    return sum(seen.counts[Happening(Counted.JOBS, state, model, lane)] for lane in Lane)


def _slowest(times_ms: Iterable[float | None]) -> float | None:
    return max((time_ms for time_ms in times_ms if time_ms is not None), default=None)


def run(*, once: bool, as_json: bool) -> None:
    """Shows the status until Ctrl-C; once if asked to, and where nobody watches.

    Raises:
        RedisError: Redis does not answer, or is full.
        ConfigurationError: a setting or models.yaml is wrong.
    """
    console, is_terminal = make_console(), sys.stdout.isatty()
    with suppress(KeyboardInterrupt):
        observer = Observer()
        status = observer.look()
        if is_terminal and not (once or as_json):
            _watch(console, observer, status)
        time.sleep(REFRESH_S)
        status = observer.look()
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
                status, trouble = observer.look(), ""
            except RedisError as away:
                trouble = f"as last seen: {redis_trouble(away, get_settings()).error}"
            live.update(Group(render(status), Text(trouble, BAD)), refresh=True)


def render(status: Status) -> Group:
    """The totals first: a small terminal cuts the end off."""
    tables = _queues(status.models), _engines(status.models), _workers(status.workers)
    return Group(_totals(status), *(part for table in tables for part in (Text(), table)))


def _queues(models: list[ModelStatus]) -> Table:
    numbers = "interactive", "batch", "oldest", "accepted/s", "completed/s", "failed/s"
    table = _table(["model"], numbers)
    for model in models:
        rates = model.rates_per_s
        table.add_row(
            Text(f"{model.name} (paused)", NOTABLE) if model.is_paused else Text(model.name),
            *(str(waiting.jobs) for waiting in model.depth.values()),
            _oldest(model),
            *map(_rate, (rates.accepted, rates.completed)),
            Text(_rate(rates.failed), BAD if rates.failed else ""),
        )
    return table


def _engines(models: list[ModelStatus]) -> Table:
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


def _load(seen: ModelStatus | WorkerView, used: int, waiting: int) -> Iterator[str | Text]:
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


def _oldest(model: ModelStatus) -> Text:
    """The age of the oldest job; what alerts is bad: batch jobs may wait."""
    age_s = max(waiting.oldest_age_s for waiting in model.depth.values())
    text = f"{age_s:.0f} s" if any(waiting.jobs for waiting in model.depth.values()) else NOT_KNOWN
    is_bad = model.depth[Lane.INTERACTIVE].oldest_age_s > get_settings().alert_oldest_s
    return Text(text, BAD if is_bad else "")


def _totals(status: Status) -> Text:
    """One line; what a person should look at has a colour."""
    totals = [
        Text(f"leases {status.leases}"),
        Text(f"delayed {status.delayed}", NOTABLE if status.delayed else ""),
        Text(f"dead letters {status.dead_letters}", NOTABLE if status.dead_letters else ""),
        Text(f"records not in SQL yet {status.ledger_records}"),
    ]
    if status.maintenance is None:
        totals.append(Text("no maintenance lives", BAD))
    return Text(" · ").join(totals)


def _rate(per_s: float | None) -> str:
    return NOT_KNOWN if per_s is None else f"{per_s:.1f}"
