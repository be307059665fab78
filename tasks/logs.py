"""How every part logs: standard logging, written by structlog as JSON or for people to read.

Each transition of a job is a line with fields in `extra`: job, tenant, model, attempt, durations in
ms. What was asked and answered is in no line, unless SLUICE_LOG_CONTENT is on.
"""

import logging
import sys

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from tasks.settings import Settings

OURS = ("api", "tasks", "gpu_worker", "db")


def configure(settings: Settings) -> None:
    """Sets up this process's root logger: information of ours, warnings of all others."""
    known: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=known,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_json() if settings.log_format == "json" else _console()),
            ],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in OURS:
        logging.getLogger(package).setLevel(logging.INFO)


def _json() -> list[structlog.typing.Processor]:
    return [structlog.processors.dict_tracebacks, _render_json]


def _render_json(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
    return orjson.dumps(event, default=str).decode()


def _console() -> list[structlog.typing.Processor]:
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)]
