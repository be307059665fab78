"""Is all well? Latency, traffic, errors and saturation, the four golden signals."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.dashboards.panels import Panel, bad_from, board, good_from, graph, number
from deploy.dashboards.promql import of, or_zero, own, quantile, quantiles, rate, same
from deploy.dashboards.shared import KV_CACHE, SLOTS, USED, jobs_waiting, kv_cache

CALLS = 'sluice_http_requests_total{endpoint=~"/v1/.*"}'
FAILED = 'sluice_http_requests_total{endpoint=~"/v1/.*", status=~"5.."}'
REFUSED = 'sluice_http_requests_total{endpoint=~"/v1/.*", status=~"[45].."}'
FIRST_BYTE = 'sluice_http_response_seconds_bucket{endpoint=~"/v1/.*"}'
# Without any call nothing failed.
FAILED_SHARE = or_zero(f"({or_zero(f'sum({rate(FAILED)})')}) / (sum({rate(CALLS)}) > 0)")

INTERACTIVE = 'lane="interactive"'
OLDEST = of("sluice_queue_oldest_seconds")
SERVING = same(of("sluice_workers", 'state="serving"'), "model, state")


def made() -> Dashboard:
    """The dashboard to look at first."""
    return board(
        "sluice-overview",
        "Sluice: overview",
        "Is all well? Latency, traffic, errors and saturation of all of Sluice.",
        {
            "": _now(),
            "Latency": _latency(),
            "Traffic": _traffic(),
            "Errors": _errors(),
            "Saturation": _saturation(),
        },
    )


def _now() -> list[Panel]:
    return [
        jobs_waiting(),
        number(
            "Longest wait, interactive",
            "Age of the oldest job that somebody watches: above a few seconds they notice.",
            "s",
            f"max({of('sluice_queue_oldest_seconds', INTERACTIVE)})",
            bad_from(10, 60),
        ),
        number(
            "Slots used",
            "Share of the serving workers' slots: at 100 % the next job waits in the backlog.",
            "percentunit",
            f"sum({USED}) / sum({SLOTS})",
            bad_from(0.8, 1),
        ),
        number(
            "KV cache used",
            "Of the fullest worker: near 100 % vLLM preempts requests and computes them again.",
            "percentunit",
            f"max({KV_CACHE})",
            bad_from(0.8, 0.95),
        ),
        number(
            "Calls that failed",
            "Share of calls of /v1 answered with 5xx: when it is not 0, see the errors below.",
            "percentunit",
            FAILED_SHARE,
            bad_from(0.01, 0.05),
        ),
        number(
            "Workers serving",
            "Workers that take jobs: without any, all jobs wait.",
            "short",
            or_zero(f"sum({SERVING})", while_there="sluice_leases"),
            good_from(1),
        ),
    ]


def _latency() -> list[Panel]:
    ttft = of("sluice_time_to_first_token_seconds_bucket", INTERACTIVE)
    return [
        graph(
            "Time to first token, interactive",
            "From acceptance to the first output, what users feel most: when it rises and the "
            "queue's wait does too, workers are missing; when only it rises, prompts are long.",
            "s",
            quantiles(ttft, 0.5, 0.95, 0.99),
            bad_from(2, 8),
        ),
        graph(
            "Time per output token",
            "Mean pace of each answer: it rises with the requests that share an engine; above "
            "0.2 s text comes slower than people read.",
            "s",
            quantiles(of("sluice_time_per_output_token_seconds_bucket"), 0.5, 0.95, 0.99),
            bad_from(0.1, 0.2),
        ),
        graph(
            "Whole requests",
            "From acceptance to the end: it grows with the answers' lengths, so compare it with "
            "the tokens below before you look for a fault.",
            "s",
            quantiles(of("sluice_request_duration_seconds_bucket"), 0.5, 0.95, 0.99),
        ),
        graph(
            "First byte of an answer, p95",
            "By the APIs' clocks: when it rises on endpoints that wait for no job, the API, Redis "
            "or the database is slow.",
            "s",
            {"{{endpoint}}": quantile(0.95, FIRST_BYTE, "endpoint")},
        ),
    ]


def _traffic() -> list[Panel]:
    return [
        graph(
            "Calls, by endpoint",
            "Calls of /v1 answered, whatever their model: a sudden fall is as bad as a rise.",
            "reqps",
            {"{{endpoint}}": own(rate(CALLS), "endpoint")},
        ),
        graph(
            "Tokens per second",
            "The work done: output that stays level while the backlog grows means that the "
            "engines are at their limit.",
            "short",
            {"{{type}}": own(rate(of("sluice_tokens_total")), "type")},
        ),
        graph(
            "Connections that wait for jobs",
            "Streams and other calls that the APIs hold open: it is normal that it follows the "
            "jobs; jobs in the background need none.",
            "short",
            {"open": "sum(sluice_streams_open)"},
        ),
    ]


def _errors() -> list[Panel]:
    return [
        graph(
            "Calls that failed",
            "Share of calls of /v1 answered with 5xx: a small steady one may be one client's, a "
            "step is a fault of ours.",
            "percentunit",
            {"5xx": FAILED_SHARE},
            bad_from(0.01, 0.05),
        ),
        graph(
            "Calls answered with an error, by status",
            "4xx are mistakes of clients, 503 is a full or unreachable queue, 504 a request that "
            "took too long.",
            "reqps",
            {"{{status}}": or_zero(own(rate(REFUSED), "status"), "status")},
        ),
        graph(
            "Errors per second, by code",
            "Errors of Sluice's own, whatever their model: the code names the cause.",
            "short",
            {
                "{{status}} {{code}}": or_zero(
                    own(rate("sluice_errors_total"), "status, code"), "code"
                )
            },
        ),
    ]


def _saturation() -> list[Panel]:
    return [
        graph(
            "Jobs waiting, by lane",
            "A batch backlog is normal; an interactive one that lasts means too few workers.",
            "short",
            {"{{lane}}": same(of("sluice_queue_depth"), "model, lane", "lane")},
        ),
        graph(
            "Longest wait, by lane",
            "Age of the oldest job: when it grows by a second a second, nothing of the lane runs.",
            "s",
            {"{{lane}}": f"max by (lane) ({OLDEST})"},
        ),
        graph(
            "Slots",
            "When what is used touches the total, jobs wait: add workers or slots.",
            "short",
            {"used": f"sum({USED})", "total": f"sum({SLOTS})"},
        ),
        kv_cache(),
    ]
