"""The queue's vitals as Prometheus's metric families; docs/metrics.md has them all."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from tasks.contract.job import Cause, State
from tasks.queue.control import WorkerState, WorkerView
from tasks.queue.counts import Counted, Happening
from tasks.queue.statistics import Vitals


def redis_up(is_up: bool) -> Metric:
    """Whether the queue's Redis answered the scrape."""
    return GaugeMetricFamily("sluice_redis_up", "Whether the queue's Redis answers.", is_up)


def families(seen: Vitals) -> Iterator[Metric]:
    """All that the vitals tell."""
    yield from _depths(seen)
    yield from _workers(seen.workers)
    yield from _counts(seen)
    for name, what, value in (
        ("queue_delayed", "Jobs that wait for their next try after a 5xx.", seen.delayed),
        ("leases", "Jobs that run.", seen.leases),
        ("maintenance_up", "Whether a maintenance process works.", bool(seen.maintenance)),
        ("ledger_records", "Changes of jobs that are not in SQL yet.", seen.ledger_records),
        ("redis_memory_bytes", "Memory that the queue's Redis uses.", seen.memory_bytes),
        (
            "redis_memory_limit_bytes",
            "What it may use, or its machine has.",
            seen.memory_limit_bytes,
        ),
    ):
        yield GaugeMetricFamily(f"sluice_{name}", what, value)


def _depths(seen: Vitals) -> Iterator[Metric]:
    labels = ["model", "lane"]
    depth = GaugeMetricFamily("sluice_queue_depth", "Jobs that wait.", labels=labels)
    oldest = GaugeMetricFamily(
        "sluice_queue_oldest_seconds", "Age of the oldest of them.", labels=labels
    )
    for place, waiting in seen.depths.items():
        depth.add_metric(place, waiting.jobs)
        oldest.add_metric(place, waiting.oldest_age_s)
    paused = GaugeMetricFamily(
        "sluice_queue_paused", "1: the operator has paused the model.", labels=["model"]
    )
    body_bytes = GaugeMetricFamily(
        "sluice_backlog_bytes", "Requests of open jobs, in Redis.", labels=["model"]
    )
    for model in seen.models:
        paused.add_metric([model], model in seen.paused)
        body_bytes.add_metric([model], seen.body_bytes.get(model, 0))
    yield from (depth, oldest, paused, body_bytes)


def _workers(workers: list[WorkerView]) -> Iterator[Metric]:
    alive = Counter((worker.model, worker.state) for worker in workers)
    by_state = GaugeMetricFamily("sluice_workers", "Workers that live.", labels=["model", "state"])
    for of_state, number in alive.items():
        by_state.add_metric(of_state, number)
    yield by_state
    serving = [worker for worker in workers if worker.state is WorkerState.SERVING]
    yield _by_model("slots", "Slots of the serving workers.", serving, sum, lambda w: w.slots)
    yield _by_model(
        *("slots_used", "Requests inside the engines.", workers, sum),
        lambda w: w.running + w.waiting,
    )
    yield _by_model(
        *("engine_waiting", "Requests that wait inside the engines.", workers, sum),
        lambda w: w.waiting,
    )
    yield _by_model(
        *("kv_cache_usage_ratio", "KV cache in use, of the fullest worker.", workers, max),
        lambda w: w.kv_cache_usage,
    )


def _by_model(
    name: str,
    what: str,
    workers: list[WorkerView],
    together: Callable[[Iterable[float]], float],
    value: Callable[[WorkerView], float],
) -> Metric:
    family = GaugeMetricFamily(f"sluice_{name}", what, labels=["model"])
    for model in dict.fromkeys(worker.model for worker in workers):
        family.add_metric([model], together(value(w) for w in workers if w.model == model))
    return family


def _counts(seen: Vitals) -> Iterator[Metric]:
    """With a 0 for what has not happened yet: no rate can tell a first time otherwise."""
    by_lane, counts = ["model", "lane"], seen.counts
    jobs = CounterMetricFamily(
        "sluice_jobs", "Jobs accepted, claimed and ended.", labels=[*by_lane, "status"]
    )
    requeues = CounterMetricFamily(
        "sluice_requeues", "Jobs taken from their workers.", labels=[*by_lane, "cause"]
    )
    dead = CounterMetricFamily("sluice_dead_letters", "Jobs given up.", labels=by_lane)
    for place in seen.depths:
        for state in State:
            jobs.add_metric([*place, state], counts[Happening(Counted.JOBS, state, *place)])
        for cause in Cause:
            times = counts[Happening(Counted.REQUEUES, cause, *place)]
            requeues.add_metric([*place, cause], times)
        dead.add_metric(place, counts[Happening(Counted.DEAD, "letter", *place)])
    tickets = CounterMetricFamily(
        "sluice_tickets_reissued", "Celery tickets that were lost.", labels=["model"]
    )
    for model in seen.models:
        tickets.add_metric([model], counts[Happening(Counted.TICKETS, "reissued", model)])
    webhooks = CounterMetricFamily("sluice_webhook_calls", "Webhook calls.", labels=["outcome"])
    for outcome in ("delivered", "pending", "failed", "disabled"):
        webhooks.add_metric([outcome], counts[Happening(Counted.WEBHOOKS, outcome)])
    repairs = CounterMetricFamily(
        "sluice_repairs", "What maintenance found and mended.", labels=["kind"]
    )
    for kind in ("misplaced", "stray", "unrecorded", "lost"):
        repairs.add_metric([kind], counts[Happening(Counted.REPAIRS, kind)])
    yield from (jobs, requeues, dead, tickets, webhooks, repairs)
