"""What a worker measures of its jobs, served with vLLM's own metrics on a port of its own.

Latencies count a stream's events as tokens: several may share one, and only the counter has all.

Private interfaces in use: `_buckets` and `_sum` of prometheus_client's histograms.
"""

import functools
import socket
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from statistics import quantiles
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import Counter, Histogram, disable_created_metrics, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from tasks.contract.buckets import FIRST_OUTPUT_S
from tasks.contract.job import Claim, Lane

# Else each of ours and vLLM's has a second series, which is not used.
disable_created_metrics()  # type: ignore[no-untyped-call]

_LABELS = ["model", "lane"]
_BETWEEN_TOKENS_S = (0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.04, 0.06, 0.1, 0.2, 0.5, 1, 2)
_ADDED_S = 1.0
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600, 1800)

QUEUE_WAIT = Histogram(
    "sluice_queue_wait_seconds", "From acceptance to the claim.", _LABELS, buckets=_WHOLE_S
)
TTFT = Histogram(
    "sluice_time_to_first_token_seconds",
    "From acceptance to the first output of a stream.",
    _LABELS,
    buckets=FIRST_OUTPUT_S,
)
INTER_TOKEN = Histogram(
    "sluice_inter_token_latency_seconds",
    "Between two outputs of a stream.",
    _LABELS,
    buckets=_BETWEEN_TOKENS_S,
)
TPOT = Histogram(
    "sluice_time_per_output_token_seconds",
    "Of a stream: (last output - first) / (tokens - 1).",
    _LABELS,
    buckets=_BETWEEN_TOKENS_S,
)
DURATION = Histogram(
    "sluice_request_duration_seconds", "From acceptance to the end.", _LABELS, buckets=_WHOLE_S
)
TOKENS = Counter("sluice_tokens", "Tokens, by type: input or output.", [*_LABELS, "type"])

_app: Callable[..., Iterable[bytes]] = make_wsgi_app()
_ready = threading.Event()

_RECENT = 200
_recent_ttft_ms: deque[float] = deque(maxlen=_RECENT)


class RecentTtft(NamedTuple):
    """The times to first token of this worker's latest streams; None without any."""

    ttft_p50_ms: float | None
    ttft_p95_ms: float | None


class _Gaps:
    """Times between outputs, summed by the engine's loop and added to their series once a second.

    The histogram's own way takes locks and a search for each, which is more than all else that is
    measured of an event.
    """

    def __init__(self, model: str, lane: str) -> None:
        self._series: Any = INTER_TOKEN.labels(model, lane)
        self._begin(time.monotonic())

    def _begin(self, now_s: float) -> None:
        self._counts = [0] * (len(_BETWEEN_TOKENS_S) + 1)
        self._sum_s = 0.0
        self._due_s = now_s + _ADDED_S

    def note(self, gap_s: float, now_s: float) -> None:
        self._counts[bisect_left(_BETWEEN_TOKENS_S, gap_s)] += 1
        self._sum_s += gap_s
        if now_s >= self._due_s:
            self.add(now_s)

    def add(self, now_s: float) -> None:
        """Adds what was noted."""
        for bucket, count in zip(self._series._buckets, self._counts, strict=True):  # noqa: SLF001
            if count:
                bucket.inc(count)
        self._series._sum.inc(self._sum_s)  # noqa: SLF001
        self._begin(now_s)


@functools.cache
def _gaps_of(model: str, lane: str) -> _Gaps:
    return _Gaps(model, lane)


