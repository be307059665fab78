"""The queue's statistics as Prometheus's metric families; docs/metrics.md has them all."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from tasks.contract.job import Cause, Lane, State
from tasks.queue.control import WorkerState
from tasks.queue.counts import Counted, Happening
from tasks.queue.statistics import ModelStats, QueueStats


def redis_up(is_up: bool) -> Metric:
    """Whether the queue's Redis answered the scrape."""
    return GaugeMetricFamily("sluice_redis_up", "Whether the queue's Redis answers.", is_up)


def families(stats: QueueStats) -> Iterator[Metric]:
    """All that the statistics tell."""
    yield from _backlog(stats)
    yield from _workers(stats.models)
    yield from _counts(stats)
    memory = stats.memory
    for name, what, value in (
        ("queue_delayed", "Jobs that wait for their next try after a 5xx.", stats.delayed),
        ("leases", "Jobs that run.", stats.leases),
        ("maintenance_up", "Whether a maintenance process works.", bool(stats.maintenance)),
        ("ledger_records", "Changes of jobs that are not in SQL yet.", stats.ledger_records),
        ("redis_memory_bytes", "Memory that the queue's Redis uses.", memory.used_bytes),
        ("redis_memory_limit_bytes", "What it may use, or its machine has.", memory.limit_bytes),
    ):
        yield GaugeMetricFamily(f"sluice_{name}", what, value)


def _backlog(stats: QueueStats) -> Iterator[Metric]:
    labels = ["model", "lane"]
    depth = GaugeMetricFamily("sluice_queue_depth", "Jobs that wait.", labels=labels)
    oldest = GaugeMetricFamily(
        "sluice_queue_oldest_seconds", "Age of the oldest of them.", labels=labels
    )
    for model in stats.models:
        for lane, waiting in model.depth.items():
            depth.add_metric([model.name, lane], waiting.jobs)
            oldest.add_metric([model.name, lane], waiting.oldest_age_s)
    paused = {model.name: model.is_paused for model in stats.models}
    demand = {model.name: model.demand for model in stats.models}
    body_bytes = {model: stats.body_bytes.get(model, 0) for model in paused}
    yield from (depth, oldest)
    yield _by_model("demand", "Jobs that run or wait, and need workers.", demand)
    yield _by_model("queue_paused", "1: the operator has paused the model.", paused)
    yield _by_model("backlog_bytes", "Requests of open jobs, in Redis.", body_bytes)


def _workers(models: list[ModelStats]) -> Iterator[Metric]:
    by_state = GaugeMetricFamily("sluice_workers", "Workers that live.", labels=["model", "state"])
    for model in models:
        if model.serving:
            by_state.add_metric([model.name, WorkerState.SERVING], model.serving)
        if model.draining:
            by_state.add_metric([model.name, WorkerState.DRAINING], model.draining)
    yield by_state
    slots = {model.name: model.slots for model in models if model.serving}
    yield _by_model("slots", "Slots of the serving workers.", slots)
    alive = [model for model in models if model.has_workers]
    used = {model.name: model.slots_used for model in alive}
    yield _by_model("slots_used", "Requests inside the engines.", used)
    waiting = {model.name: model.engine_waiting for model in alive}
    yield _by_model("engine_waiting", "Requests that wait inside the engines.", waiting)
    usage = {model.name: model.kv_cache_usage for model in alive}
    yield _by_model("kv_cache_usage_ratio", "KV cache in use, of the fullest worker.", usage)


def _by_model(name: str, what: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"sluice_{name}", what, labels=["model"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family


def _counts(stats: QueueStats) -> Iterator[Metric]:
    """With a 0 for what has not happened yet: no rate can tell a first time otherwise."""
    by_lane, counts = ["model", "lane"], stats.counts
    jobs = CounterMetricFamily(
        "sluice_jobs", "Jobs accepted, claimed and ended.", labels=[*by_lane, "status"]
    )
    requeues = CounterMetricFamily(
        "sluice_requeues", "Jobs taken from their workers.", labels=[*by_lane, "cause"]
    )
    dead = CounterMetricFamily("sluice_dead_letters", "Jobs given up.", labels=by_lane)
    for place in ((model.name, lane) for model in stats.models for lane in Lane):
        for state in State:
            jobs.add_metric([*place, state], counts[Happening(Counted.JOBS, state, *place)])
        for cause in Cause:
            times = counts[Happening(Counted.REQUEUES, cause, *place)]
            requeues.add_metric([*place, cause], times)
        dead.add_metric(place, counts[Happening(Counted.DEAD, "letter", *place)])
    tickets = CounterMetricFamily(
        "sluice_tickets_reissued", "Celery tickets that were lost.", labels=["model"]
    )
    for model in stats.models:
        times = counts[Happening(Counted.TICKETS, "reissued", model.name)]
        tickets.add_metric([model.name], times)
    webhooks = CounterMetricFamily("sluice_webhook_calls", "Webhook calls.", labels=["outcome"])
    for outcome in ("delivered", "pending", "failed", "disabled"):
        webhooks.add_metric([outcome], counts[Happening(Counted.WEBHOOKS, outcome)])
    repairs = CounterMetricFamily(
        "sluice_repairs", "What maintenance found and mended.", labels=["kind"]
    )
    for kind in ("misplaced", "stray", "unrecorded", "lost"):
        repairs.add_metric([kind], counts[Happening(Counted.REPAIRS, kind)])
    yield from (jobs, requeues, dead, tickets, webhooks, repairs)
