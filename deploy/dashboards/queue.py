"""Where are the jobs? Waiting, running, ended, tried again, given up."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.dashboards.panels import Panel, bad_from, board, graph, number
from deploy.dashboards.promql import increase, of, quantiles, rate, same
from deploy.dashboards.shared import DEPTH, jobs_waiting

LANES = "model, lane"
PAUSED = same(of("sluice_queue_paused"), "model")
DEAD = of("sluice_dead_letters_total")
LEASES = "max(sluice_leases)"
DELAYED = "max(sluice_queue_delayed)"
LEDGER = "max(sluice_ledger_records)"


def made() -> Dashboard:
    """The dashboard of the backlog and its jobs."""
    return board(
        "sluice-queue",
        "Sluice: queue",
        "Where are the jobs? Waiting, running, ended, tried again, given up.",
        {
            "": _now(),
            "Waiting": _waiting(),
            "Jobs": _jobs(),
            "Failures": _failures(),
            "Redis, SQL and webhooks": _beside(),
        },
    )


def _now() -> list[Panel]:
    return [
        jobs_waiting(),
        number(
            "Jobs running",
            "Jobs that a worker holds a lease of, whatever their model: 0 while jobs wait is a "
            "fault, unless they are paused.",
            "short",
            LEASES,
        ),
        number(
            "Jobs delayed",
            "Jobs that wait for their next try after the engine answered 5xx, whatever their "
            "model: more than a few mean a sick engine.",
            "short",
            DELAYED,
            bad_from(1, 20),
        ),
        number(
            "Models paused",
            "Paused by an operator: their jobs wait until `sluice resume MODEL`.",
            "short",
            f"sum({PAUSED})",
            bad_from(1),
        ),
        number(
            "Dead letters",
            "Jobs given up in the time that is shown: `sluice dead list` says why.",
            "short",
            f"sum({same(f'increase({DEAD}[$__range])', LANES)})",
            bad_from(1, 10),
        ),
        number(
            "Changes not in SQL",
            "Changes of jobs that SQL does not have yet: normally a few, for a second.",
            "short",
            LEDGER,
            bad_from(1000, 10_000),
        ),
    ]


def _waiting() -> list[Panel]:
    wait = of("sluice_queue_wait_seconds_bucket")
    return [
        graph(
            "Jobs waiting",
            "A batch backlog is normal; an interactive one that lasts means too few workers; at "
            "SLUICE_MAX_BACKLOG the lane's new jobs get 503.",
            "short",
            {"{{model}} {{lane}}": DEPTH},
        ),
        graph(
            "Requests in Redis",
            "Of the jobs that have not ended; at SLUICE_MAX_BACKLOG_BYTES a model's new jobs get "
            "503.",
            "bytes",
            {"{{model}}": same(of("sluice_backlog_bytes"), "model")},
        ),
        graph(
            "Longest wait",
            "Age of the oldest job: when it grows by a second a second, nothing of the lane runs.",
            "s",
            {"{{model}} {{lane}}": same(of("sluice_queue_oldest_seconds"), LANES)},
        ),
        graph(
            "Wait until claimed",
            "Of the jobs that were claimed meanwhile: what the queue adds to the time to the "
            "first token.",
            "s",
            quantiles(wait, 0.5, 0.95, by="lane"),
        ),
    ]


def _jobs() -> list[Panel]:
    def jobs(status: str) -> str:
        return same(rate(of("sluice_jobs_total", f'status=~"{status}"')), f"{LANES}, status")

    ended = jobs("completed|failed|cancelled|expired")
    return [
        graph(
            "Accepted, claimed, ended per second",
            "The three follow each other: accepted above ended fills the backlog, claimed above "
            "ended means that jobs run twice.",
            "short",
            {
                "accepted": f"sum({jobs('queued')})",
                "claimed": f"sum({jobs('in_progress')})",
                "ended": f"sum({ended})",
            },
        ),
        graph(
            "Ended per second, by status",
            "Failed is ours or the engine's, cancelled the client's, expired a deadline that "
            "passed in the queue.",
            "short",
            {"{{status}}": f"sum by (status) ({ended})"},
        ),
        graph(
            "Running and delayed",
            "Leases are the jobs that run, whatever their model; delayed ones wait for their next "
            "try after a 5xx of the engine.",
            "short",
            {"leases": LEASES, "delayed": DELAYED},
        ),
    ]


def _failures() -> list[Panel]:
    requeues = same(increase(of("sluice_requeues_total")), f"{LANES}, cause", "cause")
    tickets = same(increase(of("sluice_tickets_reissued_total")), "model")
    repairs = same(increase("sluice_repairs_total"), "kind")
    return [
        graph(
            "Put back, by cause",
            "lease_expired, engine_died and worker_failed are failovers, see workers' logs; "
            "engine_error is a 5xx of the engine; handed_back: a worker was stopped, as is normal.",
            "short",
            {"{{cause}}": requeues},
        ),
        graph(
            "Dead letters",
            "Jobs given up after their last failure: each one deserves a `sluice dead show JOB`.",
            "short",
            {"{{model}} {{lane}}": same(increase(DEAD), LANES)},
        ),
        graph(
            "Mended by maintenance",
            "Tickets of Celery that were lost: a few after a worker was killed are normal, a "
            "steady flow is not. The others are jobs that were not where they belong: report them.",
            "short",
            {"tickets of {{model}}": tickets, "{{kind}}": repairs},
        ),
        graph(
            "Paused",
            "1 while an operator has paused the model: its backlog grows and that is intended.",
            "short",
            {"{{model}}": PAUSED},
        ),
    ]


def _beside() -> list[Panel]:
    webhooks = same(increase("sluice_webhook_calls_total"), "outcome")
    return [
        graph(
            "Changes not in SQL",
            "It grows while the database or all maintenance processes are away, and shrinks "
            "when they are back.",
            "short",
            {"records": LEDGER},
            bad_from(1000, 10_000),
        ),
        graph(
            "Webhook calls",
            "pending is tried again; failed is a receiver that was away for a day and has to ask "
            "for the job, disabled one that said 410.",
            "short",
            {"{{outcome}}": webhooks},
        ),
        graph(
            "Redis and maintenance",
            "Redis is 0 while the APIs cannot reach it: all requests get 503, and all that is read "
            "from it is missing here. Maintenance is 0 while none works: nobody hands on the jobs "
            "of dead workers.",
            "short",
            {"Redis": "min(sluice_redis_up)", "maintenance": "max(sluice_maintenance_up)"},
        ),
        graph(
            "Redis memory",
            "When what is used reaches the limit, new requests get 503 and streams pause; without "
            "a maxmemory it is the machine's memory.",
            "bytes",
            {
                "used": "max(sluice_redis_memory_bytes)",
                "limit": "max(sluice_redis_memory_limit_bytes)",
            },
        ),
    ]
