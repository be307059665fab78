"""`GET /metrics`: what this API's processes counted together, and the queue as Redis has it now."""

import logging
from collections.abc import Iterator

from flask import Response, request
from flask_openapi3 import APIBlueprint, Tag
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from api.openapi import Given, operation
from api.queue_metrics import families, redis_up
from api.services import Services, get_services
from tasks.queue.statistics import read_stats

log = logging.getLogger(__name__)

blueprint = APIBlueprint("metrics", __name__)
FORMATS = ("text/plain", "application/openmetrics-text")


class _Queue(Collector):
    """The queue at the moment of the scrape; without Redis only that it is away."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        models = [model.name for model in self._services.catalog.models]
        try:
            stats = read_stats(self._services.jobs.backlog, models)
        except RedisError as away:
            log.warning("metrics without the queue: %s", away)
            yield redis_up(False)
            return
        yield redis_up(True)
        yield from families(stats)


@blueprint.get(
    "/metrics",
    tags=[Tag(name="Health")],
    summary="Metrics for Prometheus",
    openapi_extensions=operation({200: Given("The metrics", dict.fromkeys(FORMATS, str))}),
)
def show() -> Response:
    """In Prometheus's text format, or OpenMetrics when the scraper prefers that."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(_Queue(get_services()))
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(registry), content_type=content_type)
