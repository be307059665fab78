"""Whether this process lives, whether the deployment can serve, and which version it is."""

from importlib.metadata import version

import orjson
from flask import Response
from flask_openapi3 import APIBlueprint, Tag

from api.services import get_services
from tasks import control

blueprint = APIBlueprint("health", __name__)
HEALTH = [Tag(name="Health")]


@blueprint.get("/health/live", tags=HEALTH, summary="Is this process alive?")
def live() -> Response:
    """200 as long as the process answers; `streams` are the requests it waits for at the moment."""
    services = get_services()
    return _json({"status": "ok", "streams": services.relay.open_streams})


@blueprint.get("/health/ready", tags=HEALTH, summary="Can requests be served?")
def ready() -> Response:
    """200 when Redis answers and at least one worker lives, else 503."""
    return _readiness()


def _readiness() -> Response:
    services = get_services()
    workers = len(control.workers(services.redis))
    if workers:
        return _json({"status": "ok", "workers": workers})
    response = _json({"status": "no worker lives yet", "workers": 0}, status=503)
    response.headers["Retry-After"] = "2"
    return response


@blueprint.get("/health", tags=HEALTH, summary="Can requests be served? (vLLM's name)")
def health() -> Response:
    """The same as `/health/ready`: what monitors of vLLM ask for."""
    return _readiness()


@blueprint.get("/ping", tags=HEALTH, summary="Can requests be served? (SageMaker's name)")
def ping() -> Response:
    """The same as `/health/ready`."""
    return _readiness()


@blueprint.get("/load", tags=HEALTH, summary="How much is this process doing?")
def load() -> Response:
    """Requests that this process answers at the moment, in vLLM's shape."""
    return _json({"server_load": get_services().relay.open_streams})


@blueprint.get("/version", tags=HEALTH, summary="The version of Sluice")
def get_version() -> Response:
    """The version of the package."""
    return _json({"version": version("sluice")})


def _json(document: dict[str, object], status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, content_type="application/json")
