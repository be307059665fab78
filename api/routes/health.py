"""Whether this process lives, whether the deployment can serve, and which version it is."""

from importlib.metadata import version

import orjson
from flask import Response
from flask_openapi3 import APIBlueprint, Tag

from api import replies
from api.openapi import given, operation
from api.services import get_services
from tasks.contract.errors import NoWorkerError, QueueUnavailableError
from tasks.queue import control

blueprint = APIBlueprint("health", __name__)
HEALTH = [Tag(name="Health")]
READY = operation({200: given("Yes", replies.Readiness)}, (NoWorkerError, QueueUnavailableError))


@blueprint.get(
    "/health/live",
    tags=HEALTH,
    summary="Is this process alive?",
    openapi_extensions=operation({200: given("Yes", replies.Live)}),
)
def live() -> Response:
    """200 as long as the process answers; `streams` are the requests it waits for at the moment."""
    services = get_services()
    return _json({"status": "ok", "streams": services.relay.open_streams})


@blueprint.get(
    "/health/ready",
    tags=HEALTH,
    summary="Can requests be served?",
    openapi_extensions=READY,
)
def ready() -> Response:
    """200 when Redis answers and at least one worker lives, else 503."""
    return _readiness()


def _readiness() -> Response:
    workers = len(control.workers(get_services().redis))
    if not workers:
        raise NoWorkerError
    return _json({"status": "ok", "workers": workers})


@blueprint.get(
    "/health",
    tags=HEALTH,
    summary="Can requests be served? (vLLM's name)",
    openapi_extensions=READY,
)
def health() -> Response:
    """The same as `/health/ready`: what monitors of vLLM ask for."""
    return _readiness()


@blueprint.get(
    "/ping",
    tags=HEALTH,
    summary="Can requests be served? (SageMaker's name)",
    openapi_extensions=READY,
)
def ping() -> Response:
    """The same as `/health/ready`."""
    return _readiness()


@blueprint.get(
    "/load",
    tags=HEALTH,
    summary="How much is this process doing?",
    openapi_extensions=operation({200: given("Its load", replies.Load)}),
)
def load() -> Response:
    """Requests that this process answers at the moment, in vLLM's shape."""
    return _json({"server_load": get_services().relay.open_streams})


@blueprint.get(
    "/version",
    tags=HEALTH,
    summary="The version of Sluice",
    openapi_extensions=operation({200: given("The version", replies.Version)}),
)
def get_version() -> Response:
    """The version of the package."""
    return _json({"version": version("sluice")})


def _json(document: dict[str, object]) -> Response:
    return Response(orjson.dumps(document), content_type="application/json")
