"""What operators do over HTTP: dead letters, pauses, draining."""

from typing import Any

from flask_openapi3 import APIBlueprint, Tag

from api import replies, schemas
from api.openapi import STORE_ERRORS, Given, given, operation
from api.services import Services, get_services
from db import dead as letters
from tasks.contract.errors import (
    ConflictError,
    InvalidRequestError,
    ModelNotFoundError,
    NotKnownError,
    QueueUnavailableError,
    SluiceError,
)
from tasks.maintenance import dead_letters as dead
from tasks.queue import control

DEAD_ERRORS: tuple[type[SluiceError], ...] = (InvalidRequestError, NotKnownError, *STORE_ERRORS)
MODEL_ERRORS = (ModelNotFoundError, QueueUnavailableError)
Document = dict[str, Any]
ADMIN = [Tag(name="Admin", description="For operators: all tenants' jobs, and workers")]


def _operation(gives: dict[int, Given], *refuses: type[SluiceError]) -> dict[str, Any]:
    return operation(gives, refuses)


blueprint = APIBlueprint("admin", __name__)


@blueprint.get(
    "/v1/admin/dead",
    tags=ADMIN,
    summary="List dead letters",
    openapi_extensions=_operation(
        {200: given("Dead letters", replies.DeadLetterList)}, InvalidRequestError, *STORE_ERRORS
    ),
)
def list_dead(query: schemas.DeadQuery) -> Document:
    """Jobs that were given up, the latest first."""
    found = letters.letters(_url(get_services()), query.limit)
    return {"object": "list", "data": [dead.describe(job) for job in found]}


@blueprint.get(
    "/v1/admin/dead/<string:job_id>",
    tags=ADMIN,
    summary="Get a dead letter",
    openapi_extensions=_operation(
        {200: given("The dead letter", replies.DeadLetterWithReasons)}, *DEAD_ERRORS
    ),
)
def show_dead(path: schemas.JobPath) -> Document:
    """With the reason of each attempt's failure."""
    return dead.show(_url(get_services()), path.job_id)


@blueprint.post(
    "/v1/admin/dead/<string:job_id>/retry",
    tags=ADMIN,
    summary="Retry a dead letter",
    openapi_extensions=_operation(
        {202: given("The new job", replies.NewJob, "Location")}, *DEAD_ERRORS, ConflictError
    ),
)
def retry_dead(path: schemas.JobPath) -> tuple[Document, int, dict[str, str]]:
    """Queues a new job with the same request."""
    services = get_services()
    job_id = dead.retry(services.jobs, _url(services), path.job_id)
    return {"id": job_id}, 202, {"Location": f"/v1/jobs/{job_id}"}


@blueprint.delete(
    "/v1/admin/dead/<string:job_id>",
    tags=ADMIN,
    summary="Delete a dead letter",
    openapi_extensions=_operation({200: given("It is gone", replies.Deleted)}, *DEAD_ERRORS),
)
def purge_dead(path: schemas.JobPath) -> Document:
    """Deletes it with all that is known of the job."""
    if not letters.purge(_url(get_services()), [path.job_id]):
        raise NotKnownError(f"There is no dead letter {path.job_id!r}.")
    return {"id": path.job_id, "deleted": True}


@blueprint.get(
    "/v1/admin/workers",
    tags=ADMIN,
    summary="List workers",
    openapi_extensions=_operation(
        {200: given("Workers", replies.WorkerList)}, QueueUnavailableError
    ),
)
def list_workers() -> Document:
    """The workers that live, as their last heartbeats showed them."""
    found = control.workers(get_services().redis)
    return {"object": "list", "data": [worker._asdict() for worker in found]}


@blueprint.get(
    "/v1/admin/targets",
    tags=ADMIN,
    summary="List workers for Prometheus",
    openapi_extensions=_operation(
        {200: given("Targets", list[replies.Target])}, QueueUnavailableError
    ),
)
def list_targets() -> list[Document]:
    """In the form of Prometheus's `http_sd`: where the /metrics of the living workers are."""
    return [
        {"targets": [worker.metrics_address], "labels": {"worker": worker.id}}
        for worker in control.workers(get_services().redis)
        if worker.metrics_address
    ]


@blueprint.post(
    "/v1/admin/workers/<string:worker_id>/drain",
    tags=ADMIN,
    summary="Drain a worker",
    openapi_extensions=_operation(
        {202: given("It drains", replies.Drained)},
        *(InvalidRequestError, NotKnownError, QueueUnavailableError),
    ),
)
def drain(path: schemas.WorkerPath) -> tuple[Document, int]:
    """It takes no more jobs, finishes what it can, hands on the rest, and ends."""
    services = get_services()
    control.drain(services.redis, services.jobs.bus, path.worker_id)
    return {"id": path.worker_id, "state": control.WorkerState.DRAINING}, 202


@blueprint.post(
    "/v1/admin/models/<model:model_id>/pause",
    tags=ADMIN,
    summary="Pause a model",
    openapi_extensions=_operation({200: given("It is paused", replies.Paused)}, *MODEL_ERRORS),
)
def pause(path: schemas.ModelPath) -> Document:
    """Its backlog goes on growing, and no worker takes from it."""
    services = get_services()
    name = services.catalog.resolve(path.model_id).name
    services.jobs.backlog.pause(name)
    return {"id": name, "is_paused": True}


@blueprint.post(
    "/v1/admin/models/<model:model_id>/resume",
    tags=ADMIN,
    summary="Resume a model",
    openapi_extensions=_operation({200: given("It is served", replies.Paused)}, *MODEL_ERRORS),
)
def resume(path: schemas.ModelPath) -> Document:
    """Ends a pause."""
    services = get_services()
    name = services.catalog.resolve(path.model_id).name
    services.jobs.backlog.resume(name)
    return {"id": name, "is_paused": False}


def _url(services: Services) -> str:
    return services.settings.database_url
