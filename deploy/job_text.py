"""Jobs as text for people: one in full, or a list."""

import math
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.contract.tracebacks import one_line

Json = dict[str, Any]

# A pipe has no width of its own, and rich's 80 columns would cut names.
PIPE_COLUMNS = 160
# From here on a list has its last columns too.
WIDE_COLUMNS = 100
NAME_COLUMNS = 11
UNITS = (86_400, "d"), (3600, "h"), (60, "m"), (1, "s")


def make_console() -> Console:
    """Standard output; wide enough for names where it has no width of its own."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    return console


def outlook(queue: Json) -> str:
    """When a queued job will start, or why it will not for now; empty: not known."""
    if queue["is_paused"]:
        return "paused"
    if not queue["workers"]:
        return "no worker"
    return "" if queue["eta_s"] is None else f"starts in {duration(math.ceil(queue['eta_s']))}"


def duration(length_s: int) -> str:
    """In the greatest unit that it fills: 59s, 3m, 1d."""
    # Clocks may differ by a little.
    found = (f"{length_s // size}{unit}" for size, unit in UNITS if length_s >= size)
    return next(found, "0s")


def reason(job: Json) -> str:
    """Why a job did not complete, with the error's code."""
    error, answer = job["error"], job["response"]
    if not error:
        return f"the engine answered {answer['status_code']}" if answer else "no reason is kept"
    if not isinstance(error, dict):  # a remote engine's error may have another form
        return one_line(str(error))
    message, code = error.get("message") or error, error.get("code")
    return one_line(f"{message} ({code})" if code else str(message))


def describe(job: Json, webhook: Json | None) -> Iterator[str]:
    """A job in full, line by line, as wide as the terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for name, value in _facts(job, webhook):
        first, *rest = textwrap.wrap(one_line(value), max(width - NAME_COLUMNS, 20)) or [""]
        yield f"{name:{NAME_COLUMNS}}{first}"
        yield from (" " * NAME_COLUMNS + line for line in rest)


def _facts(job: Json, webhook: Json | None) -> Iterator[tuple[str, str]]:
    yield "id", job["id"]
    yield "status", job["status"]
    for name in ("model", "endpoint", "priority"):
        yield name, str(job[name])
    yield from _timeline(job)
    yield "attempts", str(job["attempts"])
    if queue := job["queue"]:
        place = f"place {queue['position']}"
        yield "queue", ", ".join(filter(None, (place, outlook(queue))))
    elif job["status"] == "queued" and job["attempts"]:
        yield "queue", "waits for its next try after a failure"
    if usage := job["usage"]:
        numbers = {name: usage.get(f"{name}_tokens") for name in ("prompt", "completion")}
        yield "tokens", ", ".join(f"{count} {name}" for name, count in numbers.items() if count)
    if job["completed_at"] and job["status"] != "completed":
        yield from _failure(job)
    if webhook:
        tries = len(webhook["attempts"])
        yield "webhook", f"{webhook['state']} after {tries} {'try' if tries == 1 else 'tries'}"
    for name, value in job["metadata"].items():
        yield "metadata", f"{name}={value}"


def _timeline(job: Json) -> Iterator[tuple[str, str]]:
    created_at, started_at, ended_at = (
        job[name] for name in ("created_at", "started_at", "completed_at")
    )
    yield "submitted", f"{_clock(created_at)}, {_age(job)} ago"
    if started_at:
        yield "started", f"{_clock(started_at)}, waited {duration(started_at - created_at)}"
    if ended_at:
        length = f"ran {duration(ended_at - started_at)}" if started_at else "never started"
        yield "ended", f"{_clock(ended_at)}, {length}"
    elif started_at and job["status"] == "in_progress":
        yield "running", f"for {duration(round(time.time()) - started_at)}"


def _failure(job: Json) -> Iterator[tuple[str, str]]:
    yield "error", reason(job)
    if "job_failed" in reason(job):
        yield "", f"sluice dead show {job['id']} shows why each attempt failed"


def _clock(at_s: int) -> str:
    return f"{datetime.fromtimestamp(at_s).astimezone():%Y-%m-%d %H:%M:%S}"


def _age(job: Json) -> str:
    return duration(round(time.time()) - job["created_at"])


def show_table(jobs: Iterable[Json]) -> None:
    """Jobs, a line each; all columns where there is no terminal to be wide enough."""
    console = make_console()
    names = ["id", "status", "age", "model", "place", "attempts", "tokens"]
    if console.width < WIDE_COLUMNS:
        names = names[:5]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        # Nothing but a model's name may be cut.
        table.add_column(name, no_wrap=name != "model", overflow="ellipsis")
    for job in jobs:
        queue, usage = job["queue"], job["usage"] or {}
        place = _place(queue) if queue else ""
        cells = job["id"], job["status"], _age(job), job["model"], place, job["attempts"]
        row = [str(cell) for cell in (*cells, usage.get("total_tokens", ""))]
        table.add_row(*row[: len(names)])
    console.print(table)


def _place(queue: Json) -> str:
    return ", ".join(filter(None, (str(queue["position"]), outlook(queue).removeprefix("starts "))))
