"""What the API's processes count and time, together.

Each process keeps its numbers in files of its slot; the next process of that slot goes on with
them, so nothing is lost or grows when gunicorn replaces processes.
"""

import fcntl
import os
import time
from itertools import count
from pathlib import Path

from flask import Flask, Response, g, request
from prometheus_client import Counter, Gauge, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector

from tasks.contract.buckets import FIRST_OUTPUT_S

# prometheus-client's own name.
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


def _take_slot() -> str:
    """The first slot that no living process has; its lock ends with the process."""
    for slot in count():
        lock = os.open(Path(os.environ[DIRECTORY]) / f"{slot}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return str(slot)
        except BlockingIOError:
            os.close(lock)
    raise AssertionError


_SLOT = _take_slot()
values.ValueClass = values.MultiProcessValue(lambda: _SLOT)  # type: ignore[no-untyped-call]

REQUESTS = Counter("sluice_http_requests", "Requests answered.", ["endpoint", "status"])
RESPONSE = Histogram(
    "sluice_http_response_seconds",
    "From a request to the first byte of its answer.",
    ["endpoint"],
    buckets=FIRST_OUTPUT_S,
)
ERRORS = Counter("sluice_errors", "Errors of Sluice's own.", ["status", "code"])
FALLBACKS = Counter(
    "sluice_fallbacks", "Requests that another model got.", ["model", "fallback", "reason"]
)
DEGRADED = Counter(
    "sluice_degraded", "Requests that got less, as their model was busy.", ["model", "how"]
)
STREAMS = Gauge("sluice_streams_open", "Requests that wait for jobs now.", multiprocess_mode="sum")
# What a process that was killed had open is no longer.
STREAMS.set(0)


def count_open_streams() -> int:
    """Requests that wait for jobs now, in all processes."""
    files = map(str, Path(os.environ[DIRECTORY]).glob("gauge_sum_*.db"))
    found = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
    samples = [sample for metric in found for sample in metric.samples]
    return int(sum(sample.value for sample in samples if sample.name == "sluice_streams_open"))


def register(app: Flask) -> None:
    """Has every request of the app counted and timed."""
    app.before_request(_note_begin)
    app.after_request(_note_answer)


def _note_begin() -> None:
    g.begun_s = time.perf_counter()


def _note_answer(response: Response) -> Response:
    endpoint = request.url_rule.rule if request.url_rule else "unknown"
    REQUESTS.labels(endpoint, str(response.status_code)).inc()
    RESPONSE.labels(endpoint).observe(time.perf_counter() - g.begun_s)
    return response
