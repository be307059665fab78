"""How every part logs: standard logging, written as JSON or for people to read.

Each transition of a job is a line with fields in `extra`: job, tenant, model, attempt, durations in
ms. What was asked and answered is in no line, unless SLUICE_LOG_CONTENT is on.

Logging never blocks: lines have a bounded size and are written by a thread of their own
(log_writer.py), and repeated trouble is logged once in a while, with its count.
"""

import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

from tasks.contract import tracebacks
from tasks.contract.log_writer import LogWriter, original
from tasks.contract.settings import Settings

OURS = ("api", "tasks", "gpu_worker", "db")
# Repeated trouble is logged once per interval.
REPEAT_S = 10.0
MOST_CAUSES = 1000
LONGEST_MESSAGE = 4000
STDERR = 2
# What every record has; all else came in `extra`.
_STANDARD = logging.makeLogRecord({}).__dict__.keys() | {"taskName", "message"}

# A text with one of these is quoted, so that fields can be told apart.
_QUOTED = re.compile(r"[\s=\"']")

# Logger, message before its arguments, types of exceptions, place.
Cause = tuple[str, str, str, str]


def configure(settings: Settings) -> None:
    """Sets up this process's root logger: information of ours, warnings of all others."""
    render = _render_json if settings.log_format == "json" else _console()
    handler = Handler(render, settings.log_content)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in OURS:
        logging.getLogger(package).setLevel(logging.INFO)
    take_over_loggers()


def take_over_loggers() -> None:
    """Removes the handlers of libraries' loggers, so that they log like all others."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers.clear()
            logger.propagate = True


def flush() -> None:
    """Waits, not for long, until all lines are written: before an exit that runs no handlers."""
    for handler in logging.root.handlers:
        handler.flush()


class Handler(logging.Handler):
    """Renders lines, and hands them to the thread that writes them."""

    def __init__(self, render: Callable[[dict[str, Any]], str], shows_content: bool) -> None:
        super().__init__()
        self._render = render
        self._shows_content = shows_content
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._repeats = Repeats()
        self._writer = LogWriter(STDERR, self._render_missing, self._report_repeats)

    def handle(self, record: logging.LogRecord) -> bool:
        """Takes the record without logging's own lock: no thread waits for another one's line."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Queues the line to be written, unless the same was logged a moment ago."""
        try:
            cause = _cause(record)
            left_out = self._repeats.note(cause) if cause else 0
            if left_out is None:
                return
            event = _compose(record, self._shows_content)
            line = self._render(event | ({"left_out": left_out} if left_out else {}))
        except Exception as broken:  # noqa: BLE001 (whatever a caller or a library hands us)
            line = f"a line of {record.name} could not be put together: {type(broken).__name__}"
        self._writer.put(line)

    def flush(self) -> None:
        """Waits, not for long, until all lines are written; logging calls it at the end."""
        self._report_repeats(math.inf)
        self._writer.flush()

    def _report_repeats(self, until_s: float | None = None) -> None:
        for (logger, message, *_), left_out in self._repeats.over(until_s or time.monotonic()):
            self._writer.put(self._render(_event(logger, f"again: {message}", left_out=left_out)))

    def _render_missing(self, lines: int) -> str:
        return self._render(_event(__name__, "lines came faster than written", left_out=lines))


class Repeats:
    """Trouble that was logged lately, and how often it has recurred since."""

    def __init__(self) -> None:
        self._lock = original("_thread", "RLock")()
        self._logged: dict[Cause, tuple[float, int]] = {}

    def note(self, cause: Cause) -> int | None:
        """How often it was suppressed, if it is to be logged now; else None."""
        now_s = time.monotonic()
        with self._lock:
            until_s, left_out = self._logged.get(cause, (0.0, 0))
            if now_s < until_s:
                self._logged[cause] = until_s, left_out + 1
                return None
            if cause in self._logged or len(self._logged) < MOST_CAUSES:
                self._logged[cause] = now_s + REPEAT_S, 0
            return left_out

    def over(self, now_s: float) -> list[tuple[Cause, int]]:
        """Trouble whose interval is over, and how often it was suppressed; forgets it."""
        with self._lock:
            over = [(cause, n) for cause, (until_s, n) in self._logged.items() if until_s <= now_s]
            for cause, _ in over:
                del self._logged[cause]
        return [(cause, left_out) for cause, left_out in over if left_out]


def _cause(record: logging.LogRecord) -> Cause | None:
    """What makes two lines the same trouble; None: it is logged each time.

    As is all below a warning, and what names its job or the like in a field.
    """
    error = record.exc_info[1] if record.exc_info else None
    if error is None and (record.levelno < logging.WARNING or vars(record).keys() - _STANDARD):
        return None
    about = [error] if error else record.args if isinstance(record.args, tuple) else ()
    kinds = ",".join(type(what).__name__ for what in about if isinstance(what, BaseException))
    place = tracebacks.place(error) if error else ""
    return record.name, str(record.msg)[:LONGEST_MESSAGE], kinds, place


def _compose(record: logging.LogRecord, shows_content: bool) -> dict[str, Any]:
    extra = {name: what for name, what in vars(record).items() if name not in _STANDARD}
    if isinstance(record.args, tuple):
        record.args = tuple(
            tracebacks.message_of(about, shows_content)
            if isinstance(about, BaseException)
            else about
            for about in record.args
        )
    message = tracebacks.cut(record.getMessage(), LONGEST_MESSAGE)
    event = _event(record.name, message, record.levelname, record.created, **extra)
    if record.exc_info and record.exc_info[1]:
        event["exception"] = tracebacks.render(record.exc_info[1], shows_content)
    return event


def _event(
    logger: str, message: str, level: str = "WARNING", at_s: float | None = None, **extra: Any
) -> dict[str, Any]:
    moment = datetime.fromtimestamp(time.time() if at_s is None else at_s, UTC)
    return extra | {
        "event": message,
        "level": level.lower(),
        "logger": logger,
        "timestamp": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
    }


def _render_json(event: Mapping[str, Any]) -> str:
    return orjson.dumps(event, default=str).decode()


def _console() -> Callable[[dict[str, Any]], str]:
    is_terminal = sys.stderr.isatty()
    write = structlog.dev.ConsoleRenderer(
        colors=is_terminal,
        pad_event_to=0,
        exception_formatter=structlog.dev.plain_traceback,
    )

    def render(event: dict[str, Any]) -> str:
        plain = {name: _plain(name, event[name]) for name in event}
        is_simple = not is_terminal and "exception" not in plain
        return _in_one_line(plain) if is_simple else str(write(None, "", plain))

    return render


def _in_one_line(event: dict[str, Any]) -> str:
    """What structlog writes without colours, in a fraction of its time."""
    moment, level, message = event.pop("timestamp"), event.pop("level"), event.pop("event")
    logger = event.pop("logger")
    fields = "".join([f" {name}={_readable(event[name])}" for name in sorted(event)])
    return f"{moment} [{level:<9}] {message} [{logger}]{fields}"


def _readable(value: object) -> str:
    return str(value) if isinstance(value, str) and not _QUOTED.search(value) else repr(value)


def _plain(name: str, value: Any) -> Any:
    """The value in one line, whatever it holds; JSON needs no such care."""
    is_line = isinstance(value, str) and name != "exception"
    return tracebacks.one_line(value) if is_line else value