class Meter:
    """The clock of one job on this worker."""

    def __init__(self, claim: Claim) -> None:
        self._labels = claim.job.model, claim.job.lane
        self.begun_s = time.monotonic()
        self.accepted_s = self.begun_s - claim.queue_ms / 1000
        self.first_s = self.last_s = 0.0
        """When a stream's first and latest output of this attempt went out; 0: none did."""
        self._is_continued = claim.attempt > 1
        self._tokens = 0
        self._gaps = _gaps_of(*self._labels)
        if not self._is_continued:
            QUEUE_WAIT.labels(*self._labels).observe(claim.queue_ms / 1000)

    def output(self, tokens: int) -> None:
        """An event goes out, and the engine has made so many tokens; 0: it counts none.

        Events that only begin or end a stream bring no new ones, and are not timed.
        """
        if tokens and tokens == self._tokens:
            return
        now_s, self._tokens = time.monotonic(), tokens
        if self.last_s:
            self._gaps.note(now_s - self.last_s, now_s)
        else:
            self._note_first(now_s)
        self.last_s = now_s

    def _note_first(self, now_s: float) -> None:
        self.first_s = now_s
        if not self._is_continued:
            TTFT.labels(*self._labels).observe(now_s - self.accepted_s)
            _recent_ttft_ms.append((now_s - self.accepted_s) * 1000)

    def end(self, input_tokens: int, output_tokens: int) -> None:
        """The job has ended, with so many tokens in all its attempts."""
        DURATION.labels(*self._labels).observe(time.monotonic() - self.accepted_s)
        if self.first_s and not self._is_continued and output_tokens > 1:
            spent_s = self.last_s - self.first_s
            TPOT.labels(*self._labels).observe(spent_s / (output_tokens - 1))
        TOKENS.labels(*self._labels, "input").inc(input_tokens)
        TOKENS.labels(*self._labels, "output").inc(output_tokens)

    def close(self) -> None:
        """Ends what is measured here of the job, which may go on elsewhere."""
        self._gaps.add(time.monotonic())


def recent_ttft() -> RecentTtft:
    """For the heartbeat: what `sluice status` shows without Prometheus."""
    if len(_recent_ttft_ms) < 2:
        lone = next(iter(_recent_ttft_ms), None)
        return RecentTtft(lone, lone)
    cuts = quantiles(list(_recent_ttft_ms), n=20, method="inclusive")
    return RecentTtft(cuts[9], cuts[18])


def report_ready(is_ready: bool) -> None:
    """Whether the worker takes jobs, for those that start one worker after the other."""
    if is_ready:
        _ready.set()
    else:
        _ready.clear()


def bind_of(bind: str, place: int) -> str:
    """The HOST:PORT of one front end of several: each has the next port, or any free one."""
    host, _, port = bind.rpartition(":")
    return f"{host}:{int(port) and int(port) + place}"


def serve(bind: str, redis_host: str, model: str) -> str:
    """Serves /metrics and /ready on HOST:PORT, in a thread; returns where others find them.

    All series of the model exist from the start: else no rate would see their first increase.

    Raises:
        OSError: the address cannot be bound.
    """
    for lane in Lane:
        for histogram in (QUEUE_WAIT, TTFT, INTER_TOKEN, TPOT, DURATION):
            histogram.labels(model, lane)
        for kind in ("input", "output"):
            TOKENS.labels(model, lane, kind)
    host, _, port = bind.rpartition(":")
    server = make_server(host, int(port), _respond, ThreadingWSGIServer, _QuietHandler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    if host in ("0.0.0.0", "::"):  # noqa: S104 (compared)
        host = _own_address(redis_host)
    return f"{host}:{server.server_port}"


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        """Does not log scrapes."""


def _respond(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Metrics in Prometheus's text format, whatever was asked for; /ready: 200 or 503.

    In OpenMetrics the library writes vLLM's `vllm:…` as `vllm_…`, which no query expects.
    """
    if environ["PATH_INFO"] == "/ready":
        is_ready = _ready.is_set()
        status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        start_response(f"{status} {status.phrase}", [("Content-Type", "text/plain")])
        return [b"ready" if is_ready else b"loading or draining"]
    environ.pop("HTTP_ACCEPT", None)
    return _app(environ, start_response)


def _own_address(peer: str) -> str:
    """The address of the host on the route to the peer; no packet is sent.

    The host's name, while there is no such route: the name of a Redis that is away may not resolve.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
