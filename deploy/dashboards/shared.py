"""What several dashboards ask for and show."""

from grafana_foundation_sdk.builders import stat, timeseries

from deploy.dashboards.panels import bad_from, graph, number
from deploy.dashboards.promql import of, same

DEPTH = same(of("sluice_queue_depth"), "model, lane")
SLOTS = same(of("sluice_slots"), "model")
USED = same(of("sluice_slots_used"), "model")
KV_CACHE = same(of("sluice_kv_cache_usage_ratio"), "model")


def jobs_waiting() -> stat.Panel:
    """How many jobs wait, of all lanes."""
    return number(
        "Jobs waiting",
        "Jobs in the backlog: a number that keeps growing means too few workers.",
        "short",
        f"sum({DEPTH})",
    )


def kv_cache() -> timeseries.Panel:
    """How full the KV caches were."""
    return graph(
        "KV cache used, by model",
        "Of the model's fullest worker: full while slots are free means that prompts are too "
        "long for that many slots.",
        "percentunit",
        {"{{model}}": KV_CACHE},
        bad_from(0.8, 0.95),
    )
