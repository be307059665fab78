"""Whether this process lives, whether the deployment can serve, and which version it is."""

from importlib.metadata import version
from typing import Any

from flask_openapi3 import APIBlueprint, Tag

from api import instruments, replies
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
def live() -> dict[str, Any]:
    """200 as long as the process answers; `streams` are the requests it waits for at the moment."""
    services = get_services()
    return {"status": "ok", "streams": services.relay.open_streams}


@blueprint.get(
    "/health/ready",
    tags=HEALTH,
    summary="Can requests be served?",
    openapi_extensions=READY,
)
def ready() -> dict[str, Any]:
    """200 when Redis answers and at least one worker lives, else 503."""
    return _readiness()


def _readiness() -> dict[str, Any]:
    workers = len(control.workers(get_services().redis))
    if not workers:
        raise NoWorkerError
    return {"status": "ok", "workers": workers}


@blueprint.get(
    "/health",
    tags=HEALTH,
    summary="Can requests be served? (vLLM's name)",
    openapi_extensions=READY,
)
def health() -> dict[str, Any]:
    """The same as `/health/ready`: what monitors of vLLM ask for."""
    return _readiness()


@blueprint.get(
    "/ping",
    tags=HEALTH,
    summary="Can requests be served? (SageMaker's name)",
    openapi_extensions=READY,
)
def ping() -> dict[str, Any]:
    """The same as `/health/ready`."""
    return _readiness()


@blueprint.get(
    "/load",
    tags=HEALTH,
    summary="How much is this API doing?",
    openapi_extensions=operation({200: given("Its load", replies.Load)}),
)
def load() -> dict[str, Any]:
    """Requests that all processes of this API answer at the moment, in vLLM's shape."""
    return {"server_load": instruments.count_open_streams()}


@blueprint.get(
    "/version",
    tags=HEALTH,
    summary="The version of Sluice",
    openapi_extensions=operation({200: given("The version", replies.Version)}),
)
def get_version() -> dict[str, Any]:
    """The version of the package."""
    return {"version": version("sluice")}
