"""What only the operator may do over HTTP: dead letters, pauses, draining.

With `Authorization: Bearer $SLUICE_ADMIN_KEY`; without that setting all of it is off.
"""

import hmac

import orjson
from flask import Response, request
from flask_openapi3 import APIBlueprint, Tag

from api import schemas
from api.services import Services, get_services
from db import dead as letters
from tasks import control, dead
from tasks.errors import AuthenticationError, NotKnownError, PermissionDeniedError

ADMIN = [Tag(name="Admin", description="For the operator, with the admin key")]


def _authenticate() -> None:
    """Refuses whoever does not show the key.

    Raises:
        PermissionDeniedError: the operator has set none.
        AuthenticationError: it is missing or wrong.
    """
    key = get_services().settings.admin_key
    if not key:
        raise PermissionDeniedError
    shown = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(shown.encode(), key.encode()):
        raise AuthenticationError


blueprint = APIBlueprint("admin", __name__)
blueprint.before_request(_authenticate)


@blueprint.get("/v1/admin/dead", tags=ADMIN, summary="List dead letters")
def list_dead(query: schemas.DeadQuery) -> Response:
    """Jobs that were given up, the latest first."""
    found = letters.letters(_url(get_services()), query.limit)
    return _json({"object": "list", "data": [dead.describe(job) for job in found]})


@blueprint.get("/v1/admin/dead/<string:job_id>", tags=ADMIN, summary="Get a dead letter")
def show_dead(path: schemas.JobPath) -> Response:
    """With the reason of each attempt's failure."""
    return _json(dead.show(_url(get_services()), path.job_id))


@blueprint.post("/v1/admin/dead/<string:job_id>/retry", tags=ADMIN, summary="Retry a dead letter")
def retry_dead(path: schemas.JobPath) -> Response:
    """Queues a new job with the same request."""
    services = get_services()
    return _json({"id": dead.retry(services.jobs, _url(services), path.job_id)}, 202)


@blueprint.delete("/v1/admin/dead/<string:job_id>", tags=ADMIN, summary="Delete a dead letter")
def purge_dead(path: schemas.JobPath) -> Response:
    """Deletes it with all that is known of the job."""
    if not letters.purge(_url(get_services()), [path.job_id]):
        raise NotKnownError(f"There is no dead letter {path.job_id!r}.")
    return _json({"id": path.job_id, "deleted": True})


@blueprint.get("/v1/admin/workers", tags=ADMIN, summary="List workers")
def list_workers() -> Response:
    """The workers that live, as their last heartbeats showed them."""
    found = control.workers(get_services().redis)
    return _json({"object": "list", "data": [worker._asdict() for worker in found]})


@blueprint.get("/v1/admin/targets", tags=ADMIN, summary="List workers for Prometheus")
def list_targets() -> Response:
    """In the form of Prometheus's `http_sd`: where the /metrics of the living workers are."""
    targets = [
        {"targets": [worker.metrics_address], "labels": {"worker": worker.id}}
        for worker in control.workers(get_services().redis)
        if worker.metrics_address
    ]
    return Response(orjson.dumps(targets), content_type="application/json")


@blueprint.post("/v1/admin/workers/<string:worker_id>/drain", tags=ADMIN, summary="Drain a worker")
def drain(path: schemas.WorkerPath) -> Response:
    """It takes no more jobs, finishes what it can, hands on the rest, and ends."""
    services = get_services()
    control.drain(services.redis, services.jobs.bus, path.worker_id)
    return _json({"id": path.worker_id, "state": control.WorkerState.DRAINING}, 202)


@blueprint.post("/v1/admin/models/<path:model_id>/pause", tags=ADMIN, summary="Pause a model")
def pause(path: schemas.ModelPath) -> Response:
    """Its backlog goes on growing, and no worker takes from it."""
    services = get_services()
    name = services.catalog.resolve(path.model_id).name
    services.jobs.backlog.pause(name)
    return _json({"id": name, "is_paused": True})


@blueprint.post("/v1/admin/models/<path:model_id>/resume", tags=ADMIN, summary="Resume a model")
def resume(path: schemas.ModelPath) -> Response:
    """Ends a pause."""
    services = get_services()
    name = services.catalog.resolve(path.model_id).name
    services.jobs.backlog.resume(name)
    return _json({"id": name, "is_paused": False})


def _url(services: Services) -> str:
    return services.settings.database_url


def _json(document: dict[str, object], status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, content_type="application/json")
